"""HTML elements as text, everything escaped; a page that loads nothing from outside."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files

__all__ = ["Cell", "Markup", "figure", "join", "page", "section", "table", "tag"]


class Markup(str):
    """HTML; any other text is escaped when put into an element."""


_VOID = ("img", "link", "meta")


def tag(name: str, /, *children: str, **attributes: str) -> Markup:
    """An element. Attributes: `_` at the end is dropped (`class_`), elsewhere it stands for `-` (`aria_sort`)."""
    written = "".join(f' {key.rstrip("_").replace("_", "-")}="{escape(text)}"' for key, text in attributes.items())
    if name in _VOID:
        return Markup(f"<{name}{written}>")
    return Markup(f"<{name}{written}>{join(children)}</{name}>")


def join(children: Iterable[str]) -> Markup:
    """One after another."""
    return Markup("".join(child if isinstance(child, Markup) else escape(child) for child in children))


@dataclass(frozen=True)
class Cell:
    """A table cell. value: the sort key: a number, a text, or None, which sorts last."""

    text: str
    value: float | str | None


def table(caption: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> Markup:
    """A table that sorts by a column when its header is clicked. A column is numeric if all its values are."""
    numeric = [all(not isinstance(row[i].value, str) for row in rows) for i in range(len(columns))]
    kinds = ["number" if one else "text" for one in numeric]
    head = [
        tag("th", tag("button", column, type="button"), scope="col", class_=kind, aria_sort="none")
        for column, kind in zip(columns, kinds, strict=True)
    ]
    body = [
        tag("tr", *(tag("td", cell.text, class_=kind, data_value=_sortable(cell.value)) for cell, kind in cells))
        for cells in (zip(row, kinds, strict=True) for row in rows)
    ]
    whole = tag("table", tag("caption", caption), tag("thead", tag("tr", *head)), tag("tbody", *body))
    return tag("div", whole, class_="table", tabindex="0", role="region", aria_label=caption)


def _sortable(value: float | str | None) -> str:
    return "" if value is None else str(value)


def figure(png: bytes, alt: str, caption: str, class_: str = "plot") -> Markup:
    """An image embedded in the page. alt: a description for those who cannot see it."""
    source = "data:image/png;base64," + base64.b64encode(png).decode()
    return tag("figure", tag("img", src=source, alt=alt), tag("figcaption", caption), class_=class_)


def section(title: str, *children: str, class_: str = "") -> Markup:
    """A section of the page, or nothing without children."""
    if not children:
        return Markup()
    return tag("section", tag("h2", title), tag("div", *children, class_=class_) if class_ else join(children))


def page(title: str, *body: str) -> Markup:
    """The whole document. Its security policy allows only its own style and script, and no requests."""
    style, script = ((files("mlem.report") / name).read_text(encoding="utf-8") for name in ("report.css", "report.js"))
    policy = f"default-src 'none'; img-src data:; style-src '{_digest(style)}'; script-src '{_digest(script)}'"
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("link", rel="icon", href="data:,"),  # otherwise browsers request one
        tag("title", title),
        tag("style", Markup(style)),
    )
    return join(
        [
            Markup("<!doctype html>\n"),
            tag("html", head, tag("body", tag("main", *body), tag("script", Markup(script))), lang="en"),
            "\n",
        ]
    )


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
