"""`python train.py model=coefficients`: end to end, killed and resumed, on two ranks, and with bad options."""

from __future__ import annotations

import contextlib
import io
import math
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mlem.cli.compose import plain
from mlem.cli.options import check
from mlem.cli.paths import family_folder
from mlem.family import Family
from mlem.files import read_json, read_object, write_json, write_record
from mlem.level import Level
from mlem.multilevel.learning import first_order
from mlem.multilevel.spec import PlanSpec
from mlem.networks import unet
from mlem.sampling import Sampler
from mlem.schedule import NoiseSchedule
from mlem.training.coefficients import CoefficientsModule, Fit, replicates
from tests.commands import configure, execute, metrics, reached, run_here, start, succeed_ranks, wait_until
from tests.test_learn import calibrated_family, objective

OPTIONS = (
    "model=coefficients",
    "trainer=cpu",
    "logger=jsonl",
    "model.steps=4",
    "model.budget=0.6",
    "model.updates=8",
    "model.batch_size=2",
    "model.images=4",
    "model.draws=2",
    "model.held_out=4",
    "model.checkpoint_every=2",
    "evaluation.reference_steps=6",
)
RUN = Path("runs/digits/coefficients")
FAMILY = Path("runs/digits/family")


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A family with random weights: nothing here depends on how well it was trained."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("family")
    schedule, shape = NoiseSchedule.cosine(), (1, 8, 8)
    Family([Level(size, unet(size, shape), schedule, shape, data="digits") for size in ("xs", "s")]).save(folder)
    return folder


def _place(family: Path, folder: Path) -> Path:
    shutil.copytree(family, folder / FAMILY)
    return folder


def _run_in(folder: Path, *options: str) -> str:
    """The command in this process, from `folder`: what it prints."""
    with contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()) as printed:
        run_here("train", *OPTIONS, *options)
    return printed.getvalue()


@pytest.fixture(scope="module")
def learned(family: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder in which coefficients were learned, and what was printed."""
    folder = _place(family, tmp_path_factory.mktemp("learned"))
    return folder, _run_in(folder)


def _learned(folder: Path) -> dict[str, Any]:
    return read_json(folder / FAMILY / "coefficients.json")


def test_the_command_learns_and_hands_over(learned: tuple[Path, str]) -> None:
    folder, printed = learned
    found = _learned(folder)
    about, held_out = found["about"], found["about"]["held_out"]
    assert found["levels"] == ["xs", "s"]
    assert (found["alpha"][0], found["beta"][0]) == ([0.0] * 9, 40.0)
    assert (about["solver"], about["steps"], about["grid"], about["reference_steps"]) == ("ddpm", 4, "log_snr", 6)
    assert about["log_snr"][0] < about["log_snr"][1]
    assert about["lambda"] > 0
    assert about["weights"] == Family.load(folder / FAMILY).weights_hash
    for coins in ("systematic", "bernoulli"):
        one = held_out[coins]
        assert one["before"]["cost"] == pytest.approx(0.6, abs=1e-6)
        change = one["after"]["objective"] - one["before"]["objective"]
        assert one["change"]["objective"] == pytest.approx(change, abs=1e-9)
        learned = one["after"]["objective"] - one["start"]["objective"]
        assert one["learned"]["objective"] == pytest.approx(learned, abs=1e-9)
        assert (one["learned"]["half_width"] > 0) is about["validated"]["kept"]
        assert one["after"]["objective"] == one["after"]["mse"] + about["lambda"] * one["after"]["cost"]
    line = next(line for line in printed.splitlines() if line.startswith("coefficients: objective"))
    assert f"{held_out['systematic']['after']['objective']:.4g}" in line
    assert "95 percent" in line
    assert (folder / RUN / "probabilities.png").stat().st_size > 1000


def test_what_is_logged(learned: tuple[Path, str]) -> None:
    lines = metrics(learned[0] / RUN / "metrics.jsonl")
    steps = [line for line in lines if "objective" in line]
    assert [line["step"] for line in steps] == list(range(8))
    weight = _learned(learned[0])["about"]["lambda"]
    for line in steps:
        assert line["objective"] == pytest.approx(line["mse"] + weight * line["cost"], rel=1e-9)
        assert 0 < line["p/s/t0.5"] < 1
    assert any(line["alpha/s"] != steps[0]["alpha/s"] for line in steps)
    assert lines[-1]["held_out/objective_after"] == pytest.approx(
        _learned(learned[0])["about"]["held_out"]["systematic"]["after"]["objective"]
    )


def test_a_checkpoint_holds_the_coefficients_alone(learned: tuple[Path, str]) -> None:
    path = learned[0] / RUN / "checkpoints" / "step-00000008.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    assert set(checkpoint["state_dict"]) == {"alpha", "beta", "weight"}
    assert len(checkpoint["optimizer_states"][0]["state"]) == 2
    assert path.stat().st_size < 20_000


def test_a_plan_with_learned_probabilities_samples(learned: tuple[Path, str]) -> None:
    family = Family.load(learned[0] / FAMILY)
    plan = PlanSpec(probabilities="learned", estimator="jump")
    result = Sampler(family, solver="ddpm", steps=4, grid="log_snr", plan=plan).run(range(2))
    assert torch.isfinite(result.x).all()
    family.levels[0].network.conv_in.weight.data += 1  # type: ignore[operator, union-attr]
    with pytest.raises(ValueError, match=r"weights or guidance; fit them again: python train\.py model=coefficients"):
        Sampler(Family(family.levels, family.fitted), solver="ddpm", steps=4, plan=plan)


def test_a_finished_run_is_left_alone(learned: tuple[Path, str]) -> None:
    folder, printed = learned
    before = (folder / RUN / "coefficients.json").stat().st_mtime_ns
    (folder / FAMILY / "coefficients.json").unlink()
    again = _run_in(folder)
    assert "already learned" in again
    assert printed.splitlines()[-3] in again
    assert (folder / RUN / "coefficients.json").stat().st_mtime_ns == before
    assert _learned(folder) == read_json(folder / RUN / "coefficients.json")
    with pytest.raises(ValueError, match=r"model\.learning_rate: 0\.02 there, 0\.1 now"):
        _run_in(folder, "model.learning_rate=0.1")


def test_a_finished_run_from_before_updates_were_dropped(learned: tuple[Path, str]) -> None:
    path = learned[0] / RUN / "coefficients.json"
    whole = path.read_bytes()
    plain = read_object(path)
    del plain["about"]["validated"]
    write_record(path, plain)
    printed = _run_in(learned[0])
    assert "already learned" in printed
    assert "updates" not in printed
    path.write_bytes(whole)
    assert "coefficients: 8 updates " in _run_in(learned[0])


def test_a_flipped_digit_of_learned_coefficients_is_noticed(learned: tuple[Path, str]) -> None:
    """They are read back when the run is asked for again."""
    path = learned[0] / RUN / "coefficients.json"
    whole = path.read_text()
    number = repr(read_json(path)["alpha"][1][0])
    digit = number.rindex(".") + 1
    path.write_text(whole.replace(number, number[:digit] + str(9 - int(number[digit])) + number[digit + 1 :]))
    with pytest.raises(ValueError, match=r"coefficients\.json differs from its checksum"):
        _run_in(learned[0])
    path.write_text(whole)


def test_force_leaves_finished_coefficients_alone(learned: tuple[Path, str]) -> None:
    before = (learned[0] / RUN / "settings.json").read_text()
    with pytest.raises(ValueError, match=r"is finished, with other settings \(model\.updates: 8 there, 6 now\)"):
        _run_in(learned[0], "model.updates=6", "resume=force")
    assert (learned[0] / RUN / "settings.json").read_text() == before
    assert "already learned" in _run_in(learned[0], "resume=force")


def test_killed_and_resumed(family: Path, learned: tuple[Path, str], tmp_path: Path) -> None:
    """SIGKILL in mid-course: the same coefficients, the same curves."""
    _place(family, tmp_path)
    process = start("train", *OPTIONS, cwd=tmp_path)
    wait_until(lambda: reached(tmp_path / RUN / "checkpoints", 4), process)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / FAMILY / "coefficients.json").exists()
    assert "resuming from" in _run_in(tmp_path)
    ours, theirs = _learned(tmp_path), _learned(learned[0])
    for one in (ours, theirs):
        del one["about"]["seconds"]
    assert ours == theirs
    curves = [
        {
            (line["step"], name): value
            for line in metrics(folder / RUN / "metrics.jsonl")
            for name, value in line.items()
        }
        for folder in (tmp_path, learned[0])
    ]
    for one in curves:
        for key in [key for key in one if key[1] in ("time", "epoch")]:
            del one[key]
    assert curves[0] == curves[1]


def test_two_ranks_learn_what_one_does(family: Path, learned: tuple[Path, str], tmp_path: Path) -> None:
    """They share coins and take different samples: their mean is one rank's, but for the order of sums."""
    _place(family, tmp_path)
    succeed_ranks("train", *OPTIONS, cwd=tmp_path)
    ours, theirs = _learned(tmp_path), _learned(learned[0])
    for name in ("alpha", "beta"):
        torch.testing.assert_close(torch.tensor(ours[name]), torch.tensor(theirs[name]), rtol=0, atol=1e-3)
    assert ours["about"]["lambda"] == pytest.approx(theirs["about"]["lambda"], rel=1e-3)
    mine, other = (one["about"]["held_out"]["systematic"]["after"]["mse"] for one in (ours, theirs))
    assert mine == pytest.approx(other, rel=1e-2)


def test_ranks_take_different_samples_and_share_their_coins() -> None:
    """Shares of a batch are disjoint and make up the batch of one rank; none is an index that users draw."""
    fit = Fit(8, 4, 2, 1, 0.1, "exact", 2, 2)
    problem = objective(2, 4)

    def shares(ranks: int) -> list[torch.Tensor]:
        found = []
        for rank in range(ranks):
            start = torch.zeros(2, 1, dtype=torch.float64)
            module = CoefficientsModule(problem, start, start, fit, ["1", "2"])
            module._home = torch.device("cpu")
            trainer = SimpleNamespace(world_size=ranks, global_rank=rank)
            module.trainer = trainer  # type: ignore[assignment]
            found.append(torch.cat([module._share(batch) for batch in range(2)]))
        return found

    assert shares(1)[0].tolist() == list(range(2 * 10**9, 2 * 10**9 + 8))
    one, two = shares(2)
    assert sorted([*one.tolist(), *two.tolist()]) == shares(1)[0].tolist()


def test_levels_that_are_left_out(tmp_path: Path) -> None:
    """Of a calibrated family: said, learned for, saved, drawn, and used in sampling."""
    ours = calibrated_family("xs", "s", "m")
    ours.save(tmp_path / FAMILY)
    options = (f"family={FAMILY}", "model.updates=1", "model.images=2", "model.held_out=2")
    printed = _run_in(tmp_path, *options)
    assert "coefficients: for levels xs, m, predicted the best of xs, s, m\n" in printed
    found = _learned(tmp_path)
    assert (found["levels"], len(found["alpha"]), found["about"]["steps"]) == (["xs", "m"], 2, 4)
    assert "alpha/m" in (names := {name for line in metrics(tmp_path / RUN / "metrics.jsonl") for name in line})
    assert "alpha/s" not in names
    plan = PlanSpec(probabilities="learned", estimator="jump")
    sampler = Sampler(Family.load(tmp_path / FAMILY), solver="ddpm", steps=4, grid="log_snr", plan=plan)
    assert sampler.levels == ["xs", "m"]
    assert torch.isfinite(sampler.run(range(2)).x).all()
    # the same levels when it is asked for again
    assert "already learned" in _run_in(tmp_path, *options)


def test_updates_that_do_not_lower_the_objective_are_dropped() -> None:
    """Cheaper laws where cost is all that matters, dearer ones, and none."""
    fit = Fit(8, 4, 2, 1, 0.1, "reverse", 4, 5, weight=1e5)
    first = torch.tensor([[0.2], [-0.5]], dtype=torch.float64)
    for moved, kept in ((-1.0, True), (1.0, False), (0.0, False)):
        module = CoefficientsModule(objective(2, 4), first, first, fit, ["1", "2"])
        module._home = torch.device("cpu")
        module.trainer = SimpleNamespace(world_size=1, global_rank=0)  # type: ignore[assignment]
        with torch.no_grad():
            module.beta.add_(moved)
        updated = module.theta
        found = module.settle()
        assert found["kept"] is kept
        assert torch.equal(module.theta, updated if kept else first)
        change = 1e5 * (module.objective.cost(updated) - module.objective.cost(first)).item()
        assert found["objective"] == pytest.approx(change, rel=1e-2)
        assert (found["half_width"] > 0) is bool(moved)
        learned = module.judge()["systematic"]["learned"]
        assert (learned["objective"] < 0) is kept


@pytest.mark.parametrize("tangents", ["exact", "random"])
def test_other_solvers_and_directions(family: Path, tangents: str, tmp_path: Path) -> None:
    options = ["model.solver=dpm_solver_pp", "model.grid=null", "model.updates=1", f"model.tangents={tangents}"]
    assert "objective" in _run_in(_place(family, tmp_path), *options, "model.lambda=0.1")
    about = _learned(tmp_path)["about"]
    assert (about["solver"], about["grid"], about["lambda"]) == ("dpm_solver_pp", "log_snr", 0.1)


def test_a_dry_run_writes_nothing(family: Path, tmp_path: Path) -> None:
    assert "10 numbers" in _run_in(tmp_path, "dry_run=true", f"family={family}")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ("model.steps=0", "model.steps must be a whole number >= 1, got 0"),
        ("model.updates=1.5", "model.updates must be a whole number >= 1, got 1.5"),
        ("model.draws=1", "model.draws must be a whole number >= 2, got 1"),
        ("model.held_out=1", "model.held_out must be a whole number >= 2, got 1"),
        ("model.budget=0", "model.budget must be in (0, 1], got 0"),
        ("model.budget=1.1", "model.budget must be in (0, 1], got 1.1"),
        ("model.lambda=-1", "model.lambda must be a number > 0, or null, got -1"),
        ("model.learning_rate=nan", "model.learning_rate must be a number > 0, got nan"),
        ("model.tangents=all", "model.tangents must be one of reverse, exact, random, got 'all'"),
        ("model.coins=systematic", "model.tangents must be exact or random for model.coins=systematic, got 'reverse'"),
        ("model.images=7", "model.images must be a multiple of model.batch_size 2, got 7"),
        ("model.solver=3", "model.solver must be text, got 3"),
        ("model.grid=3", "model.grid must be text, got 3"),
        ("trainer.precision=bf16", "trainer.precision must be fp32 for model=coefficients, got 'bf16'"),
        ("trainer.compile=true", "trainer.compile must be false for model=coefficients, got True"),
        ("family=3", "family must be text, got 3"),
    ],
)
def test_bad_options(option: str, says: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011  (the text is looked at below)
        check(plain(configure("train", *OPTIONS, option)))
    assert str(error.value) == says


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ("model.solver=dpmm", "model.solver must be one of"),
        ("model.grid=log", "model.grid must be one of"),
        ("model.budget=0.01", "budget=0.01 of 4 evaluations"),
        ("callbacks=[{_target_: torch.load}]", "torch.load is not a Lightning Callback class"),
    ],
)
def test_late_mistakes_leave_nothing_behind(family: Path, option: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011  (the text is looked at below)
        _run_in(tmp_path, f"family={family}", option)
    assert says in str(error.value)
    assert not list(tmp_path.iterdir())


def test_a_family_in_root_comes_before_newer_ones_beside_it(tmp_path: Path) -> None:
    data: Any = SimpleNamespace(name="digits")
    for number, name in enumerate(("mine", "digits", "other")):
        path = tmp_path / name / "family" / "family.json"
        path.parent.mkdir(parents=True)
        write_json(path, {"data": "digits" if name != "other" else "clouds"})
        os.utime(path, (number, number))
    for root, found in (("mine", "mine"), ("digits", "digits"), ("other", "digits"), ("none", "digits")):
        assert family_folder(None, str(tmp_path / root), data) == tmp_path / found / "family"


def test_without_a_family_it_says_how_to_make_one(tmp_path: Path) -> None:
    done = execute("train", *OPTIONS, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "there is no trained family of digits under runs; make one with: python train.py model=family" in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_family_of_one_level_is_refused(tmp_path: Path) -> None:
    shape = (1, 8, 8)
    Family([Level("xs", unet("xs", shape), NoiseSchedule.cosine(), shape, data="digits")]).save(tmp_path / FAMILY)
    with pytest.raises(ValueError, match=r"this family has one; train another: model\.levels=\[xs,s\]"):
        _run_in(tmp_path)


def test_sampling_with_the_name_of_no_level(tmp_path: Path) -> None:
    with contextlib.chdir(tmp_path), pytest.raises(ValueError, match="model=coefficients is not a level"):
        run_here("sample", "model=coefficients")


@pytest.mark.parametrize("tangents", ["reverse", "exact"])
def test_the_gradient_lowers_the_objective(tangents: str) -> None:
    """On closed-form levels, from a poor beginning: what learning is for."""
    with pytest.raises(ValueError, match="images must be a multiple of batch_size 3, got 4"):
        Fit(4, 3, 2, 1, 0.1, "exact", 2, 2)
    problem, indices = objective(3, 6), torch.arange(8)
    truth, fit = problem.reference(indices), Fit(8, 8, 16, 25, 0.1, tangents, 2, 2)
    theta = first = torch.tensor([[0.0, 0.0], [-1.0, 1.0]], dtype=torch.float64)
    weight = 30.0
    optimizer = torch.optim.Adam([theta := theta.clone()], lr=0.1)
    for step in range(25):
        if tangents == "reverse":
            drawn = replicates(problem, fit, theta.detach(), step, indices, truth)
            theta.grad = first_order(problem, theta, *drawn, weight).gradient
        else:
            theta.grad = problem.estimate(theta, problem.draw(theta, step, 16), indices, truth, weight, None).gradient
        optimizer.step()
    held_out = torch.arange(1000, 1100)
    truth = problem.reference(held_out)
    before, after = (
        problem.held_out(one, "bernoulli", held_out, truth, 8) + weight * problem.cost(one) for one in (first, theta)
    )
    change = after - before
    assert change.mean() < -4 * change.std() / math.sqrt(len(change))
