"""docs/pipelines.md and examples/pipeline.py, on a small Stable Diffusion with a real text encoder."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler

import mlem
from mlem.interop.pipelines import accelerate
from tests.pipelines import PIPELINES, STABLE, seeded
from tests.test_your_own_family import blocks
from tests.text_encoders import clip, clip_tokenizer

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings(r"ignore:(?s).*steps_offset:FutureWarning"),
]
PAGE = "docs/pipelines.md"


def stable_diffusion(folder: Path) -> Any:
    """The pipeline with CLIP, whose vocabulary is written into the folder."""
    scheduler = DDIMScheduler(**STABLE, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    pipe = PIPELINES["StableDiffusionPipeline"].make(scheduler)
    pipe.register_modules(text_encoder=seeded(lambda: clip(12)), tokenizer=clip_tokenizer(folder))
    return pipe


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The pipeline, in a folder where a smaller network is saved too; calibrations are small, and kept there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    pipe = stable_diffusion(tmp_path / "tokenizer")
    PIPELINES["StableDiffusionPipeline"].small().save_pretrained(tmp_path / "models/small/unet")
    pipe.scheduler.save_pretrained(tmp_path / "models/small/scheduler")
    (tmp_path / "models/small/model_index.json").write_text(json.dumps({"unet": ["diffusers", "UNet2DConditionModel"]}))

    def quick(pipe: Any, **options: Any) -> Any:
        options.pop("budget")
        return accelerate(pipe, **options, images=2, times=4, plan=mlem.PlanSpec(budget=0.7, cost="flops"))

    monkeypatch.setattr(mlem, "accelerate", quick, raising=False)
    return pipe


def test_every_block_runs_in_order(places: Any, capsys: Any) -> None:
    small = PIPELINES["StableDiffusionPipeline"].small()
    names: dict[str, Any] = {"pipe": places, "small_network": small}
    found = blocks(PAGE)
    assert len(found) == 3
    with torch.no_grad():
        for block in found:
            exec(compile(block, PAGE, "exec"), names)
    assert "{'small': " in capsys.readouterr().out
    assert names["latents"].shape == (4, 4, 8, 8)


def test_the_line_of_the_readme(places: Any) -> None:
    (line,) = blocks("README.md")[1:]
    exec(compile(line, "README.md", "exec"), {"pipe": places, "mlem": mlem})
    assert type(places.unet) is not type(PIPELINES["StableDiffusionPipeline"].small())


def test_the_example(places: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """As it is typed, on a pipeline that diffusers saved."""
    places.save_pretrained(tmp_path / "pipeline")
    example = Path(__file__).parent.parent / "examples" / "pipeline.py"
    monkeypatch.setattr("sys.argv", [str(example), "pipeline", "models/small", "a lighthouse", "5"])
    runpy.run_path(str(example), run_name="__main__")
    assert "'relative error': " in capsys.readouterr().out
