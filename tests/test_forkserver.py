"""Processes of commands that do not end."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.commands import environment, wait_until
from tests.forkserver import Forked

WAITING = """
import subprocess, sys

CHILD = "import pathlib, time\\ndef second(): pathlib.Path('there').touch(); time.sleep(60)\\nsecond()"

def first():
    subprocess.run([sys.executable, "-c", CHILD])

first()
"""


def test_what_takes_too_long_says_where_it_and_its_children_stand(tmp_path: Path) -> None:
    (tmp_path / "waiting.py").write_text(WAITING)
    process = Forked(["waiting.py"], tmp_path, environment())
    wait_until((tmp_path / "there").exists, process)
    with pytest.raises(AssertionError, match=r"waiting\.py'\] not over after 0 s: ") as said:
        process.communicate(timeout=0)
    assert re.findall(r" in (first|second)$", str(said.value), re.MULTILINE) == ["first", "second"]
