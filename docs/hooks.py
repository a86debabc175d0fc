"""Hooks of MkDocs: pages and notebooks outside `docs/`, and links from names in code spans to the reference."""

from __future__ import annotations

import json
import logging
import posixpath
import re
from typing import Any
from xml.etree.ElementTree import Element, SubElement

from markdown import Extension, Markdown
from markdown.inlinepatterns import InlineProcessor
from markdown.util import AtomicString
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File
from public_names import REPOSITORY, documented, identifiers

OUTSIDE = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "CHANGELOG.md": "changelog.md",
    "LOG.md": "log.md",
    "benchmarks/README.md": "measurements.md",
    "examples/multilevel_in_pictures.ipynb": "multilevel_in_pictures.md",
    "examples/bring_your_own_family.ipynb": "bring_your_own_family.md",
}
"""Path in the repository -> page of the site."""

log = logging.getLogger("mkdocs.hooks")

LINK = re.compile(r'(\]\(|src=")([^)"#\s]+)')
NAME = r"(?<![`\[])`((?:mlem\.)?[A-Za-z_][\w.]*)(\([^`]*\))?`(?!`)"


class Names(Extension):
    """A code span that is a public name, or a call of one, links to the reference."""

    def extendMarkdown(self, md: Markdown) -> None:
        md.inlinePatterns.register(_Name(NAME, md), "names", 195)  # before code spans, at 190


class _Name(InlineProcessor):
    known = identifiers()

    def handleMatch(self, m: re.Match[str], data: str) -> tuple[Element | None, int | None, int | None]:
        owner, _, member = m[1].partition(".")
        owner = owner.title() if member and owner.title() in self.known else owner  # `family.plan` is `Family.plan`
        if m[1] in self.known:
            link = Element("autoref", identifier=self.known[m[1]])
        elif owner in self.known and owner[0].isupper() and member not in ("json", "py"):
            link = Element("autoref", identifier=f"{self.known[owner]}.{member}", optional="")
        else:
            return None, None, None
        SubElement(link, "code").text = AtomicString(m[1] + (m[2] or ""))
        return link, m.start(), m.end()


def on_env(env: Any, config: Any, files: Any) -> None:
    """Check that every public name of a module in the reference has an entry."""
    for module, names in documented().items():
        for name in names:
            try:
                config.plugins["autorefs"].get_item_url(f"{module}.{name}")
            except KeyError:
                log.warning("the reference has nothing on %s.%s", module, name)


@event_priority(100)  # before mkdocstrings, which reads the list for docstrings
def on_config(config: Any) -> Any:
    config.markdown_extensions.append(Names())
    return config


def on_files(files: Any, config: Any) -> Any:
    for path, page in OUTSIDE.items():
        text = (REPOSITORY / path).read_text()
        files.append(File.generated(config, page, content=_of_notebook(text) if path.endswith(".ipynb") else text))
    return files


def _of_notebook(text: str) -> str:
    """The cells of a notebook and their outputs, as Markdown."""
    parts: list[str] = []
    for cell in json.loads(text)["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in cell.get("outputs", []):
            if picture := output.get("data", {}).get("image/png"):
                parts.append(f'<img alt="{cell["metadata"]["alt"]}" src="data:image/png;base64,{picture}">')
            elif output["output_type"] == "stream":
                parts.append(f"```text\n{''.join(output['text'])}```")
    return "\n\n".join(parts)


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Links between files of the repository, as links between pages of the site."""
    names = {name: path for path, name in OUTSIDE.items()}
    here = names.get(page.file.src_uri, f"docs/{page.file.src_uri}")

    def moved(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(here), link[2]))
        if ":" in link[2] or not (target in OUTSIDE or target.startswith("docs/")):
            return link[0]
        target = OUTSIDE.get(target, target.removeprefix("docs/"))
        if files.get_file_from_path(target) is None:  # MkDocs does not look into HTML
            log.warning("%s has %s, which does not exist", here, link[2])
        return link[1] + posixpath.relpath(target, posixpath.dirname(page.file.src_uri) or ".")

    return LINK.sub(moved, markdown)
