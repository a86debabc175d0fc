"""README.md: short, every line run, and what its ten lines and those of docs/python.md print and save."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.commands import REPOSITORY, execute_code
from tests.test_your_own_family import blocks

README = (REPOSITORY / "README.md").read_text()
WORDS = 500
PICTURES = 2


def words(text: str) -> list[str]:
    """All that is read: outside blocks of code, tables and alternative texts included, targets of links left out."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    return re.findall(r"\S*\w\S*", re.sub(r"\]\([^)]*\)", "]", text))


def test_it_is_read_in_two_minutes() -> None:
    assert words("a [b c](d.md) | `e` ![f](g.png)\n```sh\nh\n```\n- i") == ["a", "[b", "c]", "`e`", "![f]", "i"]
    assert len(words(README)) <= WORDS
    assert len(re.findall(r"!\[|<img", README)) <= PICTURES


def test_everything_else_is_one_link_away() -> None:
    linked = set(re.findall(r"\]\(([\w/.]+\.md)", README))
    pages = {f"docs/{path.name}" for path in (REPOSITORY / "docs").glob("*.md")}
    assert linked >= pages | {"CONTRIBUTING.md", "CHANGELOG.md", "LOG.md", "benchmarks/README.md"}


def test_the_ten_lines(tmp_path: Path) -> None:
    block = blocks("README.md")[0]
    assert len([line for line in block.splitlines() if line]) <= 10
    done = execute_code(block, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^calls of each network: \{.*'l': \d+\.0\}$", done.stdout, re.MULTILINE)
    found = re.search(r"^error: (\S+)$", done.stdout, re.MULTILINE)
    assert found is not None
    assert float(found[1]) < 1.5e-2
    with Image.open(tmp_path / "leaves.png") as image, Image.open(REPOSITORY / "docs/leaves.png") as shown:
        assert image.size == shown.size


def test_the_pages_on_multilevel_sampling_and_on_solvers(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}
    for page in ("docs/multilevel.md", "docs/solvers.md"):
        (block,) = blocks(page)
        block = block.replace("runs/demo/family", "pretrained:dead_leaves16").replace("range(64)", "range(2)")
        exec(compile(block, page, "exec"), names)
    assert names["images"].shape == (8, 3, 16, 16)
    assert " steps on the " in capsys.readouterr().out
    assert names["result"].x.shape == (2, 3, 16, 16)


def test_the_page_on_python(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}
    for block in blocks("docs/python.md")[:2]:  # the other one runs in test_your_own_family.py
        exec(compile(block, "docs/python.md", "exec"), names)
    assert names["images"].shape == (16, 3, 16, 16)
    assert re.search(r"^level l: \d+ calls per image, ", capsys.readouterr().out, re.MULTILINE)
    assert names["result"].ledger.levels.keys() >= {"xs", "l"}
