"""Accelerated pipelines: mistakes get one line each, and leave the pipeline as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.schedulers.scheduling_heun_discrete import HeunDiscreteScheduler

import mlem
from mlem.family import Family
from mlem.level import Level
from mlem.multilevel.plan import Plan
from mlem.multilevel.spec import PlanSpec
from tests.pipelines import PIPELINES, STABLE, seeded, text_unet, unet
from tests.test_pipelines import ALONE, QUICK, held, pictures, pipeline, traces

pytestmark = [  # of diffusers
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings(r"ignore:(?s).*steps_offset:FutureWarning"),
]


def _mistakes() -> dict[str, tuple[str, dict[str, Any], str]]:
    heun = {"scheduler": HeunDiscreteScheduler()}
    wide = seeded(lambda: PIPELINES["StableDiffusionPipeline"].network(1))
    labelled = seeded(lambda: unet(4, num_class_embeds=3))
    other_text = seeded(lambda: text_unet(4, cross_attention_dim=16))
    mine = Plan.given(torch.ones(4, 2))
    sd = "StableDiffusionPipeline"
    return {
        "scheduler": (sd, heun, r"a pipeline with HeunDiscreteScheduler cannot be accelerated; use DDIMScheduler, "),
        "latents": ("DDPMPipeline", {"small": wide}, r"small network small has in_channels=4, the pipeline's has 1"),
        "rows": (sd, {"plan": mine}, r"the plan has 4 rows, but this call makes 5 steps; pass budget="),
        "budget": (sd, {"plan": PlanSpec(budget=0.01, cost="flops")}, r"^a sample takes small .* ms, large .*no plan"),
        "levels": (
            sd,
            {"plan": Plan.given(torch.ones(5, 3))},
            r"the plan is for 3 levels \(unnamed\), but the n",
        ),
        "names": (
            sd,
            {"plan": Plan.given(torch.ones(5, 2), levels=("xs", "l"))},
            r"the plan is for 2 levels \(xs, l\), but the networks here are small, large",
        ),
        "solver": (
            sd,
            {"plan": Plan.given(torch.ones(5, 2), about={"solver": "diffusers:DPMSolverMultistepScheduler"})},
            r"the plan was made for diffusers:DPMSolverMultistepScheduler, but is used with diffusers:DDIMScheduler",
        ),
        "prediction": (
            "DDPMPipeline",
            {"small": _named("xs", prediction="v")},
            r"level xs predicts v under .*use",
        ),
        "noise": (
            "DDPMPipeline",
            {"small": _named("xs", mlem.NoiseSchedule.cosine())},
            r"level xs predicts eps under .*use one",
        ),
        "neither": (sd, {"plan": None}, r"^pass one of budget= and plan=, such as budget=0\.4$"),
        "coins": (
            sd,
            {"plan": Family.plan(probabilities=(1.0, 0.001), estimator="jump")},
            r"must run the large network at the first",
        ),
        "per sample": (
            sd,
            {"plan": Plan.draw(torch.full((5, 2), 0.5).index_fill(1, torch.tensor([0]), 1.0), per_sample=True)},
            r"a pipeline needs a plan shared by all samples",
        ),
        "conditions": (
            sd,
            {"small": seeded(lambda: PIPELINES["DDPMPipeline"].network(1))},
            r"small network small has ",
        ),
        "labels": (
            "DDPMPipeline",
            {"small": labelled},
            r"small does not take what this pipeline passes to its network: ",
        ),
        "text": (sd, {"small": other_text}, r"small does not take what this pipeline passes to its network: "),
        "name": ("DDPMPipeline", {"small": [_named("large")]}, r"a small network cannot be called large"),
    }


def _named(name: str, schedule: mlem.NoiseSchedule | None = None, prediction: str = "eps") -> Level:
    network = PIPELINES["DDPMPipeline"].small()
    return Level(name, network, schedule or mlem.NoiseSchedule.from_diffusers(STABLE), (1, 8, 8), prediction)


MISTAKES = (
    "levels",
    "names",
    "solver",
    "prediction",
    "noise",
    "scheduler",
    "latents",
    "rows",
    "budget",
    "neither",
    "coins",
    "per sample",
    "conditions",
    "labels",
    "text",
    "name",
)


@pytest.mark.parametrize("what", MISTAKES)
@torch.no_grad()
def test_mistakes_get_one_line(what: str, tmp_path: Path) -> None:
    mistakes = _mistakes()
    assert set(mistakes) == set(MISTAKES)
    name, options, message = mistakes[what]
    tiny, pipe = pipeline(name, "DDIM")
    before = traces(pipe)
    if scheduler := options.pop("scheduler", None):
        pipe.scheduler = scheduler
        before = traces(pipe)
    asked = {"small": tiny.small(), "plan": held(), "cache": tmp_path} | options
    with pytest.raises(ValueError, match=message), mlem.accelerate(pipe, **asked, **QUICK):
        pictures(tiny, pipe)
    assert traces(pipe)[0] == before[0]
    assert "step" not in vars(pipe.scheduler)


def test_a_misspelt_argument_names_its_nearest() -> None:
    misspelt: dict[str, Any] = {"smal": None, "budget": 0.5}
    with pytest.raises(TypeError, match=r"^accelerate\(\) has no argument 'smal'; did you mean small\?$"):
        mlem.accelerate(None, **misspelt)


def test_two_networks_are_left_to_the_pipeline() -> None:
    tiny, pipe = pipeline("WanPipeline", "flow Euler")
    pipe.transformer_2 = tiny.small()
    with pytest.raises(ValueError, match=r"WanPipeline already switches between two networks \(transformer_2"):
        mlem.accelerate(pipe, small=tiny.small(), budget=0.5)


def test_accelerated_twice_and_restored_twice(tmp_path: Path) -> None:
    tiny, pipe = pipeline("DDPMPipeline", "DDPM")
    mlem.accelerate(pipe, small=tiny.small(), plan=ALONE, cache=tmp_path)
    with pytest.raises(ValueError, match=r"this DDPMPipeline is already accelerated; call mlem\.restore\(pipe\) first"):
        mlem.accelerate(pipe, small=tiny.small(), plan=ALONE, cache=tmp_path)
    mlem.restore(pipe)
    with pytest.raises(ValueError, match=r"this DDPMPipeline is not accelerated"):
        mlem.restore(pipe)
