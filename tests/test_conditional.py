"""Families that are told classes, from the command line: trained, evaluated, calibrated, learned from, resumed."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mlem.cli.resume import level_settings
from mlem.comparison.scaling import held_out_errors
from mlem.conditions import conditions_of
from mlem.data import Shards
from mlem.family import Family
from mlem.files import read_json
from mlem.level import Level
from mlem.metrics.denoising import denoising_errors
from mlem.multilevel import pilot
from mlem.multilevel.learning import Objective, frozen
from mlem.networks import build, dit, parameters, told, unet
from mlem.sampling import sample
from mlem.schedule import NoiseSchedule
from mlem.solvers import make_solver
from tests.commands import REPOSITORY, TRAIN, job, metrics, run_here, run_in
from tests.few_pilots import FEW
from tests.problems import level

OPTIONS = (*TRAIN, "model.conditional=true", "training.flip=true", "training.label_dropout=0.5")
RUN = Path("runs/digits/unet_xs")

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of diffusers


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a family of two conditional levels was trained and calibrated."""
    folder = tmp_path_factory.mktemp("conditional")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in FEW.items():
            patch.setattr(pilot, name, value)
        run_in(folder, lambda: run_here("train", *OPTIONS))
    return folder


def test_the_family_knows_its_classes_and_is_sampled_by_them(folder: Path) -> None:
    family = Family.load(folder / "runs/digits/family")
    assert [level.conditions for level in family.levels] == [{"class_labels": 10}] * 2
    assert family.levels[0].network.config.num_class_embeds == 11  # type: ignore[union-attr]
    assert family.fitted.has("calibration")
    x = sample(family, solver="ddim", steps=2, indices=range(3)).x
    turns = conditions_of(family.levels, None, torch.arange(3))[0]["class_labels"]
    same = sample(family, solver="ddim", steps=2, indices=range(3), conditions=lambda index: {"class_labels": turns}).x
    assert torch.equal(x, same)


def test_model_cards_say_how_levels_were_trained(folder: Path) -> None:
    card = (folder / "runs/digits/family/level_xs/README.md").read_text()
    for words in ("takes `class_labels` | the class, 0 to 9; 10 is no class", "| training | 4 steps, ", "| error | "):
        assert words in card
    assert 'ConsistencyModelPipeline.from_pretrained("level_xs")' in card
    assert 'from_pretrained("level")' in (folder / RUN / "level/README.md").read_text()
    assert "They take `class_labels`" in (folder / "runs/digits/family/README.md").read_text()


def test_the_code_on_model_cards_is_formatted(folder: Path) -> None:
    """As ruff formats it: cards that come with the package are checked with our own code."""
    command = [sys.executable, "-m", "ruff", "format", "--check", "--no-cache", "--config", "pyproject.toml"]
    cards = sorted((folder / "runs/digits/family").rglob("README.md"))
    done = subprocess.run([*command, *cards], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(cards)} files already formatted" in done.stdout


def test_a_resumed_run_repeats_an_uninterrupted_one(folder: Path, tmp_path: Path) -> None:
    """Labels, which of them are dropped, and which images are mirrored: four steps are two and two."""
    shutil.copytree(folder, tmp_path / "again")
    run = tmp_path / "again" / RUN
    shutil.rmtree(run / "level")
    for path in (run / "checkpoints").glob("step-00000004.ckpt*"):
        path.unlink()
    printed = run_in(tmp_path / "again", lambda: run_here("train", *OPTIONS))
    assert f"xs: resuming from {RUN}/checkpoints/step-00000002.ckpt" in printed
    whole = Level.load(folder / RUN / "level")
    resumed = Level.load(run / "level")
    for name, weights in whole.network.state_dict().items():
        assert torch.equal(resumed.network.state_dict()[name], weights), name
    assert resumed.measured["error"] == whole.measured["error"]


def test_errors_are_those_of_the_true_labels(folder: Path) -> None:
    """The validation of a level, and the test of the family."""
    level, shards = Level.load(folder / RUN / "level"), Shards.open(folder / "data/digits")
    index = torch.tensor(shards.split(16)[1])
    images, labels = shards.images(index.tolist()), shards.labels(index.tolist())
    with torch.no_grad():
        denoiser = level.denoiser.given({"class_labels": labels})
        errors = denoising_errors(denoiser, level.schedule, images, index, 0)
    expected = torch.stack([*errors.values()]).mean().item()
    assert level.measured["error"] == pytest.approx(expected, rel=1e-5)
    (tested,) = [
        line["test/xs/error"] for line in metrics(folder / "runs/digits/metrics.jsonl") if "test/xs/error" in line
    ]
    assert tested == pytest.approx(expected, rel=1e-5)
    family = Family.load(folder / "runs/digits/family")
    assert held_out_errors(family, images, index, labels=labels)[0].mean() == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match="takes class_labels, which the images of this data set do not have"):
        held_out_errors(family, images, index)


@pytest.mark.parametrize("tangents", ["exact", "reverse"])
def test_coefficients_are_learned(folder: Path, tmp_path: Path, tangents: str) -> None:
    options = ("model=coefficients", "trainer=cpu", "logger=jsonl", "model.steps=3", "model.budget=0.6")
    options += ("model.updates=2", "model.batch_size=2", "model.images=2", "model.draws=2", "model.held_out=2")
    options += (f"model.tangents={tangents}", "evaluation.reference_steps=4", f"root={tmp_path}")
    shutil.copytree(folder / "runs/digits/family", tmp_path / "family")
    run_in(tmp_path, lambda: run_here("train", *options, f"family={tmp_path}/family"))
    assert read_json(tmp_path / "family/coefficients.json")["about"]["updates"] == 2


def test_coefficients_pass_through_attention(tmp_path: Path) -> None:
    """Forward mode through transformers and through a UNet with attention, against differences."""
    torch.manual_seed(0)
    schedule, shape = NoiseSchedule.cosine(), (1, 32, 32)
    small, large = unet("xs", shape, attention=True, classes=3), dit("s", shape, classes=3)
    for network in (small, large):
        for weights in network.parameters():
            torch.nn.init.normal_(weights, std=0.05)
    levels = [
        Level(name, network, schedule, shape, conditions=told("dit", 3))
        for name, network in (("a", small), ("b", large))
    ]
    family, solver = Family(levels), make_solver("ddim")
    objective = Objective(
        frozen(family),
        schedule,
        shape,
        solver,
        solver.grid(schedule, 3),
        torch.tensor([0.5, 1.0]),
        conditions=lambda indices: conditions_of(levels, None, indices),
    )
    theta, indices = torch.tensor([[0.0], [0.0]], dtype=torch.float64), torch.arange(2)
    truth = objective.reference(indices)
    counts = torch.ones(2, 3, 2, dtype=torch.int64)
    mse, slopes = objective.differentiate(theta, counts, indices, truth, None)
    step = torch.tensor([[0.0], [1e-3]], dtype=torch.float64)
    with torch.no_grad():
        moved = [
            objective.errors(
                objective.weights(counts, objective.probabilities(theta + sign * step)).to(truth),
                counts,
                indices.expand(2, -1),
                truth.expand(2, *truth.shape),
            ).mean(1)
            for sign in (1, -1)
        ]
    torch.testing.assert_close(slopes[:, 1, 0], (moved[0] - moved[1]) / 2e-3, rtol=1e-3, atol=0.0)
    assert mse.min() > 0


def test_a_family_of_transformers_from_the_command_line(tmp_path: Path) -> None:
    """Without classes: they are told one that all images have."""
    options = [one for one in TRAIN if not one.startswith(("model", "evaluation.samplers", "calibration.images"))]
    samplers = "evaluation.samplers=[{solver:ddim,steps:[2]}]"
    run_in(tmp_path, lambda: run_here("train", *options, "model=dit_s", "calibration.images=0", samplers))
    level = Level.load(tmp_path / "runs/digits/dit_s/level")
    assert (level.conditions, level.network.config.num_layers) == ({"class_labels": 1}, 4)  # type: ignore[union-attr]
    assert read_json(tmp_path / "runs/digits/dit_s/level/config.json")["_class_name"] == "DiTTransformer2DModel"
    x = sample(level, solver="ddim", steps=3, indices=range(5)).x
    torch.testing.assert_close(sample(level, solver="ddim", steps=3, indices=[3]).x, x[3:4], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("data=dead_leaves",), r"^model\.conditional=true: data set dead_leaves has no labels$"),
        (
            ("data=cifar10",),
            r"^model\.conditional=true: data/cifar10 holds no data, and no source of cifar10 is given",
        ),
    ],
)
def test_classes_that_are_not_there_are_said(options: tuple[str, ...], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        run_in(tmp_path, lambda: run_here("train", *options, "model.conditional=true", "dry_run=true"))


def test_dry_run_of_conditional_networks(tmp_path: Path) -> None:
    printed = run_in(tmp_path, lambda: run_here("train", "model=unet_xs", "model.conditional=true", "dry_run=true"))
    assert "xs: 40,841 parameters, 1.9 MFLOPs per image, about " in printed


def test_the_top_of_cifar10_is_the_published_network_and_recipe() -> None:
    """Ho et al., arXiv:2006.11239, section 4 and appendix B."""
    asked = job("train", "experiment=cifar10")
    with torch.device("meta"):
        network = build(asked.model.architecture, asked.model.sizes[-1], (3, 32, 32), attention=asked.model.attention)
    assert parameters(network) == 35_746_307
    model, training = asked.model, asked.training
    assert (model.attention, model.dropout, model.prediction, asked.schedule["kind"]) == (True, 0.1, "eps", "linear")
    assert (training.batch_size, training.steps, training.learning_rate) == (128, 800_000, 2e-4)
    assert (training.warmup_steps, training.final_rate, training.gradient_clip) == (5000, 1.0, 1.0)
    assert (training.beta2, training.weight_decay, training.average_decay, training.flip) == (0.999, 0.0, 0.9999, True)


def test_settings_of_older_runs_agree() -> None:
    """They have none of the options that came later; at their defaults these change nothing."""
    old = {"model": {"prediction": "v", "dropout": 0.0}}
    assert set(old["model"]) == set(_settings_of("model=unet_xs")["model"])
    training = _settings_of("model=unet_xs")["training"]
    assert not {"flip", "label_dropout", "beta2", "final_rate"} & set(training)
    changed = _settings_of("model=unet_xs", "training.flip=true", "training.beta2=0.999", "model.conditional=true")
    assert (changed["training"]["flip"], changed["training"]["beta2"]) == (True, 0.999)
    assert changed["model"]["conditional"] is True


def _settings_of(*options: str) -> dict[str, Any]:
    asked = job("train", "trainer=cpu", *options)
    return level_settings(asked, level("xs"), 1)
