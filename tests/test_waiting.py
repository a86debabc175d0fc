"""A bar that appears only where work takes long."""

from __future__ import annotations

import pytest

from mlem import waiting
from mlem.waiting import Waiting


@pytest.mark.parametrize(("patience", "rank", "shown"), [(-1.0, "0", True), (60.0, "0", False), (-1.0, "1", False)])
def test_a_bar_appears_after_a_second_on_the_first_rank(
    patience: float, rank: str, shown: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(waiting, "PATIENCE", patience)
    monkeypatch.setenv("RANK", rank)
    with Waiting("searching", 3) as bar:
        for _ in range(3):
            bar.advance()
    said = capsys.readouterr()
    assert not said.out
    assert ("searching" in said.err) is shown
    assert ("3/3" in said.err) is shown
