"""The sampler evaluation: what it reports, on which weights, on how many ranks, and what it leaves alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import WeightAveraging
from PIL import Image
from torch import Tensor

from mlem.comparison.entry import Entry, refuse_duplicates
from mlem.comparison.lineup import Lineup
from mlem.comparison.setup import Setup
from mlem.data import BatchSource, Shards, held_out_batches, train_loader
from mlem.family import Family
from mlem.level import Level
from mlem.multilevel.spec import PlanSpec
from mlem.networks import unet
from mlem.schedule import NoiseSchedule
from mlem.training.averaging import averaged_state, make_average
from mlem.training.denoising import DenoisingModule, FamilyModule
from mlem.training.evaluation import SamplerEvaluation
from tests.commands import REPOSITORY, finish, rank_variables, start
from tests.evaluating import CHOICES, COUNT, make, trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore::mlem.metrics.FewImagesWarning"),
    pytest.mark.filterwarnings("ignore:It is recommended to use `self.log"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated"),
]
LABELS = [("ddpm", 2), ("ddpm", 4), ("ddim", 3), ("ddim_karras", 3)]
MEASURED = {
    "dial",
    "reference",
    "calls",
    "evaluations",
    "rounds",
    "flops_per_image",
    "seconds_per_image",
    "network_seconds_per_image",
}
MEASURED |= {"mse", "mse_stderr", "psnr", "psnr_stderr", "ssim", "ssim_stderr"}


@pytest.fixture(scope="module")
def shards(trained: Path) -> Shards:
    return Shards.open(trained / "data/digits")


def run_two_ranks(trained: Path, out: Path) -> Path:
    arguments = [str(trained / "data/digits"), str(trained / "runs/tiny/family"), str(out), "2"]
    variables = [one | {"WANDB_SILENT": "true"} for one in rank_variables()]
    ranks = [start("tests/evaluating", *arguments, cwd=REPOSITORY, **one) for one in variables]
    for done in map(finish, ranks):
        assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def two_ranks(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_two_ranks(trained, tmp_path_factory.mktemp("ranks") / "2")


@pytest.fixture(scope="module")
def one_rank(trained: Path, shards: Shards, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("ranks") / "1"
    evaluation = make(out, shards)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(out.parent)
        run_test(evaluation, Family.load(trained / "runs/tiny/family"), shards, out)
    assert json.loads((out / "evaluation.json").read_text())["rows"] == [row.to_json() for row in evaluation.rows]
    return out


def run_test(evaluation: SamplerEvaluation, family: Family, shards: Shards, out: Path) -> dict[str, float]:
    import warnings

    with warnings.catch_warnings():  # also when called from a fixture, where marks have no effect
        for text in ("It is recommended", "`isinstance.treespec"):
            warnings.filterwarnings("ignore", text)
        warnings.filterwarnings("ignore", ".*random256.*")
        loader = held_out_batches(shards, shards.split(16)[1], 8)
        return dict(trainer(out, [evaluation]).test(FamilyModule(family, 0), dataloaders=loader, verbose=False)[0])


def rows(out: Path) -> list[dict[str, Any]]:
    return json.loads((out / "evaluation.json").read_text())["rows"]


def test_every_sampler_on_every_level_has_its_row(one_rank: Path) -> None:
    found = rows(one_rank)
    assert [(row["level"], row["sampler"], row["steps"]) for row in found] == [
        (level, *label) for level in ("xs", "s") for label in LABELS
    ]
    for row in found:
        assert row.keys() == {"level", "sampler", "steps", f"fid_random256@{COUNT}"} | MEASURED
        assert row["evaluations"] == row["rounds"] == row["steps"]
        assert 0 < row["network_seconds_per_image"] < row["seconds_per_image"]
        assert row["flops_per_image"] > 0


def test_the_reference_is_at_distance_zero_from_itself(one_rank: Path) -> None:
    zero = {(row["level"], row["sampler"], row["steps"]) for row in rows(one_rank) if row["mse"] == 0}
    assert zero == {("s", "ddpm", 4)}
    for row in rows(one_rank):
        if row["mse"] == 0:
            assert (row["psnr"], row["psnr_stderr"], row["ssim"], row["ssim_stderr"]) == (None, None, 1, 0)
        else:
            assert min(row["mse_stderr"], row["psnr"], row["psnr_stderr"], row["ssim_stderr"], 1 - row["ssim"]) > 0


def test_pictures_of_each(one_rank: Path) -> None:
    expected = {f"{level}_{label}_{steps}.png" for level in ("xs", "s") for label, steps in LABELS}
    assert {path.name for path in (one_rank / "grids").iterdir()} == expected
    for path in [*(one_rank / "grids").iterdir(), one_rank / "error_vs_time.png"]:
        with Image.open(path) as image:
            assert image.width > 8
    caption = json.loads((one_rank / "evaluation.json").read_text())["caption"]
    assert "digits, 7 images, seed 0; reference: level s, 4 steps, same noise; cpu, batch 2, 1 rank;" in caption


def test_one_and_two_ranks_agree(one_rank: Path, two_ranks: Path) -> None:
    for one, two in zip(rows(one_rank), rows(two_ranks), strict=True):
        assert one.keys() == two.keys()
        for key in one.keys() - {"seconds_per_image", "network_seconds_per_image"}:
            if isinstance(one[key], float):
                assert two[key] == pytest.approx(one[key], rel=1e-9, abs=1e-9)
            else:
                assert two[key] == one[key]


def test_only_rank_0_logs(two_ranks: Path) -> None:
    lines = [json.loads(line) for line in (two_ranks / "metrics.jsonl").read_text().splitlines()]
    evaluated = [line for line in lines if "eval/s/ddpm@2/mse" in line]
    assert len(evaluated) == 1
    for name in ("mse", "psnr", "ssim"):
        assert evaluated[0][f"eval/s/ddpm@2/{name}"] == rows(two_ranks)[4][name]
    assert "eval/s/ddpm@4/ssim" in evaluated[0]
    assert "eval/s/ddpm@4/psnr" not in evaluated[0]  # of the reference itself: JSON has no infinity
    assert len(list((two_ranks / "wandb").glob("offline-run-*"))) == 1


def test_only_the_reference_itself_can_be_evaluated(trained: Path, shards: Shards, tmp_path: Path) -> None:
    """Nothing with an error above zero is left for the figure."""
    family = Family([Family.load(trained / "runs/tiny/family").levels[0]])
    evaluation = SamplerEvaluation([Entry("ddpm", (2,))], range(3), tmp_path, reference_steps=2, batch_size=2)
    run_test(evaluation, family, shards, tmp_path)
    assert [row.mse for row in evaluation.rows] == [0]
    assert not evaluation.rows[0].scores


class Spying(pl.Callback):
    """Stands around the evaluation: what it was given, and what it changed."""

    def __init__(self, evaluation: SamplerEvaluation) -> None:
        self.steps: list[int] = []
        self.seen: list[dict[str, Tensor]] = []
        self.raw: list[dict[str, Tensor]] = []
        self.changed: list[str] = []
        self._evaluate = evaluation.evaluate
        evaluation.evaluate = self  # type: ignore[method-assign, assignment]

    def __call__(self, trainer: pl.Trainer, family: Family, device: torch.device) -> None:
        network = family.level().network
        self.steps.append(trainer.global_step)
        self.seen.append({name: tensor.clone() for name, tensor in network.state_dict().items()})
        # the average has changed places with the weights in training
        average = next(one for one in trainer.callbacks if isinstance(one, WeightAveraging))  # type: ignore[attr-defined]
        self.raw.append({name: tensor.clone() for name, tensor in averaged_state(average).items()})
        before = self._state(network)
        self._evaluate(trainer, family, device)
        for name, now in self._state(network).items():
            if not (torch.equal(now, before[name]) if isinstance(now, Tensor) else now == before[name]):
                self.changed.append(name)

    def _state(self, network: torch.nn.Module) -> dict[str, Any]:
        modes = {f"mode of {name}": part.training for name, part in network.named_modules()}
        weights = {name: tensor.clone() for name, tensor in network.state_dict().items()}
        return modes | weights | {"global random numbers": torch.random.get_rng_state()}


def fit(shards: Shards, folder: Path, every: int, epochs: int) -> tuple[Spying, dict[str, Tensor]]:
    """Train with dropout; give what the evaluation saw, and the averaged weights at the end."""
    torch.manual_seed(0)
    level = Level("xs", unet("xs", (1, 8, 8), dropout=0.5), NoiseSchedule.cosine(), (1, 8, 8), data="digits")
    options = {"learning_rate": 1e-2, "warmup_steps": 0, "weight_decay": 0.0}
    module = DenoisingModule(level, seed=0, batch_size=4, steps=2 * epochs, **options)
    evaluation, average = make(folder, shards, every_n_epochs=every), make_average(0.9)
    spy = Spying(evaluation)
    train, held_out = shards.split(16)
    trainer(folder, [evaluation, average], max_epochs=epochs, limit_train_batches=2).fit(
        module,
        train_loader(BatchSource(shards, train, batch_size=4, seed=0)),
        held_out_batches(shards, held_out, 8),
    )
    return spy, averaged_state(average)


@pytest.mark.filterwarnings("ignore:The number of training batches")
def test_in_training_it_sees_the_averaged_weights_and_changes_nothing(shards: Shards, tmp_path: Path) -> None:
    spy, averaged = fit(shards, tmp_path, every=2, epochs=4)
    assert spy.steps == [4, 8]
    for name, weights in spy.seen[-1].items():
        assert torch.equal(weights, averaged[f"network.{name}"])
        assert not torch.equal(weights, spy.raw[-1][f"network.{name}"])
    assert not spy.changed


def test_an_evaluation_of_nothing_is_refused(tmp_path: Path) -> None:
    for options, says in (
        ({"every_n_epochs": 0}, r"evaluation\.every_n_epochs must be >= 1, got 0"),
        ({"batch_size": 0}, "batch_size must be a whole number >= 1, got 0"),
    ):
        with pytest.raises(ValueError, match=says):
            SamplerEvaluation(CHOICES, range(2), tmp_path, **options)
    with pytest.raises(ValueError, match="indices must be distinct"):
        SamplerEvaluation(CHOICES, [1, 1], tmp_path)
    with pytest.raises(ValueError, match="evaluation of ddpm needs at least one step count"):
        Entry("ddpm", ())


@pytest.mark.parametrize(
    ("spec", "label", "target"),
    [
        (PlanSpec(budget=0.2), "ddpm_hindsight", "budget0.2"),
        (PlanSpec(budget=0.2, cost="flops"), "ddpm_hindsight", "budget0.2_flops"),
        (PlanSpec(budget=0.2, levels=("xs", "m"), order=1), "ddpm_hindsight_order-1_levels-xs+m", "budget0.2"),
        (PlanSpec(probabilities=(1, 0.5)), "ddpm_hindsight_probabilities-1+0.5", ""),
        (
            PlanSpec(delta=1, probabilities="learned", estimator="jump", coins="nested", seed=3, per_sample=True),
            "ddpm_jump_nested_probabilities-learned_seed-3_per_sample-True",
            "delta1",
        ),
    ],
)
def test_the_name_of_a_plan_says_all_that_is_not_usual(spec: PlanSpec, label: str, target: str) -> None:
    entry = Entry("ddpm", (2,), spec=spec)
    assert (entry.label, entry.target) == (label, target)


def test_a_sampler_that_is_listed_twice_is_refused() -> None:
    plans = [Entry("ddpm", (2,), spec=PlanSpec(budget=0.2, cost=cost)) for cost in ("seconds", "flops")]
    refuse_duplicates([*CHOICES, *plans])
    for twice, entries in (
        (
            (*plans, plans[1]),
            r"evaluation\.samplers\[1\] and evaluation\.samplers\[2\]: ddpm_hindsight at 2 steps, bud",
        ),
        ((Entry("ddim", (3, 3)),), r"evaluation\.samplers\[0\]: ddim at 3 steps is listed twice; list it once"),
    ):
        with pytest.raises(ValueError, match=f"^{entries}"):
            refuse_duplicates(twice)


def test_plans_alone_are_evaluated_on_a_family(trained: Path, shards: Shards, tmp_path: Path) -> None:
    """No level runs alone: no figure of the largest, and nothing at all while a level is trained."""
    family = Family.load(trained / "runs/tiny/family")
    plans = [Entry("ddpm", (2,), spec=PlanSpec(probabilities=p)) for p in ((1, 0.5), (1, 1))]
    evaluation = SamplerEvaluation(plans, range(3), tmp_path, reference_steps=3, batch_size=2)
    run_test(evaluation, Family(family.levels[:1]), shards, tmp_path)
    assert evaluation.rows == []
    assert not (tmp_path / "evaluation.json").exists()
    run_test(evaluation, family, shards, tmp_path)
    assert [(row["level"], row["dial"]) for row in rows(tmp_path)] == [("mlem", "")] * 2
    assert len(list((tmp_path / "grids").iterdir())) == 2
    assert (tmp_path / "error_vs_time.png").exists()
    assert not (tmp_path / "quality_vs_evaluations.png").exists()


def test_a_plan_that_cannot_be_made_names_its_entry(trained: Path) -> None:
    entries = [*CHOICES, Entry("ddpm", (2,), spec=PlanSpec(mse=0.1))]
    with pytest.raises(ValueError, match=r"^evaluation\.samplers\[3\]: this family of digits is not calibrated"):
        Lineup(Setup(Family.load(trained / "runs/tiny/family"), [[0, 1], [2]]), entries)
