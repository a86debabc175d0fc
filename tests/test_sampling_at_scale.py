"""Two thousand samples on several ranks, killed again and again: the bytes of one rank left alone."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from diffusers.models.unets.unet_2d import UNet2DModel

from mlem.family import Level
from mlem.files import read_json
from mlem.outputs import png_tree, verify
from mlem.outputs.images import sample_indices
from mlem.schedule import NoiseSchedule
from tests.commands import REPOSITORY, environment, run_here, succeed, wait_until

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # of diffusers
    pytest.mark.filterwarnings("ignore:The given NumPy array is not writable:UserWarning"),
]
COUNT = 2000
OPTIONS = ["root=runs", "model=unet_xs", "sampler=ddpm", "batch_size=50"]
MANY = [*OPTIONS, "steps=2", f"seeds=0-{COUNT - 1}"]


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a level of a few thousand untrained weights, 8x8."""
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "add_attention": False}
    sizes = {"sample_size": 8, "block_out_channels": (8,), "layers_per_block": 1, "norm_num_groups": 4}
    network = UNet2DModel(in_channels=1, out_channels=1, **sizes, **blocks)
    folder = tmp_path_factory.mktemp("scale")
    Level("xs", network, NoiseSchedule.cosine(), (1, 8, 8), data="digits").save(folder / "runs/unet_xs/level")
    return folder


def ranks(count: int) -> list[str]:
    return ["trainer=ddp", "trainer.accelerator=cpu", f"trainer.devices={count}"]


def started(script: str, *options: str, here: Path, **extra: str) -> subprocess.Popen[bytes]:
    """The command as the leader of a process group of its own."""
    command = [sys.executable, str(REPOSITORY / script), *options]
    return subprocess.Popen(command, cwd=here, env=environment(**extra), start_new_session=True)


def images(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in png_tree(folder)}


def test_killed_three_times_on_two_and_three_ranks(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(here)
    cut, whole = here / "cut", here / "whole"
    done, moments = 0, random.Random(0)
    for count in (2, 3, 2):
        moment = moments.randrange(1, (COUNT - done) // (2 * count))  # counted by each rank for itself
        with started("tests/killed.py", *MANY, *ranks(count), f"out={cut}", here=here, KILL_AT=str(moment)) as process:
            process.wait(timeout=300)
        assert process.returncode == -signal.SIGKILL
        before, done = done, len(sample_indices(cut))
        assert before + moment - 1 <= done < COUNT
        assert list(cut.rglob(".*.tmp"))  # killed in the middle of writing
    printed = succeed("sample", *MANY, *ranks(2), f"out={cut}", "format=npz", cwd=here)
    assert f"{done} of {COUNT} images are there already" in printed
    assert verify(cut) == (COUNT, {})
    run_here("sample", *MANY, "trainer=cpu", f"out={whole}", "format=npz")
    undisturbed = images(whole)
    assert len(undisturbed) == COUNT
    assert images(cut) == undisturbed
    for name in ("images.sha256", "manifest.json", "samples.npz", "grid.png"):
        assert (cut / name).read_bytes() == (whole / name).read_bytes(), name
    assert not list(cut.rglob(".*.tmp"))
    # what the killed runs spent is not in the ledger of the last one
    assert read_json(cut / "ledger.json")["images"] < COUNT


def test_no_rank_stays_behind_when_the_first_is_killed(here: Path) -> None:
    out = here / "left"
    long = [*OPTIONS, "steps=1000", "seeds=0-99999", f"out={out}"]
    with started("sample.py", *long, *ranks(2), here=here) as process:
        wait_until(lambda: len(sample_indices(out)) > 0, process, seconds=600)
        process.kill()
        process.wait()
        deadline = time.monotonic() + 30
        while group_lives(process.pid):
            assert time.monotonic() < deadline, "the second rank goes on alone"
            time.sleep(0.05)


def group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
