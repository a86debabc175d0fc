"""Two thousand samples on several ranks, killed again and again: the bytes of one rank left alone."""

from __future__ import annotations

import itertools
import os
import random
import select
import signal
import time
import traceback
from pathlib import Path
from typing import Any, Never

import pytest
import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from torch.distributed import TCPStore

from mlem.family import Family
from mlem.files import read_json
from mlem.level import Level
from mlem.multilevel.candidate import Recommendation
from mlem.outputs import png_tree, verify
from mlem.outputs.images import sample_indices
from mlem.schedule import NoiseSchedule
from tests.commands import run_here

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # of diffusers
    pytest.mark.filterwarnings("ignore:The given NumPy array is not writable:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning"),
]
COUNT = 2000
STORES: dict[int, TCPStore] = {}
"""Where the ranks of a leader meet: kept open here as torchrun does it, so that nobody else can take the port."""
OPTIONS = ["root=runs", "model=unet_xs", "sampler=ddpm"]
MANY = [*OPTIONS, "batch_size=50", "steps=2", f"seeds=0-{COUNT - 1}", "format=npz"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """In a folder with a level of a few thousand untrained weights, 8x8."""
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "add_attention": False}
    sizes = {"sample_size": 8, "block_out_channels": (8,), "layers_per_block": 1, "norm_num_groups": 4}
    network = UNet2DModel(in_channels=1, out_channels=1, **sizes, **blocks)
    Level("xs", network, NoiseSchedule.cosine(), (1, 8, 8), data="digits").save(tmp_path / "runs/unet_xs/level")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def start_ranks(count: int, *options: str, kill_at: int | None = None) -> int:
    """The command on gloo ranks as torchrun starts them, a process group of its own; returns its leader, rank 0.

    Forked, since to import everything for each would take ten times as long. kill_at: the group is killed when one of
    the ranks is about to finish its image of this number.
    """
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    leader = os.fork()
    if leader == 0:
        os.setsid()
        rank = next((rank for rank in range(1, count) if os.fork() == 0), 0)
        about = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "GROUP_RANK": 0}
        about |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port, "TORCHELASTIC_RUN_ID": "test"}
        about |= {"TORCHELASTIC_USE_AGENT_STORE": True}
        os.environ |= {key: str(value) for key, value in about.items()}
        if kill_at is not None:
            die_at(kill_at)
        run_and_exit("trainer=ddp", "trainer.accelerator=cpu", f"trainer.devices={count}", *options)
    STORES[leader] = store
    return leader


def die_at(number: int) -> None:
    """Kill the process group in the middle of writing this image, when it is only to be renamed."""
    written, replace = itertools.count(1), os.replace

    def deadly(source: Any, target: Any) -> None:
        if str(target).endswith(".png") and next(written) == number:
            os.killpg(0, signal.SIGKILL)
        replace(source, target)

    os.replace = deadly


def run_and_exit(*options: str) -> Never:
    code = 1
    try:
        run_here("sample", *options)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def status(leader: int, seconds: float = 240) -> int:
    """The exit code; a group that takes longer is killed."""
    deadline = time.monotonic() + seconds
    while not (ended := os.waitpid(leader, os.WNOHANG))[0]:
        if time.monotonic() > deadline:
            os.killpg(leader, signal.SIGKILL)
            os.waitpid(leader, 0)
            pytest.fail(f"the ranks were not done after {seconds} s")
        time.sleep(0.005)
    return os.waitstatus_to_exitcode(ended[1])


def images(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in png_tree(folder)}


def test_killed_three_times_on_two_and_three_ranks(here: Path) -> None:
    cut, whole = here / "cut", here / "whole"
    done, moments = 0, random.Random(0)
    for count in (2, 3, 2):
        moment = moments.randrange(1, (COUNT - done) // (2 * count))  # each rank counts for itself
        assert status(start_ranks(count, *MANY, f"out={cut}", kill_at=moment)) == -signal.SIGKILL
        before, done = done, len(sample_indices(cut))
        assert before + moment - 1 <= done < COUNT
        assert list(cut.rglob(".*.tmp"))
    assert status(start_ranks(2, *MANY, f"out={cut}")) == 0
    assert verify(cut) == (COUNT, {})
    run_here("sample", *MANY, "trainer=cpu", f"out={whole}")
    undisturbed = images(whole)
    assert len(undisturbed) == COUNT
    assert images(cut) == undisturbed
    for name in ("images.sha256", "manifest.json", "samples.npz", "grid.png"):
        assert (cut / name).read_bytes() == (whole / name).read_bytes(), name
    assert not list(cut.rglob(".*.tmp"))
    # only the last run lived to write down what it spent
    assert COUNT - done <= read_json(cut / "ledger.json")["images"] < COUNT


def test_the_first_rank_chooses_for_all(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`sampler=auto` times levels that were calibrated elsewhere, and ranks measure different times."""

    def recommend(*_: object, **asked: object) -> Recommendation:
        steps = 2 + int(os.environ.get("RANK", "0"))
        return Recommendation("ddim", steps, "log_snr", "xs", None, 0.1, (0.1, 0.1), 1.0)

    monkeypatch.setattr(Family, "recommend", recommend)
    Family([Level.load(here / "runs/unet_xs/level")]).save(here / "family")
    options = ["root=runs", f"family={here}/family", "sampler=auto", "mse=1", "batch_size=2", "seeds=0-7"]
    assert status(start_ranks(2, *options, f"out={here}/several")) == 0
    run_here("sample", *options, "trainer=cpu", f"out={here}/one")
    assert len(images(here / "one")) == 8
    assert images(here / "several") == images(here / "one")


def test_no_rank_stays_behind_when_the_first_is_killed(here: Path) -> None:
    out, (gone, alive) = here / "left", os.pipe()  # which ends when the last process that inherits it does
    leader = start_ranks(2, *OPTIONS, "batch_size=2", "steps=500", "seeds=0-99999", f"out={out}")
    os.close(alive)
    deadline = time.monotonic() + 120
    while not sample_indices(out):
        assert not select.select([gone], [], [], 0.01)[0], "it ended first"
        if time.monotonic() > deadline:
            os.killpg(leader, signal.SIGKILL)
            pytest.fail("no sample after 120 s")
    os.kill(leader, signal.SIGKILL)
    assert status(leader) == -signal.SIGKILL
    assert select.select([gone], [], [], 30)[0], "the second rank goes on alone"
    os.close(gone)
