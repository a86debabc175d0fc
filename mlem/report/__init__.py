"""`report.html`: a run folder as one self-contained page, made from the files in that folder alone.

`content` makes the sections from the folder's files, with `advice` (what to run), `plans`, `samples`, `logs` and
`tables`; `html` writes elements; `report.css` and `report.js` are embedded in the page.
"""

from mlem.report.advice import told
from mlem.report.content import write_report
from mlem.report.plans import plan_pictures

__all__ = ["plan_pictures", "told", "write_report"]
