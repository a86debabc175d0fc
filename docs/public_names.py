"""Public names and their places in the reference, read from files without importing."""

from __future__ import annotations

import ast
import re
from collections import Counter
from pathlib import Path

__all__ = ["documented", "identifiers", "public_names"]

REPOSITORY = Path(__file__).resolve().parents[1]


def public_names(module: str) -> list[str]:
    """`__all__` of a module or package; empty if it has none."""
    path = REPOSITORY.joinpath(*module.split("."))
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return ast.literal_eval(node.value)
    return []


def documented() -> dict[str, list[str]]:
    """Modules that the pages of the reference show -> their public names."""
    pages = sorted((REPOSITORY / "docs/reference").glob("*.md"))
    modules = [module for page in pages for module in re.findall(r"^::: ([\w.]+)$", page.read_text(), re.MULTILINE)]
    return {module: public_names(module) for module in modules}


def identifiers() -> dict[str, str]:
    """Name in pages and docstrings -> identifier in the reference.

    All modules and public names by full name; those of `mlem` and unambiguous classes also by short name.
    """
    full = {f"{module}.{name}": name for module, names in documented().items() for name in names}
    several = Counter(full.values())
    classes = {name: path for path, name in full.items() if several[name] == 1 and name[0].isupper()}
    front = {name: classes.get(name, f"mlem.{name}") for name in public_names("mlem")}
    whole = {f"mlem.{name}": path for name, path in front.items()}
    return {**classes, **front, **whole, **{path: path for path in [*full, *documented()]}}
