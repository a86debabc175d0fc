"""Folders of levels and families as other people open them: with diffusers alone, and by their model cards.

A card's own blocks run, in fewer steps, and give what `sample` gives from the same noise.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import yaml
from diffusers.pipelines.consistency_models.pipeline_consistency_models import ConsistencyModelPipeline
from diffusers.pipelines.ddim.pipeline_ddim import DDIMPipeline
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import Tensor, nn

import mlem
from mlem.data import DATASETS
from mlem.family import Family
from mlem.files import read_json
from mlem.level import Level
from mlem.networks import dit, unet
from mlem.predictions import Eps
from mlem.sampling import sample
from mlem.schedule import NoiseSchedule
from tests.problems import level
from tests.test_foreign import seeded, text_unet

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # of diffusers
]
SCHEDULES = {
    "cosine": NoiseSchedule.cosine(),
    "linear": NoiseSchedule.linear(),
    "of 100 timesteps": NoiseSchedule.linear(1e-3, 0.2, 100),
    "edm": NoiseSchedule.edm(),
    "flow": NoiseSchedule.flow(3.0),
    "squaredcos": NoiseSchedule.from_diffusers({"beta_schedule": "squaredcos_cap_v2"}),
    "zero_snr": NoiseSchedule.from_diffusers({"beta_schedule": "scaled_linear", "rescale_betas_zero_snr": True}),
}
PREDICTIONS = ("v", "eps", "x0", "edm", "flow")
"""What mlem trains."""
NO_SCHEDULER = [("edm", "flow"), ("edm", "zero_snr")]
NEEDS_SIGNAL = [("eps", "flow"), ("eps", "zero_snr")]
TABLE = [(p, s) for p in PREDICTIONS for s in SCHEDULES if (p, s) not in NO_SCHEDULER + NEEDS_SIGNAL]


class Card:
    """The README.md of a folder."""

    def __init__(self, folder: Path) -> None:
        text = (folder / "README.md").read_text()
        _, head, self.text = text.split("---\n", 2)
        self.head = yaml.safe_load(head)
        self.blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)

    def run(self, number: int, **names: Any) -> dict[str, Any]:
        """The names after a block, in 10 steps for 50."""
        block, count = re.subn(r"\b50\b", "10", self.blocks[number])
        assert count == 1
        exec(compile(block, "README.md", "exec"), names)
        return names


@pytest.fixture
def card_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Level], Card]:
    """Saves a level in `level` of the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(DiffusionPipeline, "_progress_bar_config", {"disable": True}, raising=False)

    def save(made: Level) -> Card:
        made.save("level")
        return Card(tmp_path / "level")

    return save


def assert_alike(card: Card, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Both blocks of a card give the same from the same noise, to 1e-5 of the largest number."""
    last: dict[str, Tensor] = {}
    scheduler = getattr(diffusers, re.findall(r"\w+Scheduler", (card.text + scheduler_of(card)))[0])
    step = scheduler.step

    def noted(self: Any, *args: Any, **options: Any) -> Any:
        found = step(self, *args, **options)
        last["x"] = found[0] if isinstance(found, tuple) else found.prev_sample
        return found

    with monkeypatch.context() as patched, torch.random.fork_rng(devices=[]):
        patched.setattr(scheduler, "step", noted)
        torch.manual_seed(0)
        images = card.run(1)["images"]
        torch.manual_seed(0)
        z = torch.randn(4, *shape)
        patched.setattr(mlem, "sample", functools.partial(sample, start=lambda indices, own: z[indices]))
        x = card.run(0)["x"]
    assert len(images) == 4
    assert (last["x"] - x).abs().max() < 1e-5 * x.abs().max()


def scheduler_of(card: Card) -> str:
    path = Path("level/scheduler_config.json")
    return read_json(path)["_class_name"] if path.exists() else ""


@functools.cache
def network(classes: int = 0, shape: tuple[int, int, int] = (1, 8, 8)) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return unet("xs", shape, classes=classes).eval()


@pytest.mark.parametrize(("prediction", "schedule"), TABLE)
def test_diffusers_gives_what_sample_gives(
    prediction: str, schedule: str, card_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = card_of(Level("xs", network(), SCHEDULES[schedule], (1, 8, 8), prediction))
    is_pipeline = prediction in ("v", "eps", "x0")
    assert ("DDIMPipeline.from_pretrained" in card.blocks[1]) == is_pipeline == Path("level/model_index.json").exists()
    assert_alike(card, (1, 8, 8), monkeypatch)


COSINE, FLOW = SCHEDULES["cosine"], SCHEDULES["flow"]
LABELLED: dict[str, tuple[Callable[[], Any], tuple[int, int, int], int]] = {
    "unet": (lambda: network(3), (1, 8, 8), 3),
    "unet, not square": (lambda: network(3, (1, 8, 12)), (1, 8, 12), 3),
    "dit": (lambda: seeded(lambda: dit("s", (1, 8, 8), classes=3)), (1, 8, 8), 3),
    "dit of one class": (lambda: seeded(lambda: dit("s", (1, 8, 8))), (1, 8, 8), 1),
}


@pytest.mark.parametrize(("prediction", "schedule"), [("v", "cosine"), ("edm", "edm"), ("flow", "flow")])
@pytest.mark.parametrize("kind", LABELLED)
def test_diffusers_samples_by_label(
    kind: str, prediction: str, schedule: str, card_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, shape, classes = LABELLED[kind]
    conditions = {"class_labels": classes}
    card = card_of(Level("xs", make(), SCHEDULES[schedule], shape, prediction, conditions=conditions))
    assert ("ConsistencyModelPipeline" in card.blocks[1]) == ((kind, prediction) == ("unet", "v"))
    assert ("| the class, 0 to 2; 3 is no class |" in card.text) == (classes == 3)
    assert_alike(card, shape, monkeypatch)


def test_a_folder_is_the_pipeline_that_its_index_names(card_of: Any) -> None:
    card_of(level())
    assert type(DiffusionPipeline.from_pretrained("level")) is DDIMPipeline
    card_of(level(prediction=Eps(clip=1.0)))
    assert type(DiffusionPipeline.from_pretrained("level")) is diffusers.DDPMPipeline
    card_of(Level("xs", network(3), COSINE, (1, 8, 8), conditions={"class_labels": 3}))
    pipe = DiffusionPipeline.from_pretrained("level")
    assert type(pipe) is ConsistencyModelPipeline
    by_label = [pipe(1, [n], 3, generator=torch.manual_seed(0), output_type="np").images for n in range(3)]
    assert abs(by_label[0] - by_label[1]).max() > 1e-4
    with pytest.raises(ValueError, match="class_labels should be provided"):
        DDIMPipeline.from_pretrained("level")(num_inference_steps=2)


@pytest.mark.parametrize(("prediction", "schedule"), [("edm", "edm"), ("flow", "flow"), ("sit", "flow")])
def test_a_pipeline_that_would_sample_wrongly_does_not_open(prediction: str, schedule: str, card_of: Any) -> None:
    """DDIMPipeline makes DDIM of any scheduler. What a level leaves behind that was there before is no help either."""
    card_of(level())
    card_of(level(prediction=prediction, schedule=SCHEDULES[schedule]))
    with pytest.raises(OSError, match=r"no file named model_index\.json"):
        DDIMPipeline.from_pretrained("level")
    assert Path("level/scheduler_config.json").exists() == (prediction != "sit")


def test_latents_and_parts_of_a_picture_are_no_pipeline(card_of: Any) -> None:
    """A pipeline's images would be no pictures, or of the size that the network was built for."""
    for made in (level(shape=(4, 8, 8)), Level("xs", network(), COSINE, (1, 16, 16))):
        card = card_of(made)
        assert not Path("level/model_index.json").exists()
        names = card.run(1)
        assert names["x"].shape == (4, *made.shape)
        assert ("images" in names) == (made.shape[0] == 1)


def test_clipped_samples_come_from_the_pipeline_of_ddpm(card_of: Any) -> None:
    card = card_of(level(prediction=Eps(clip=1.0)))
    assert len(card.run(1)["images"]) == len(card.run(0)["x"]) == 4
    assert "diffusers draws the noise of every step" in card.text


def test_folders_of_before_are_read(card_of: Any) -> None:
    """Without card and index; square pictures of two numbers, which the pipeline of labels cannot make."""
    old = Level("xs", network(3), COSINE, (1, 8, 8), conditions={"class_labels": 3})
    old.network.register_to_config(sample_size=[8, 8])
    try:
        card = card_of(old)
    finally:
        old.network.register_to_config(sample_size=8)
    assert not Path("level/model_index.json").exists()
    assert card.run(1)["images"].shape == (4, 1, 8, 8)
    Path("level/README.md").unlink()
    again = Level.load("level")
    options: dict[str, Any] = {"indices": range(2), "steps": 2}
    assert torch.equal(sample(again, **options).x, sample(old, **options).x)


def test_a_pipeline_in_one_folder_is_read(card_of: Any) -> None:
    """Ours, and those of others that lie so, such as google/ddpm-cifar10-32."""
    old = level(prediction="eps", schedule=NoiseSchedule.linear())
    card_of(old)
    new = Level.from_diffusers("level")
    options: dict[str, Any] = {"solver": "ddim", "grid": "trailing", "indices": range(2), "steps": 5}
    found, due = sample(new, **options).x, sample(old, **options).x
    assert (found - due).abs().max() < 1e-5 * due.abs().max()


def test_a_card_says_what_is_known(card_of: Any) -> None:
    measured = {"steps": 2000, "training_seconds": 31.2, "error": 0.12345, "seconds": 2e-4, "batch_size": 64}
    measured |= {"device": "cpu", "fid": 3.2}
    options: dict[str, Any] = {"data": "digits", "measured": measured}
    card = card_of(Level("xs", network(), NoiseSchedule.linear(), (1, 8, 8), **options))
    tags = {"tags": ["diffusion", "mlem"], "pipeline_tag": "unconditional-image-generation"}
    assert card.head == {"license": "unknown", "library_name": "diffusers", **tags}
    for row in (
        "# xs, a diffusion model of digits\n",
        "| data set | digits; a sample has shape (1, 8, 8) |",
        "| licence of the data set | not stated |",
        "| network | UNet2DModel, 40,489 parameters, 1.889 MFLOPs per call |",
        "| predicts | `v` |",
        "| noise schedule | linear, beta_start 0.0001, beta_end 0.02, num_timesteps 1000 |",
        "| training | 2,000 steps, 31 s |",
        "| error | 0.1235: mean squared error of the noise estimate on held-out samples |",
        "| time per call | 0.2 ms per sample in batches of 64 on cpu |",
        "| fid | 3.2 |",
    ):
        assert row in card.text


def test_a_licence_is_kept_and_told(card_of: Any) -> None:
    card_of(level(licence="cc-by-4.0"))
    assert Level.load("level").licence == "cc-by-4.0"
    card = card_of(Level.load("level"))
    assert card.head["license"] == "cc-by-4.0"
    assert "| licence of the data set | cc-by-4.0 |" in card.text
    words = 'no "use" | at\nall'
    card = card_of(level(licence=words))
    assert (card.head["license"], card.head["license_name"]) == ("other", words)
    assert '| licence of the data set | no "use" \\| at all |' in card.text


def test_what_was_measured_may_be_anything(card_of: Any) -> None:
    """It is the user's own."""
    card = card_of(level(data="a\n|b", measured={"steps": None, "error": "n/a", "seconds": [1], "a|b": {"c": 1}}))
    assert "| training | None steps |" in card.text
    assert "| a\\|b | {'c': 1} |" in card.text


class Own(nn.Module):
    """No network of diffusers."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return self.weight * x


def test_a_card_of_another_network(card_of: Any) -> None:
    card = card_of(Level("own", Own(), COSINE, (5,), flops=1))
    assert "library_name" not in card.head
    assert f"# this folder; network: a new {__name__}.Own" in card.blocks[0]
    assert card.run(0, network=Own())["x"].shape == (4, 5)
    assert len(card.blocks) == 1
    conditions = {"encoder_hidden_states": (None, 12)}
    card = card_of(Level("text", seeded(text_unet), COSINE, (4, 8, 8), conditions=conditions))
    assert "| takes `encoder_hidden_states` | rows of shape (n, 12) |" in card.text
    assert '`UNet2DConditionModel.from_pretrained("level")` is the network for the pipeline of its class.' in card.text
    rows = torch.ones(4, 2, 12)
    assert card.run(0, conditions=lambda indices: {"encoder_hidden_states": rows[indices]})["x"].shape == (4, 4, 8, 8)
    card = card_of(level(prediction="sit", schedule=FLOW))
    assert "No diffusers scheduler fits this network, whose prediction is `sit`." in card.text


def test_a_family_has_a_card_and_its_levels_are_pipelines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    options: dict[str, Any] = {"data": "digits", "licence": "mit"}
    Family([level("xs", measured={"steps": 30, "error": 0.5}, **options), level("s", **options)]).save("family")
    card = Card(tmp_path / "family")
    assert card.head["license"] == "mit"
    assert "# A family of diffusion models of digits\n" in card.text
    assert "| [xs](level_xs/README.md) | 40,489 | 1.889 |  | 0.5 | 30 |" in card.text
    assert "Licence of the data set: mit." in card.text
    assert card.run(0)["x"].shape == (4, 1, 8, 8)
    for name in ("xs", "s"):
        assert f'DDIMPipeline.from_pretrained("level_{name}")' in (Card(tmp_path / f"family/level_{name}").blocks[1])
        assert type(DiffusionPipeline.from_pretrained(f"family/level_{name}")) is DDIMPipeline


def test_licences_of_data_sets_are_known_where_their_sources_say_them() -> None:
    assert {name: kind.licence for name, kind in DATASETS.items() if kind.licence} == {
        "celeba": "for non-commercial research only"
    }
