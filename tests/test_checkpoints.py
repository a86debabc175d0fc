"""Checkpoints: damage is named, nothing finished is lost, and nothing in a file is executed."""

from __future__ import annotations

import os
import pickle
import resource
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mlem import Family
from mlem.cli.resume import check_resume, resume_point
from mlem.files import read_json, sha256, write_text
from mlem.training.checkpoint_files import AtomicCheckpointIO, check, saved, steps_of
from mlem.training.checkpoints import Checkpoints
from tests.commands import PLAIN, execute, execute_code, run_here, run_in, start, succeed, wait_until

RUN = Path("runs/digits/unet_xs")
OPTIONS = (*PLAIN, "training.steps=20", "training.epoch_steps=10", "training.checkpoint_every=5")


def _save(path: Path, value: float = 1.0) -> Path:
    AtomicCheckpointIO().save_checkpoint({"state_dict": {"w": torch.full((100,), value)}}, path)
    return path


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def _empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [_truncate, _flip, _empty])
def test_damage_is_named_and_the_one_before_offered(tmp_path: Path, damage: object) -> None:
    good, bad = _save(tmp_path / "step-00000005.ckpt"), _save(tmp_path / "step-00000010.ckpt")
    damage(bad)  # type: ignore[operator]
    with pytest.raises(ValueError, match=r"step-00000010.ckpt is damaged.*resume=.*step-00000005.ckpt"):
        check(bad)
    with pytest.raises(ValueError, match="damaged"):
        AtomicCheckpointIO().load_checkpoint(bad)
    assert AtomicCheckpointIO().load_checkpoint(good)["state_dict"]["w"].sum() == 100


def test_one_without_checksum_does_not_count(tmp_path: Path) -> None:
    first, second = _save(tmp_path / "step-00000005.ckpt"), _save(tmp_path / "step-00000010.ckpt")
    (tmp_path / "step-00000010.ckpt.sha256").unlink()
    assert saved(tmp_path) == [first]
    with pytest.raises(ValueError, match="never finished"):
        check(second)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        check(tmp_path / "step-00000099.ckpt")


class _Payload:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch executed",)


def test_a_pickle_is_not_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "step-00000005.ckpt"
    torch.save({"state_dict": _Payload()}, path)
    write_text(path.with_name(path.name + ".sha256"), sha256(path) + "\n")
    with pytest.raises(pickle.UnpicklingError, match=r"[Ww]eights.only"):
        AtomicCheckpointIO().load_checkpoint(path)
    with pytest.raises(ValueError, match=r"\Astep-00000005.ckpt is not a training checkpoint [^\n]*\Z"):
        steps_of(Path(path.name), {})
    assert not (tmp_path / "executed").exists()


def test_a_checksum_that_is_no_text_is_of_a_damaged_checkpoint(tmp_path: Path) -> None:
    path = _save(tmp_path / "step-00000005.ckpt")
    path.with_name(path.name + ".sha256").write_bytes(b"\xb5" * 64)
    with pytest.raises(ValueError, match=rf"^checkpoint {path} is damaged"):
        check(path)


def test_a_full_disk_keeps_the_old_checkpoint(tmp_path: Path) -> None:
    """The limit on file size stands for a full disk; in a child, since a limit cannot be raised again."""
    path = _save(tmp_path / "step-00000005.ckpt")
    before = path.read_bytes()
    code = (
        "import resource, signal, sys, torch\n"
        "from mlem.training.checkpoint_files import AtomicCheckpointIO\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "AtomicCheckpointIO().save_checkpoint({'w': torch.zeros(100_000)}, sys.argv[1])\n"
    )
    done = execute_code(code, str(path))
    assert done.returncode != 0
    assert f"OSError: {path} cannot be written (File too large); make room there, then run" in done.stderr
    assert path.read_bytes() == before
    assert check(path) == path
    assert sorted(file.name for file in tmp_path.iterdir()) == [path.name, path.name + ".sha256"]
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 4096


def test_seconds_of_all_processes_are_added(tmp_path: Path) -> None:
    first, second = Checkpoints(tmp_path, 1), Checkpoints(tmp_path, 1)
    first.load_state_dict({"seconds": 1000.0})
    second.load_state_dict(first.state_dict())
    assert 1000 < first.seconds <= second.seconds + 1 < 1100


def test_every_must_be_positive(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"training.checkpoint_every must be >= 1, got 0"):
        Checkpoints(tmp_path, 0)


def test_a_diverged_training_stops_and_keeps_what_was_good(tmp_path: Path) -> None:
    spoilt = ("callbacks=[{_target_: tests.dying.Spoiling, at: 8}]", "allow=[tests]")
    says = (
        r"at step 10 the weights are not finite; lower training\.learning_rate=0\.002; "
        r"\S+/checkpoints/step-00000005\.ckpt is kept: resume=force continues from it"
    )
    with pytest.raises(FloatingPointError, match=says):
        run_in(tmp_path, lambda: run_here("train", *OPTIONS, *spoilt))
    assert [path.name for path in saved(tmp_path / RUN / "checkpoints")] == ["step-00000005.ckpt"]


def test_an_absurd_learning_rate_is_named(tmp_path: Path) -> None:
    absurd = ("training.learning_rate=1e12", "training.gradient_clip=0")
    with pytest.raises(FloatingPointError, match=r"step 5 .* lower training\.learning_rate=1e\+12; there is no ear"):
        run_in(tmp_path, lambda: run_here("train", *OPTIONS, *absurd))
    assert not (tmp_path / RUN / "level").exists()


def test_ranks_agree_that_training_diverged(tmp_path: Path) -> None:
    """A rank with finite weights ends too, and leaves the line to rank 0."""
    strategy = SimpleNamespace(reduce_boolean_decision=lambda mine, all: False)
    trainer: Any = SimpleNamespace(strategy=strategy, is_global_zero=False, global_step=1)
    with pytest.raises(SystemExit) as left:
        Checkpoints(tmp_path, 1)._check_finite(trainer, torch.nn.Linear(1, 1))  # type: ignore[arg-type]
    assert left.value.code == 2


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    succeed("train", *OPTIONS, cwd=folder)
    return folder


def _reopen(folder: Path) -> None:
    """Make the run unfinished again, so that it resumes from its last checkpoint."""
    (folder / RUN / "level" / "mlem.json").unlink(missing_ok=True)


def test_the_last_two_are_kept(finished: Path) -> None:
    names = [path.name for path in saved(finished / RUN / "checkpoints")]
    assert names == ["step-00000020.ckpt", "step-00000015.ckpt"]


@pytest.mark.parametrize(
    ("option", "shown"),
    [
        ("seed=1", "seed: 0 there, 1 now"),
        ("training.batch_size=32", "training.batch_size: 16 there, 32 now"),
        ("model.dropout=0.5", "model.dropout: 0.0 there, 0.5 now"),
        ("schedule=linear", "schedule.kind: cosine there, linear now"),
    ],
)
def test_other_settings_are_refused(finished: Path, option: str, shown: str) -> None:
    options = (*OPTIONS, "training.batch_size=16") if "batch" not in option else OPTIONS
    done = execute("train", *options, option, cwd=finished)
    assert done.returncode == 2
    assert shown in done.stderr
    assert "resume=force" in done.stderr
    assert done.stderr.count("\n") == 1


def _forced(folder: Path, *options: str) -> None:
    run_in(folder, lambda: run_here("train", *OPTIONS, "resume=force", *options))


def test_force_leaves_a_finished_run_alone(finished: Path) -> None:
    settings = finished / RUN / "settings.json"
    before = settings.read_text()
    for options in (["training.learning_rate=0.001"], ["training.steps=19"]):
        with pytest.raises(ValueError, match=r"step-00000020\.ckpt already has 20 steps: training\.steps=\d+ leaves"):
            _forced(finished, *options)
    assert settings.read_text() == before


def test_force_trains_more_steps_with_the_new_rate(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    more = ("training.steps=24", "training.learning_rate=0.001", "training.weight_decay=0.5")
    ending = ("callbacks=[{_target_: tests.dying.Ending, hook: on_train_batch_end, at: 22}]", "allow=[tests]")
    with pytest.raises(RuntimeError, match="the end"):
        _forced(tmp_path, *more, *ending)
    assert "resuming from" in run_in(tmp_path, lambda: run_here("train", *OPTIONS, *more))  # not "already trained"
    checkpoint = torch.load(tmp_path / RUN / "checkpoints" / "step-00000024.ckpt", weights_only=True)
    assert checkpoint["lr_schedulers"][0]["base_lrs"] == [0.001]
    group = checkpoint["optimizer_states"][0]["param_groups"][0]
    assert (group["lr"], group["weight_decay"]) == (pytest.approx(0.001 * 25 / 50), 0.5)  # in the warm-up
    assert read_json(tmp_path / RUN / "level" / "mlem.json")["measured"]["steps"] == 24
    assert read_json(tmp_path / RUN / "settings.json")["training"]["learning_rate"] == 0.001


def test_levels_of_a_family_have_their_own_steps(tmp_path: Path) -> None:
    """As if each had been trained alone."""
    family = [*OPTIONS[1:], "model=family", "model.levels=[xs,s]", "model.level_steps=[3,2]"]
    run_in(tmp_path, lambda: run_here("train", *family))
    steps = {
        size: read_json(tmp_path / f"runs/digits/unet_{size}/level/mlem.json")["measured"]["steps"]
        for size in ("xs", "s")
    }
    assert steps == {"xs": 3, "s": 2}
    alone = [*OPTIONS[1:], "model=unet_xs", "training.steps=3"]
    assert "xs: already trained" in run_in(tmp_path, lambda: run_here("train", *alone))
    again = run_in(tmp_path, lambda: run_here("train", *family))
    assert "xs: already trained" in again
    assert "s: already trained" in again
    with pytest.raises(ValueError, match=r"training\.steps: 3 there, 4 now"):
        run_in(tmp_path, lambda: run_here("train", *family, "model.level_steps=[4,2]"))
    assert "for 7 steps of 16 images" in run_in(
        tmp_path, lambda: run_here("train", *family, "model.level_steps=[7,2]", "dry_run=true")
    )


def test_smaller_levels_learn_from_the_largest(tmp_path: Path) -> None:
    """It is trained first, as if alone; a run that ends in between gives the same small level."""
    places = {name: tmp_path / name for name in ("whole", "resumed")}
    for place in places.values():
        place.mkdir()
    levels = ("model=family", "model.levels=[xs,s]", "model.level_steps=[4,2]", "model.distillation_steps=3")
    family = [*OPTIONS[1:-1], "training.checkpoint_every=2", *levels]
    ending = ("callbacks=[{_target_: tests.dying.Ending, hook: on_train_batch_end, at: 3}]", "allow=[tests]")
    told = run_in(places["whole"], lambda: run_here("train", *family, "dry_run=true"))
    assert "for 4 steps of 16 images" in told
    run_in(places["whole"], lambda: run_here("train", *family))
    with pytest.raises(RuntimeError, match="the end"):
        run_in(places["resumed"], lambda: run_here("train", *family, *ending))
    said = run_in(places["resumed"], lambda: run_here("train", *family))
    assert said.index("s: already trained") < said.index("xs: resuming from")
    plain = [*OPTIONS[1:-1], "training.checkpoint_every=2", "model=family", "model.levels=[xs,s]"]
    with pytest.raises(ValueError, match=r"unet_xs holds .*\(model\.distillation_steps: 3 there, 0 now"):
        run_in(places["whole"], lambda: run_here("train", *plain, "model.level_steps=[4,2]"))
    hashes = {name: Family.load(place / "runs/digits/family").weights_hash for name, place in places.items()}
    assert hashes["whole"] == hashes["resumed"]


def test_what_resume_may_be(finished: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(finished)
    with pytest.raises(ValueError, match=r"resume must be auto, force or the path of a checkpoint, got 'Auto'"):
        run_here("train", *OPTIONS, "resume=Auto")
    other = shutil.copy(RUN / "checkpoints" / "step-00000015.ckpt", tmp_path)
    with pytest.raises(
        ValueError, match=r"is not a checkpoint of this run: name one in runs/digits/unet_xs/checkpoints"
    ):
        run_here("train", *OPTIONS, f"resume={other}")


def test_a_path_is_for_its_own_level_alone(tmp_path: Path) -> None:
    """The other level goes on from its own newest; the step is the checkpoint's own, whatever the file is called."""
    for name, shape in (("s", 3), ("m", 2)):
        for step in (5, 10):
            state = {"state_dict": {"w": torch.zeros(shape)}, "global_step": step}
            AtomicCheckpointIO().save_checkpoint(state, tmp_path / name / "checkpoints" / f"step-{step:08d}.ckpt")
    (tmp_path / "s/checkpoints/step-00000005.ckpt").rename(tmp_path / "s/checkpoints/mine.ckpt")
    (tmp_path / "s/checkpoints/step-00000005.ckpt.sha256").rename(tmp_path / "s/checkpoints/mine.ckpt.sha256")
    mine = str(tmp_path / "s" / "checkpoints" / "mine.ckpt")
    check_resume(mine, [tmp_path / "s", tmp_path / "m"])
    asked, weights = ("training.steps", 20), {"s": {"w": torch.zeros(3)}, "m": {"w": torch.zeros(2)}}
    assert resume_point(mine, tmp_path / "s", weights["s"], asked, []) == (Path(mine), 5)
    assert resume_point(mine, tmp_path / "m", weights["m"], asked, [])[1] == 10
    wrong = r"does not fit the model: w \[2\] there, \[3\] now; give the model options"
    with pytest.raises(ValueError, match=wrong):
        resume_point(mine, tmp_path / "m", weights["s"], asked, [])


def test_damage_stops_the_command_and_its_remedy_works(finished: Path) -> None:
    _reopen(finished)
    _flip(finished / RUN / "checkpoints" / "step-00000020.ckpt")
    done = execute("train", *OPTIONS, cwd=finished)
    assert done.returncode == 2
    remedy = next(word for word in done.stderr.split() if word.startswith("resume="))
    assert "step-00000015" in remedy
    succeed("train", *OPTIONS, remedy, cwd=finished)
    assert (finished / RUN / "level" / "mlem.json").exists()


def test_the_second_run_in_a_folder_is_refused(tmp_path: Path) -> None:
    first = start("train", *OPTIONS, "training.steps=5000", cwd=tmp_path)
    wait_until(lambda: any((tmp_path / RUN / "checkpoints").glob("*.ckpt")), first)
    second = execute("train", *OPTIONS, "training.steps=5000", cwd=tmp_path)
    first.kill()
    first.communicate()
    assert second.returncode == 2
    assert "in use by another run" in second.stderr
