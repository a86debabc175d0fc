"""Ranges, counts and seeds that no memory or word of 64 bits would hold: refused at once, with the bound."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mlem import Family, NoiseSchedule, TimeGrid
from mlem.cli.main import job_of
from mlem.cli.values import parse_indices
from mlem.data import prepare
from mlem.multilevel.calibrate import calibrate
from mlem.multilevel.pilot import pilot
from mlem.sampling import blocks
from tests.commands import PLAIN, run_here, run_in
from tests.problems import level

INDICES = "must be ranges such as 0-63 or 0-9,20, of at most 10000000 indices below 1000000000, got"
OPTIONS: list[tuple[str, str, str]] = [
    *(
        ("sample", f"seeds={value}", f"seeds {INDICES}")
        for value in ("0-99999999999", "9223372036854775808", "1000000000")
    ),
    ("sample", "seeds='0-9999999,20000000'", f"seeds {INDICES}"),
    ("train", "evaluation.indices=0-99999999999", f"evaluation.indices {INDICES}"),
    ("sample", "seed=9223372036854775808", "seed must be at most 9223372036854775807, got 9223372036854775808"),
    ("train", "seed=9223372036854775808", "seed must be at most 9223372036854775807, got 9223372036854775808"),
    ("sample", "steps=99999999999", "steps must be at most 1000000, got 99999999999"),
    ("train", "evaluation.reference_steps=99999999999", "evaluation.reference_steps must be at most 1000000"),
    ("train", "calibration.reference_steps=99999999999", "calibration.reference_steps must be at most 1000000"),
    ("train", "calibration.batch_sizes=[99999999999]", "calibration.batch_sizes must be at most 1000000000"),
    ("train", "training.batch_size=99999999999", "training.batch_size must be at most 1000000000"),
    ("train", "training.steps=99999999999999999999", "training.steps must be at most 1000000000"),
    ("train", "training.workers=99999999999", "training.workers must be at most 1000000000"),
]


@pytest.mark.parametrize(("command", "option", "says"), OPTIONS, ids=lambda value: value if "=" in value else "")
def test_an_option_beyond_its_bound_is_refused(command: str, option: str, says: str) -> None:
    tracemalloc.start()
    with pytest.raises(ValueError) as refused:  # noqa: PT011
        job_of(command, ["evaluation.indices=0-1"] * (command == "train") + [option])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert says in str(refused.value)
    assert peak < 50e6


def test_one_range_is_a_range_and_takes_no_memory() -> None:
    assert parse_indices("0-9999999", "seeds") == range(10_000_000)
    assert parse_indices("7, 0-3", "seeds") == [7, 0, 1, 2, 3]
    assert parse_indices(5, "seeds") == range(5, 6)
    with pytest.raises(ValueError, match="seeds contains an index twice: 0-5,3"):
        parse_indices("0-5,3", "seeds")


CALLS: dict[str, Any] = {
    "indices must be in [0, 1000000000), got 99999999999": lambda: blocks(range(100_000_000_000), 64),
    "steps must be at most 1000000, got 100000000000": lambda: TimeGrid.make("uniform", NoiseSchedule.cosine(), 10**11),
    "reference_steps must be at most 1000000": lambda: pilot(None, None, reference_steps=10**11),  # type: ignore[arg-type]
    "calibration may draw at most 100000000 samples, got 100000000000": lambda: calibrate(
        Family([level("xs"), level("s")]), images=10**11
    ),
}


@pytest.mark.parametrize("says", CALLS)
def test_a_call_beyond_its_bound_is_refused(says: str) -> None:
    with pytest.raises(ValueError) as refused:  # noqa: PT011
        CALLS[says]()
    assert says in str(refused.value)


def test_the_largest_seed_trains_and_samples(tmp_path: Path) -> None:
    """Dropout and the order of the data are keyed by it too."""
    options = ("seed=9223372036854775807", "model.dropout=0.1", "training.steps=2")
    printed = run_in(tmp_path, lambda: run_here("train", *PLAIN, *options))
    assert "evaluation" in printed


def test_a_data_set_beyond_its_bound_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="count must be at most 100000000, got 99999999999"):
        prepare("dead_leaves", tmp_path, count=99_999_999_999, progress=False)


# --- too little ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2])
def test_a_training_of_one_or_two_images_is_refused_with_their_number(
    count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(count):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{number}.png")
    monkeypatch.chdir(tmp_path)
    options = ("data=folder", f"data.options.source={tmp_path}", "data.options.size=8", "data.held_out=1")
    with pytest.raises(ValueError, match=rf"has {count} images?: training needs at least 3, 2 of them held out"):
        run_here("train", *PLAIN, *options, "training.steps=1")


@pytest.mark.parametrize(("name", "folder"), [("picture.png", False), ("pictures", True)])
def test_a_folder_of_links_says_that_links_are_not_followed(name: str, folder: bool, tmp_path: Path) -> None:
    real, linked = tmp_path / "real", tmp_path / "linked"
    real.mkdir()
    linked.mkdir()
    Image.new("RGB", (8, 8)).save(real / "picture.png")
    (linked / name).symlink_to(real if folder else real / name)
    with pytest.raises(ValueError, match="no images, only 1 link, and links are not followed: copy the files"):
        prepare("folder", tmp_path / "out", source=str(linked), progress=False)


@pytest.mark.parametrize("spec", [{"budget": 0.4}, {"mse": 1e-3}, {"budget": 0.4, "probabilities": "learned"}], ids=str)
def test_a_family_of_one_level_is_not_told_to_calibrate(spec: dict[str, Any]) -> None:
    family = Family([level("xs")])
    asked = family.fitted.coefficients_for if "probabilities" in spec else family.fitted.calibration_for
    with pytest.raises(ValueError, match="has one level, xs, but plans share work between several: leave out the plan"):
        asked(family)
