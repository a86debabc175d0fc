"""CONTRIBUTING.md: each page, done to the letter in a copy of the repository, is all that it takes."""

from __future__ import annotations

import hashlib
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.commands import REPOSITORY, environment, finish
from tests.forkserver import Forked

COPIED = ("mlem", "configs", "tests", "benchmarks", "train.py", "sample.py", "pyproject.toml")
_, *SECTIONS = re.split(r"^## ", (REPOSITORY / "CONTRIBUTING.md").read_text(), flags=re.MULTILINE)
PAGES = {title: text for title, _, text in (section.partition("\n") for section in SECTIONS) if "```sh" in text}

WRITTEN = re.compile(r"^`([\w/.]+)`:\n\n```(python|yaml)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
CHANGED = re.compile(r"^In `([\w/.]+)`:\n\n```diff\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COMMANDS = re.compile(r"^```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    ignored = shutil.ignore_patterns("__pycache__")
    for name in COPIED:
        if (REPOSITORY / name).is_dir():
            shutil.copytree(REPOSITORY / name, tmp_path / name, ignore=ignored)
        else:
            shutil.copy(REPOSITORY / name, tmp_path / name)
    return tmp_path


def sources(repository: Path) -> dict[str, str]:
    """Hashes of the files that a page could need: code, configs and tests, and what lies at the top."""
    files = [path for name in COPIED for path in (repository / name, *(repository / name).rglob("*"))]
    files += repository.glob("*.py")
    plain = {path for path in files if path.is_file() and path.suffix != ".pyc"}
    return {str(path.relative_to(repository)): hashlib.sha256(path.read_bytes()).hexdigest() for path in plain}


def follow(page: str, repository: Path) -> set[str]:
    """Write and change the files of a page; return their names."""
    for name, _, text in WRITTEN.findall(page):
        assert not (repository / name).exists()
        (repository / name).write_text(text)
    for name, lines in CHANGED.findall(page):
        old, new = ("".join(line[1:] + "\n" for line in lines.splitlines() if line[0] in kept) for kept in ("- ", "+ "))
        text = (repository / name).read_text()
        assert text.count(old) == 1, f"{name} does not have these lines once:\n{old}"
        (repository / name).write_text(text.replace(old, new))
    return {name for name, *_ in WRITTEN.findall(page) + CHANGED.findall(page)}


def test_the_pages_are_found() -> None:
    assert list(PAGES) == ["A new solver", "A new data set", "A network of your own", "A changed plan search"]


@pytest.mark.parametrize("title", PAGES)
def test_a_page_is_all_that_it_takes(title: str, repository: Path) -> None:
    page, before = PAGES[title], sources(repository)
    named = follow(page, repository)
    # pytest's plugins cannot be rewritten in a process that has imported their packages
    variables = environment(PYTHONPATH=str(repository), PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")
    (commands,) = COMMANDS.findall(page)
    for command in commands.splitlines():
        python, *arguments = shlex.split(command, comments=True)
        assert python == "python"
        done = finish(Forked(arguments, repository, variables))
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    after = sources(repository)
    assert {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)} == named


@pytest.mark.parametrize("title", PAGES)
def test_the_code_of_a_page_is_in_our_style(title: str, repository: Path) -> None:
    written = [name for name in follow(PAGES[title], repository) if name.endswith(".py")]
    for check in (["check", "--no-cache"], ["format", "--check", "--no-cache"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *check, *written], cwd=repository, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
