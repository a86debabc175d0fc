"""Samples on disk: the right bytes, made once, whatever is killed, and however many ranks there are."""

from __future__ import annotations

import json
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from mlem.family import Family
from mlem.files import read_json, sha256, write_json
from mlem.grids import GRIDS
from mlem.images import quantise
from mlem.level import WEIGHTS
from mlem.outputs import claim, read_png, sample_path, write_samples
from mlem.sampling import Sampler, sample
from mlem.schedule import NoiseSchedule
from mlem.weights import write_weights
from tests.commands import RANKS, finish, run_here, start, start_ranks, succeed

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # of diffusers
    pytest.mark.filterwarnings("ignore:The given NumPy array is not writable:UserWarning"),
]
DDPM = ["root=runs/tiny", "trainer=cpu", "sampler=ddpm", "steps=3", "batch_size=4"]


def images(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("0*.png"))}


@pytest.fixture
def here(trained: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """In the folder with the trained family."""
    monkeypatch.chdir(trained)
    return trained


@pytest.fixture(scope="module")
def ten(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Samples 0-9 of DDPM, made by the command."""
    out = tmp_path_factory.mktemp("ten") / "samples"
    succeed("sample", *DDPM, "seeds=0-9", f"out={out}", cwd=trained)
    return out


@pytest.fixture
def out(ten: Path, tmp_path: Path) -> Path:
    """A copy of them, times of change included."""
    return Path(shutil.copytree(ten, tmp_path / "samples"))


def test_pictures_are_named_by_index_and_hold_the_samples(ten: Path, trained: Path) -> None:
    assert list(images(ten)) == [f"{index:08d}.png" for index in range(10)]
    family = Family.load(trained / "runs/tiny/family")
    made = sample(family, indices=range(4), solver="ddpm", steps=3, batch_size=4)
    stored = torch.stack([read_png(sample_path(ten, index)) for index in range(4)])
    assert torch.equal(quantise(made.x), quantise(stored))
    with Image.open(ten / "grid.png") as grid:
        assert grid.width > 8
    assert not list(ten.glob(".*.tmp"))


def test_the_ledger_tells_true_counts(ten: Path) -> None:
    ledger = json.loads((ten / "ledger.json").read_text())
    assert ledger["images"] == 10
    assert ledger["evaluations"] == 3
    assert list(ledger["levels"]) == ["s"]
    assert ledger["levels"]["s"]["calls"] == ledger["levels"]["s"]["expected_calls"] == 30
    assert 0 < ledger["levels"]["s"]["seconds"] <= ledger["wall_seconds"]


def test_a_rerun_makes_only_what_is_missing(here: Path, out: Path) -> None:
    before, times = images(out), {path: path.stat().st_mtime_ns for path in out.glob("0*.png")}
    for index in (1, 2):
        sample_path(out, index).unlink()
    run_here("sample", *DDPM, "seeds=0-9", f"out={out}")
    assert images(out) == before
    assert {path for path, when in times.items() if path.stat().st_mtime_ns != when} == {
        sample_path(out, 1),
        sample_path(out, 2),
    }
    # the batch that holds them was computed again
    assert json.loads((out / "ledger.json").read_text())["images"] == 14


def test_a_rerun_of_a_whole_folder_does_nothing(here: Path, out: Path, capsys: pytest.CaptureFixture) -> None:
    ledger = (out / "ledger.json").read_bytes()
    run_here("sample", *DDPM, "seeds=0-9", f"out={out}")
    assert "nothing to do" in capsys.readouterr().out
    assert (out / "ledger.json").read_bytes() == ledger


def test_a_longer_range_adds(here: Path, out: Path, tmp_path: Path) -> None:
    before = images(out)
    run_here("sample", *DDPM, "seeds=0-11", f"out={out}")
    after = images(out)
    assert len(after) == 12
    assert {name: after[name] for name in before} == before


def test_other_settings_are_refused_with_both_sides(here: Path, out: Path) -> None:
    before = images(out)
    for option, says in (
        ("steps=2", "steps: 3 there, 2 now"),
        ("seed=1", "seed: 0 there, 1 now"),
        ("level=xs", "level: s there, xs now; weights: "),
        ("sampler=ddim", "solver: ddpm there, ddim now"),
    ):
        with pytest.raises(ValueError, match=says):
            run_here("sample", *DDPM, "seeds=0-11", f"out={out}", option)
    assert images(out) == before


def test_images_of_unknown_origin_are_refused(here: Path, tmp_path: Path) -> None:
    Image.new("L", (8, 8)).save(tmp_path / "00000000.png")
    with pytest.raises(ValueError, match=r"no settings\.json.*choose another out="):
        run_here("sample", *DDPM, "seeds=0-1", f"out={tmp_path}")
    assert [path.name for path in tmp_path.iterdir()] == ["00000000.png"]


def test_killed_and_restarted_gives_the_same_bytes(here: Path, tmp_path: Path) -> None:
    options = ["root=runs/tiny", "trainer=cpu", "level=xs", "steps=50", "batch_size=2", "seeds=0-15"]
    run_here("sample", *options, f"out={tmp_path / 'whole'}")
    whole, out = images(tmp_path / "whole"), tmp_path / "cut"
    with start("sample", *options, f"out={out}", cwd=here) as process:
        while process.poll() is None and len(images(out)) < 3:
            for path in out.glob("*.png"):
                with Image.open(path) as image:
                    image.load()  # raises for half a file
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    cut = images(out)
    assert 3 <= len(cut) < len(whole)
    assert cut == {name: whole[name] for name in cut}
    run_here("sample", *options, f"out={out}")
    assert images(out) == whole


def test_two_ranks_give_the_same_bytes(trained: Path, ten: Path, tmp_path: Path) -> None:
    out = tmp_path / "samples"
    printed = succeed("sample", *DDPM, "seeds=0-9", f"out={out}", *RANKS, cwd=trained)
    assert images(out) == images(ten)
    ledger = json.loads((out / "ledger.json").read_text())
    assert (ledger["images"], ledger["levels"]["s"]["calls"]) == (10, 30)
    assert printed.count("level s, 3 network calls each") == 1


def test_two_ranks_report_a_failure_once(trained: Path, tmp_path: Path) -> None:
    family = Path(shutil.copytree(trained / "runs/tiny/family", tmp_path / "family"))
    damage(family / "level_s")
    options = [*DDPM, "seeds=0-7", f"family={family}", f"out={tmp_path / 'out'}"]
    done = [finish(process) for process in start_ranks("sample", *options, cwd=trained)]
    assert all(one.returncode == 2 for one in done)
    said = "".join(one.stderr for one in done)
    ours = [line for line in said.splitlines() if line.startswith("sample.py: ")]
    assert len(ours) == 1
    assert "sample 0 became NaN or infinite at step 1 of 3" in ours[0]
    assert "Traceback" not in said


def damage(level: Path) -> None:
    """Weights that are finite, but so large that images are not."""
    about = read_json(level / "mlem.json")
    weights = {
        name: torch.full_like(tensor, 1e38)
        for name, tensor in Family.load(level.parent).levels[-1].network.state_dict().items()
    }
    write_weights(level / WEIGHTS, weights)
    write_json(level / "mlem.json", about | {"sha256": sha256(level / WEIGHTS)})


def test_a_level_a_model_and_a_family_can_be_named(here: Path, tmp_path: Path) -> None:
    common = ["root=runs/tiny", "trainer=cpu", "steps=2", "seeds=0-1"]
    run_here("sample", *common, "model=unet_xs", f"out={tmp_path / 'model'}")
    run_here("sample", *common, "level=xs", f"out={tmp_path / 'level'}")
    run_here("sample", *common, "family=runs/tiny/family", f"out={tmp_path / 'family'}")
    assert images(tmp_path / "model") == images(tmp_path / "level") != images(tmp_path / "family")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["level=m"], "level must be one of xs, s, got 'm'"),
        (["model=unet_xs", "level=xs"], "leave out level=xs"),
        (["model=unet_xs", "family=x"], "leave out family=x"),
        (["model=unet_m"], "make it with: python train.py model=unet_m"),
        (["family=nowhere"], "nowhere holds no family"),
        (["grid=karas"], f"grid must be one of {', '.join(GRIDS)}, got 'karas'"),
        (["sampler.solver=ddmp"], "did you mean ddpm?"),
        (["sampler.solver=diffusers:DDDIM"], "diffusers has no scheduler 'DDDIM'"),
        (["grid=trailing", "steps=1001"], "steps must be in [1, 1000] on the trailing grid, got 1001"),
        (["seeds=3-1"], "seeds must be ranges such as 0-63"),
        (["seeds=a"], "seeds must be ranges such as 0-63"),
    ],
)
def test_bad_choices_leave_nothing_behind(here: Path, tmp_path: Path, options: list[str], says: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        run_here("sample", "root=runs/tiny", "trainer=cpu", f"out={tmp_path / 'out'}", *options)
    assert says in str(error.value)
    assert not list(tmp_path.iterdir())


def test_a_diffusers_scheduler_samples(here: Path, tmp_path: Path) -> None:
    run_here("sample", "root=runs/tiny", "trainer=cpu", "sampler=diffusers", "steps=3", "seeds=0-2", f"out={tmp_path}")
    assert len(images(tmp_path)) == 3
    assert json.loads((tmp_path / "ledger.json").read_text())["levels"]["s"]["calls"] == 9


def test_one_sample_that_is_nan_does_not_spoil_the_others(tmp_path: Path) -> None:
    schedule, options = NoiseSchedule.cosine(), {"solver": "ddim", "steps": 3, "shape": (1, 8, 8)}
    sound = Sampler(lambda x, t: 0.5 * x, schedule=schedule, **options)
    victim = sound.start(torch.tensor([5]))[0, 0, 0, 0]

    def denoiser(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        ill = (x[:, 0, 0, 0] - victim).abs() < 1e-6
        return torch.where(ill[:, None, None, None], torch.nan, 0.5 * x)

    broken = Sampler(denoiser, schedule=schedule, **options)
    claim(tmp_path / "broken", {})
    ledger, failure, _ = write_samples(broken, range(10), tmp_path / "broken", batch_size=4)
    write_samples(sound, range(10), tmp_path / "sound", batch_size=4)
    assert ledger.images == 10
    assert "sample 5 became NaN or infinite at step 1 of 3 (t = 1), level model" in str(failure)
    good = images(tmp_path / "sound")
    del good["00000005.png"]
    assert images(tmp_path / "broken") == good
    # and the run can be finished once the fault is mended
    write_samples(sound, range(10), tmp_path / "broken", batch_size=4)
    assert images(tmp_path / "broken") == images(tmp_path / "sound")
