"""The coupled benchmark: columns, coupled noise, resuming, ratios of known answer, mistakes in one line."""

from __future__ import annotations

import csv
import itertools
import math
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mlem.comparison.coupled import Comparison, read_rows
from mlem.comparison.entry import Entry
from mlem.comparison.equal_error import Setting, cost_at, cost_ratio
from mlem.comparison.row import KEY, MULTILEVEL, Row
from mlem.comparison.summary import best_trials, predicted_curve
from mlem.family import Family
from mlem.files import read_json
from mlem.level import Level
from mlem.metrics import pathwise_error
from mlem.multilevel.calibrate import calibrate
from mlem.multilevel.coefficients import Coefficients
from mlem.multilevel.fitted import Fitted
from mlem.multilevel.plan import Plan
from mlem.multilevel.spec import PlanSpec
from mlem.networks import unet
from mlem.sampling import sample
from mlem.schedule import NoiseSchedule
from tests.commands import configure, run_here, start, wait_until

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of diffusers
OPTIONS = (
    "experiment=error_vs_time",
    "root=runs/tiny",
    "trainer=cpu",
    "seeds=0-3",
    "batch_size=3",
    "eval.steps=[2,4,6]",
    "eval.reference_steps=9",
    "eval.plan_steps=6",
    "eval.budget=0.4",
    "eval.deltas=[-2,1]",
    "eval.trials=2",
    "eval.draws=20",
    "eval.shown=2",
)
ROWS = 2 * 3 + 2 * 2 * 2
"""Two levels alone in three numbers of steps; a fixed law and a learned one, at two deltas, in two trials."""
SECONDS = ("network_seconds", "wall_seconds")


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with runs/tiny/family: random weights, learned coefficients, no calibration."""
    folder, schedule, shape = tmp_path_factory.mktemp("coupled"), NoiseSchedule.cosine(), (1, 8, 8)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        levels = [Level(size, unet(size, shape), schedule, shape, data="digits") for size in ("xs", "s")]
    coefficients = Coefficients(torch.tensor([0.0, 0.5]), torch.tensor([40.0, -1.0]))
    Family(levels, Fitted(coefficients=coefficients)).save(folder / "runs/tiny/family")
    return folder


@pytest.fixture(scope="module")
def measured(family: Path) -> tuple[Path, str]:
    """What the command leaves, and prints."""
    from tests.commands import run_in

    printed = run_in(family, lambda: run_here("sample", *OPTIONS))
    return family / "runs/tiny/error_vs_time", printed


def table(path: Path, *without: str) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return [{key: value for key, value in row.items() if key not in without} for row in csv.DictReader(file)]


def test_a_row_for_each_run(measured: tuple[Path, str]) -> None:
    folder, printed = measured
    rows = read_rows(folder / "runs.csv")
    costs = [
        "calls_xs",
        "calls_s",
        "flops",
        *SECONDS,
        "mse",
        "mse_stderr",
        "psnr",
        "psnr_stderr",
        "ssim",
        "ssim_stderr",
    ]
    costs += ["image_mse", "image_psnr", "image_ssim"]
    assert list(table(folder / "runs.csv")[0]) == [*KEY, *costs, "checksum"]
    assert len(rows) == ROWS
    assert [(row.levels, row.steps) for row in rows[:6]] == [(n, k) for k in (2, 4, 6) for n in ("xs", "s")]
    for row in rows[6:]:
        assert (row.levels, row.steps, row.coins) == ("xs+s", 6, "bernoulli")
        assert 0 < row.calls["xs"] <= 6
    for row in rows:
        for name in ("mse", "psnr", "ssim"):
            values = getattr(row, f"image_{name}")
            assert getattr(row, name) == pytest.approx(np.mean(values), rel=1e-5)
            assert getattr(row, f"{name}_stderr") == pytest.approx(np.std(values, ddof=1) / 2, rel=1e-4)
        assert row.seconds >= row.network_seconds > 0
    assert {(row.sampler, row.delta, row.trial) for row in rows[6:]} == {
        (f"ML-EM, {law}", delta, trial) for law in ("fixed law", "learned") for delta in (-2, 1) for trial in (0, 1)
    }
    assert printed.count("left out: ML-EM, calibrated: this family has no calibration; measure it with: ") == 1
    assert printed.count("left out: hindsight: this family has no calibration; measure it with: ") == 1
    assert len(printed.split("left out")) == 3


def test_figure_and_summary(measured: tuple[Path, str]) -> None:
    folder, _ = measured
    for name in ("error_vs_time.png", "similarity_vs_time.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    summary = read_json(folder / "summary.json")
    assert "4 images, seed 0; reference: level s, 9 steps, same noise" in summary["caption"]
    # two errors (between those of 2, 4 and 6 steps), two laws, the mean and the best of two trials
    assert [row["coins"] for row in summary["ratios"]] == ["mean", "mean", "best of 2", "best of 2"] * 2
    assert list(summary["ratios"][0]["against"]) == ["time, largest", "time, any", "FLOPs, largest", "FLOPs, any"]


def test_the_best_laws_are_predicted_where_a_calibration_allows(family: Path, tmp_path: Path) -> None:
    ours = Family.load(family / "runs/tiny/family")
    plan = PlanSpec(budget=0.5, probabilities="theory", estimator="jump", coins="bernoulli", cost="flops")
    entry = Entry("ddpm", (6,), name="ML-EM", spec=plan, deltas=(0.0,), trials=1)
    comparison = Comparison(ours, range(2), tmp_path, reference_steps=9)
    runs = comparison.runs(entry)
    assert predicted_curve(comparison, runs) == {}
    calibration = calibrate(ours, images=2, times=4)
    ours.fitted = Fitted(calibration)
    assert predicted_curve(comparison, runs) == {}  # without the solver's own error
    ours.fitted = Fitted(replace(calibration, discretisation={"ddpm/uniform": {4: 0.02, 8: 0.01}}))
    ((name, (flops, errors)),) = predicted_curve(comparison, runs).items()
    assert name == "best laws, predicted, 6 steps"
    assert all(a < b < 6 * ours.level().flops for a, b in itertools.pairwise(flops))
    assert all(a > b > 0.01 for a, b in itertools.pairwise(errors))
    assert predicted_curve(comparison, [replace(run, plan=None) for run in runs]) == {}


def test_schedulers_of_diffusers_have_rows_if_they_share_the_path(family: Path, tmp_path: Path) -> None:
    comparison = Comparison(Family.load(family / "runs/tiny/family"), range(2), tmp_path, reference_steps=9)
    comparison.measure(comparison.runs(Entry("diffusers:UniPCMultistepScheduler", (3,), levels=("xs",))))
    assert [(row.solver, row.grid) for row in comparison.rows] == [("diffusers:UniPCMultistepScheduler", "diffusers")]
    with pytest.raises(ValueError, match="DDPMScheduler shares only its distribution with its reference"):
        comparison.runs(Entry("diffusers:DDPMScheduler", (3,)))


def test_the_noise_is_that_of_sample(measured: tuple[Path, str]) -> None:
    folder, _ = measured
    rows = read_rows(folder / "runs.csv")
    loaded = Family.load(folder.parent / "family")
    options: dict[str, Any] = {"solver": "ddpm", "indices": range(4), "batch_size": 3}
    truth = sample(loaded, steps=9, **options).x
    alone = next(row for row in rows if (row.levels, row.steps) == ("xs", 4))
    assert pathwise_error(sample(loaded, steps=4, level="xs", **options).x, truth) == pytest.approx(
        (alone.mse, alone.mse_stderr), rel=1e-6
    )
    spec = PlanSpec(probabilities="learned", delta=1.0, estimator="jump", coins="bernoulli", seed=1)
    learned = next(row for row in rows if (row.sampler, row.delta, row.trial) == ("ML-EM, learned", 1.0, 1))
    mse, _ = pathwise_error(sample(loaded, steps=6, plan=spec, **options).x, truth)
    assert mse == pytest.approx(learned.mse, rel=1e-6)


def test_what_is_there_is_not_run_again(measured: tuple[Path, str], family: Path, monkeypatch: Any) -> None:
    folder, _ = measured
    monkeypatch.chdir(family)
    shutil.copytree(folder, family / "again", dirs_exist_ok=True)
    before = (folder / "runs.csv").read_bytes()
    run_here("sample", *OPTIONS, "out=again")
    assert (family / "again/runs.csv").read_bytes() == before
    run_here("sample", *OPTIONS, "out=again", "eval.trials=3")
    after = table(family / "again/runs.csv")
    assert after[:ROWS] == table(folder / "runs.csv")
    assert len(after) == ROWS + 4
    with pytest.raises(ValueError, match=r"holds measurements made with other settings \(reference_steps: 9 there, 8"):
        run_here("sample", *OPTIONS, "out=again", "eval.reference_steps=8")


def test_killed_and_restarted_gives_the_same_rows(measured: tuple[Path, str], family: Path, monkeypatch: Any) -> None:
    path = family / "cut/runs.csv"
    with start("sample", *OPTIONS, "out=cut", cwd=family) as process:
        wait_until(lambda: path.exists() and len(table(path)) >= 2, process)
        process.send_signal(signal.SIGKILL)
    cut = table(path)
    assert len(cut) >= 2
    monkeypatch.chdir(family)
    run_here("sample", *OPTIONS, "out=cut")
    assert table(path)[: len(cut)] == cut
    assert table(path, *SECONDS, "checksum") == table(measured[0] / "runs.csv", *SECONDS, "checksum")


def test_a_flipped_digit_of_a_row_is_noticed(measured: tuple[Path, str], tmp_path: Path) -> None:
    """And a row that was written without a checksum is read as ever."""
    whole, path = (measured[0] / "runs.csv").read_text(), tmp_path / "runs.csv"
    number = str(read_rows(measured[0] / "runs.csv")[2].mse)
    path.write_text(whole.replace(number, number[:-1] + str(9 - int(number[-1])), 1))
    with pytest.raises(ValueError, match=rf"^{path} was edited \(a row differs from its checksum\); restore it, or"):
        read_rows(path)
    path.write_text("".join(line.rpartition(",")[0] + "\n" for line in whole.splitlines()))
    assert repr(read_rows(path)) == repr(read_rows(measured[0] / "runs.csv"))  # there are NaNs in them


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["eval.samplers=[{name: a}]"], r"eval.samplers\[0\] must be \{name: text, solver: name"),
        (["eval.samplers=[{name: a, solver: ddmp, steps: [2]}]"], r"eval.samplers\[0\]: .*did you mean ddpm"),
        (["eval.samplers=[{name: a, solver: ddpm, steps: 2}]"], r"eval.samplers\[0\].steps must be a list"),
        (["eval.samplers=[{name: a, solver: ddpm, steps: [2], trials: 2}]"], "deltas and trials need coins"),
        (
            ["eval.samplers=[{name: a, solver: ddpm, steps: [2], trials: 2, plan: {budget: 0.5}}]"],
            "add estimator: jump",
        ),
        (["eval.samplers=[{name: a, solver: ddpm, steps: [2], levels: [xl]}]"], "level must be one of xs, s, got 'xl'"),
        (["eval.samplers=[]"], "list at least one sampler"),
        (["level=xs"], "leave out level=xs"),
        (["model=unet_xs"], "model=unet_xs is a single level: leave it out"),
        (["family=nowhere"], "nowhere holds no family"),
        (["seeds=0"], "at least 2 images, got 1"),
    ],
)
def test_mistakes(family: Path, monkeypatch: Any, options: list[str], says: str) -> None:
    monkeypatch.chdir(family)
    with pytest.raises((ValueError, FileNotFoundError), match=says) as error:
        run_here("sample", *OPTIONS, "out=mistake", *options)
    assert "\n" not in str(error.value)
    shutil.rmtree("mistake", ignore_errors=True)


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ("eval.trials=0", "eval.trials must be a whole number >= 1, got 0"),
        ("eval.steps=3", "eval.steps must be a list"),
        ("eval.budget=2", r"eval.budget must be in \(0, 1\], got 2"),
        ("eval.check=1", "eval.check must be a number of images from 2 to 1000000000, or 0 for none, got 1"),
        ("eval.targets=[1e-2,0]", r"eval.targets must be a list of numbers > 0, as in eval.targets=\[1e-2,1e-3\]"),
        ("eval.coins=penny", "eval.coins must be one of systematic, bernoulli"),
    ],
)
def test_bad_values(option: str, says: str) -> None:
    from mlem.cli.compose import plain
    from mlem.cli.options import check

    with pytest.raises(ValueError, match=says):
        check(plain(configure("sample", "experiment=error_vs_time", option)))


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ("budget=0.5", "does not use budget=0.5: leave it out, or use eval.budget="),
        ("steps=9", "does not use steps=9: leave it out, or use eval.steps="),
        ("sampler=heun", "does not use sampler=heun: leave it out, or use eval.solver="),
        ("coins=nested", "does not use coins=nested: leave it out, or use eval.coins="),
        ("levels=[xs]", r"does not use levels=\['xs'\]: leave it out, or see eval.samplers"),
        ("format=npz", "does not use format=npz: leave it out"),
        ("per_sample=true", "does not use per_sample=true: leave it out"),
    ],
)
def test_options_of_samples_are_refused(family: Path, option: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(family)
    with pytest.raises(ValueError, match=f"^eval=benchmark {says}"):
        run_here("sample", *OPTIONS, "out=elsewhere", option)
    assert not (family / "elsewhere").exists()


def test_a_solver_without_a_path_is_refused(family: Path, tmp_path: Path) -> None:
    comparison = Comparison(Family.load(family / "runs/tiny/family"), range(2), tmp_path)
    with pytest.raises(ValueError, match="predictor_corrector shares only its distribution with its reference"):
        comparison.runs(Entry("predictor_corrector", (3,)))


@pytest.mark.parametrize(
    ("solver", "says"),
    [
        ("heun", "^hindsight needs an mlem solver with one evaluation per step"),
        ("parallel_midpoint", "leave out plan=$"),
    ],
)
def test_a_plan_that_its_solver_cannot_follow_is_refused(family: Path, tmp_path: Path, solver: str, says: str) -> None:
    """When runs are listed, before anything is measured."""
    comparison = Comparison(Family.load(family / "runs/tiny/family"), range(2), tmp_path)
    with pytest.raises(ValueError, match=says):
        comparison.runs(Entry(solver, (3,), spec=PlanSpec(probabilities=(1.0, 0.5))))


def test_the_hash_of_a_plan_is_that_of_earlier_versions(family: Path, tmp_path: Path) -> None:
    """So that their rows are found again."""
    comparison = Comparison(Family.load(family / "runs/tiny/family"), range(2), tmp_path)
    spec = PlanSpec(probabilities=(1.0, 0.5), estimator="jump", coins="bernoulli")
    (run,) = comparison.runs(Entry("ddpm", (3,), spec=spec))
    assert run.row.plan == "dd309f65a847"


def line(costs: Any, exponent: float, factor: float, images: np.ndarray) -> list[Setting]:
    """Error factor * cost^-exponent on average, times what an image is worth."""
    return [Setting(np.array([cost]), factor * cost**-exponent * images[None]) for cost in costs]


def test_ratios_of_known_curves() -> None:
    images = np.random.default_rng(0).gamma(4, 0.25, 64)
    images /= images.mean()
    theirs, ours = line((1.0, 3.0, 10.0, 30.0), 1.0, 1.0, images), line((0.5, 2.0, 9.0), 1.0, 0.25, images)
    assert cost_at(theirs, 0.2) == pytest.approx(5.0)
    found = cost_ratio(theirs, ours, 0.1, np.random.default_rng(1))
    assert (found.ratio, found.cost) == pytest.approx((4.0, 2.5))
    assert found.low == pytest.approx(4.0)  # the images weigh on both alike
    assert found.high == pytest.approx(4.0)
    assert found.share == 1
    beyond = cost_ratio(theirs, ours, 1e-4, np.random.default_rng(1)).to_dict()
    assert (beyond["ratio"], beyond["low"], beyond["share"]) == (None, None, 0.0)


def test_an_interval_covers() -> None:
    random, hits = np.random.default_rng(3), 0
    for _ in range(100):
        both = [line((1.0, 2.0, 4.0, 8.0), 1.0, f, random.gamma(4, 0.25, 64)) for f in (1.0, 0.5)]
        found = cost_ratio(*both, 0.2, np.random.default_rng(0), draws=100)
        hits += found.low <= 2.0 <= found.high
    assert 86 <= hits <= 100  # 95 expected of 100, less three standard errors and what a bootstrap lacks


def test_an_interval_covers_the_chance_of_the_coins() -> None:
    """Coins that all images share move a draw by 30 percent: over images alone 1 interval of 10 would cover."""
    random, hits = np.random.default_rng(4), 0
    for _ in range(50):
        images = random.gamma(4, 0.25, 200)
        theirs = line((1.0, 2.0, 4.0, 8.0), 1.0, 1.0, images)
        coins = [random.lognormal(-0.045, 0.3, (8, 1)) for _ in range(4)]
        ours = [
            Setting(np.full(8, c), 0.5 / c * many * images) for c, many in zip((1.0, 2.0, 4.0, 8.0), coins, strict=True)
        ]
        found = cost_ratio(theirs, ours, 0.2, np.random.default_rng(0), draws=60)
        hits += found.low <= 2.0 <= found.high
    assert 36 <= hits <= 49


def test_the_best_draw_does_not_flatter_itself() -> None:
    """Draws that differ by chance alone: the smallest mean is too small, that of the other half is not."""
    random = np.random.default_rng(0)
    settings = [Setting(np.ones(15), random.gamma(1, 1, (15, 32))) for _ in range(300)]
    weights = np.ones(32)
    chosen = np.array([setting.best(weights)[1] for setting in settings])
    naive = np.array([setting.errors.mean(1).min() for setting in settings])
    assert naive.mean() < 0.8
    assert chosen.mean() == pytest.approx(1.0, abs=3 * chosen.std() / math.sqrt(len(chosen)))


def test_delta_shifts_logits() -> None:
    plan = Plan.draw(torch.tensor([[1.0, 0.5, 1.0], [1.0, 0.2, 0.1]]), "bernoulli", levels=("a", "b", "c"))
    again = plan.redrawn(math.log(4.0), seed=7)
    expected = torch.tensor([[1.0, 0.8, 1.0], [1.0, 0.5, 4 / 13]], dtype=torch.float64)
    assert torch.allclose(again.probabilities, expected, atol=1e-7)
    assert (again.seed, again.levels, again.coins) == (7, plan.levels, "bernoulli")
    with pytest.raises(ValueError, match="hindsight has no coins to toss again"):
        Plan.given(torch.ones(2, 3)).redrawn()


def test_the_best_trial_of_each_delta() -> None:
    rows = [Row("x", 2, MULTILEVEL, delta=d, trial=t, mse=abs(t - d)) for d in (0.0, 1.0) for t in (0, 1)]
    assert [(row.delta, row.trial) for row in best_trials(rows)] == [(0.0, 0), (1.0, 1)]


def test_a_row_is_the_same_after_json_and_csv() -> None:
    """Also one whose error means nothing, and one of a version that wrote fewer keys."""
    costs = {"evaluations": 6.5, "rounds": 6.5, "flops": 1e6, "seconds": 0.1, "network_seconds": 0.05}
    shared = {"levels": "xs+s", "calls": {"xs": 6.0, "s": 0.5}, **costs}
    row = Row("a", 6, MULTILEVEL, target="budget0.5", **shared, scores={"fid_x@7": 1.0, "fid_x@7_std": math.nan})
    plain = row.to_json()
    assert plain | {"mse": None, "fid_x@7_std": None, "dial": "budget0.5", "flops_per_image": 1e6} == plain
    assert repr(Row.from_json(plain)) == repr(row)  # NaN is not equal to itself
    old = Row.from_json({"level": "s", "sampler": "a", "steps": 2, "mse": 0.5, "fid_x@7": 2.0})
    assert (old.level, old.mse, old.target, old.scores) == ("s", 0.5, "", {"fid_x@7": 2.0})
    with pytest.raises(ValueError, match=r"^runs/a/evaluation\.json is damaged \(no 'level'\)"):
        Row.from_json({"sampler": "a", "steps": 2}, "runs/a/evaluation.json")
    settings: dict[str, Any] = {"solver": "ddpm", "grid": "uniform", "coins": "nested", "plan": "0f", "delta": -2.0}
    settings |= {"trial": 1, "mse": 0.25, "mse_stderr": 0.1, "image_mse": (0.2, 0.3), "scores": {"fid_x@7": 1.0}}
    older = row = replace(row, target="", rounds=math.nan, **settings)
    row = replace(row, psnr=math.inf, ssim=0.9, ssim_stderr=0.1, image_psnr=(math.inf, 20.5), image_ssim=(1.0, 0.8))
    assert repr(Row.from_csv(row.to_csv())) == repr(row)
    cells = {name: cell for name, cell in older.to_csv().items() if "psnr" not in name and "ssim" not in name}
    del cells["checksum"]
    assert repr(Row.from_csv(cells)) == repr(older)
    assert row.key == ("a", "ddpm", "xs+s", 6, "uniform", "nested", "0f", -2.0, 1)
    assert row.setting == row.key[:-1]
