"""`report.html`: a run folder as one page that needs nothing else, made from the files in that folder alone.

`content` makes the sections from the folder's files, with `logs` and `tables`; `html` writes elements; `report.css` and
`report.js` stand inside the page.
"""

from mlem.report.content import write_report

__all__ = ["write_report"]
