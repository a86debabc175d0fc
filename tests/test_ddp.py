"""Training on two gloo ranks: the run of one rank, and no rank left behind when another dies."""

from __future__ import annotations

import os
import shutil
import signal
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from mlem.files import read_json, write_json
from tests.commands import PLAIN, RANKS, TRAIN, metrics, start, start_ranks, succeed, succeed_ranks, wait_until
from tests.forkserver import children

RUN = Path("runs/digits/unet_xs")
OPTIONS = (*PLAIN, "training.steps=20", "training.epoch_steps=10", "training.checkpoint_every=10")


def test_two_ranks_train_what_one_does(tmp_path: Path) -> None:
    """The global batch, its noise and its times are the same; only the order of sums differs."""
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir(), two.mkdir()  # type: ignore[func-returns-value]
    succeed("train", *OPTIONS, cwd=one)
    succeed_ranks("train", *OPTIONS, cwd=two)  # Lightning's own launcher is that of the test below
    weights = [load_file(folder / RUN / "level" / "diffusion_pytorch_model.safetensors") for folder in (one, two)]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=0, atol=2e-4, msg=name)
    errors = [
        [line["val/error"] for line in metrics(folder / RUN / "metrics.jsonl") if "val/error" in line]
        for folder in (one, two)
    ]
    assert len(errors[0]) == 3  # two epochs, and the export
    torch.testing.assert_close(errors[1], errors[0], rtol=1e-4, atol=0)


def test_a_killed_rank_ends_the_run(tmp_path: Path) -> None:
    """Rank 1 is killed: rank 0 ends non-zero within 30 s, and the same command resumes."""
    options = (*OPTIONS, "training.steps=3000")
    process = start("train", *options, *RANKS, cwd=tmp_path)
    checkpoints = tmp_path / RUN / "checkpoints"
    wait_until(lambda: any(checkpoints.glob("*.sha256")), process)
    ranks = [child for child in children(process.pid) if "train.py" in Path(f"/proc/{child}/cmdline").read_text()]
    assert len(ranks) == 1
    os.kill(ranks[0], signal.SIGKILL)
    begin = time.monotonic()
    process.communicate(timeout=60)
    assert time.monotonic() - begin < 30
    assert process.returncode != 0
    before = max(path.name for path in checkpoints.glob("*.ckpt"))
    again = start_ranks("train", *options, cwd=tmp_path)
    wait_until(lambda: max(path.name for path in checkpoints.glob("*.ckpt")) > before, again[0])
    for rank in again:
        rank.kill()
    assert "resuming from" in "".join(rank.communicate()[0] for rank in again)


def test_ranks_wait_for_a_family_that_is_only_to_be_written(made: tuple[Path, str], tmp_path: Path) -> None:
    """All levels are trained, so that no training has brought the ranks together, as torchrun starts them."""
    shutil.copytree(made[0], tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "runs/digits/family")
    for level in ("xs", "s"):
        path = tmp_path / f"runs/digits/unet_{level}/settings.json"
        write_json(path, read_json(path) | {"world_size": 2})
    succeed_ranks("tests/few_pilots", *TRAIN, cwd=tmp_path)
    assert (tmp_path / "runs/digits/family/calibration.json").exists()
