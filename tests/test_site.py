"""The site: every public name is in the reference with a docstring, and every page is in the menu. Nothing is built."""

from __future__ import annotations

import ast
import re
from functools import cache
from itertools import pairwise

import by_budget
import yaml
from public_names import REPOSITORY, documented, public_names

PACKAGES = sorted(
    ".".join(path.parent.relative_to(REPOSITORY).parts) for path in (REPOSITORY / "mlem").rglob("__init__.py")
)
PAGES = [*(REPOSITORY / "docs").glob("*.md"), REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md"]
SCRIPTS = sorted((REPOSITORY / "examples").glob("*.py"))
REFERENCE = documented()
KNOWN = {**REFERENCE, "mlem": public_names("mlem")}
NAMES = {name for names in REFERENCE.values() for name in names}
SCRIPT = re.compile(r"^ *python ((?:benchmarks|examples)/\S+)", re.MULTILINE)
IMPORTED = re.compile(r"^ *from (mlem[\w.]*) import (.+)$", re.MULTILINE)


@cache
def parsed(module: str) -> ast.Module:
    path = REPOSITORY.joinpath(*module.split("."))
    return ast.parse((path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text())


def described(module: str, name: str) -> bool:
    """Whether a name has a docstring, in this module or in the one that it is imported from."""
    tree = parsed(module)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and name in {one.name for one in node.names}:
            return described(str(node.module), name)
    found = [node for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name]
    if found:  # the last one: overloads stand before it
        return ast.get_docstring(found[-1]) is not None
    for node, after in pairwise(tree.body):
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(isinstance(one, ast.Name) and one.id == name for one in targets):
            return isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
    return False


def test_every_public_name_of_every_package_is_in_the_reference() -> None:
    assert [package for package in PACKAGES if public_names(package) and package not in KNOWN] == []
    page = (REPOSITORY / "docs/reference/index.md").read_text()
    assert [name for name in KNOWN["mlem"] if f"`mlem.{name}`" not in page or name not in NAMES] == []


def test_what_pages_and_examples_import_is_in_the_reference() -> None:
    imports = [found for path in [*PAGES, *SCRIPTS] for found in IMPORTED.findall(path.read_text())]
    assert len(imports) > 20
    assert [(module, names) for module, names in imports if not {*names.split(", ")} <= NAMES] == []


def test_every_public_name_in_the_reference_has_a_docstring() -> None:
    assert len(NAMES) > 150
    bare = [(module, name) for module, names in REFERENCE.items() for name in names if not described(module, name)]
    assert bare == []


def test_every_page_is_in_the_menu_two_clicks_from_the_start() -> None:
    menu = yaml.safe_load((REPOSITORY / "mkdocs.yml").read_text())["nav"]
    pages: set[str] = set()
    for ((_, entry),) in map(dict.items, menu):
        for page in [entry] if isinstance(entry, str) else entry:
            pages.add(page if isinstance(page, str) else next(iter(page.values())))
    assert all(isinstance(page, str) for page in pages)
    docs = REPOSITORY / "docs"
    outside = {"index.md", "contributing.md", "security.md", "changelog.md", "log.md", "measurements.md"}
    outside |= {path.with_suffix(".md").name for path in (REPOSITORY / "examples").glob("*.ipynb")}
    assert pages == outside | {str(path.relative_to(docs)) for path in docs.rglob("*.md")}


def test_every_picture_says_in_words_what_it_shows() -> None:
    """As those of the notebooks, which test_notebooks.py looks at."""
    pages = [*(REPOSITORY / "docs").rglob("*.md"), *REPOSITORY.glob("*.md"), REPOSITORY / "benchmarks/README.md"]
    text = "\n".join(page.read_text() for page in pages)
    said = re.findall(r"!\[([^]]*)\]\(", text) + re.findall(r'<img\s[^>]*?\balt="([^"]*)"', text)
    assert len(said) == text.count("![") + text.count("<img") > 15
    assert [words for words in said if len(words.split()) < 6] == []


def test_every_script_that_a_page_runs_is_there() -> None:
    scripts = {found for page in PAGES for found in SCRIPT.findall(page.read_text())}
    assert [script for script in scripts if not (REPOSITORY / script).exists()] == []


def test_every_page_with_python_is_run_by_a_test() -> None:
    pages = [str(page.relative_to(REPOSITORY)) for page in PAGES if "```python" in page.read_text()]
    tests = [path.read_text() for path in (REPOSITORY / "tests").glob("*.py")]
    named = "".join(text for text in tests if "blocks(" in text)
    assert len(pages) > 8
    assert [page for page in pages if f'"{page}"' not in named and page != "CONTRIBUTING.md"] == []


def test_the_figure_of_budgets_is_of_the_plans_of_today() -> None:
    assert by_budget.PAGE.read_text() == by_budget.page(), "draw it again: python docs/by_budget.py"
