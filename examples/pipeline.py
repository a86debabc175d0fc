"""A diffusers pipeline, from its folder, accelerated by a smaller network: cost and difference to the original.

    python examples/pipeline.py PIPELINE SMALL "a lighthouse in a storm" [STEPS]

PIPELINE and SMALL are folders saved by diffusers: a pipeline, and a smaller model or pipeline for the same latents.
"""

import sys
import time
from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline

import mlem


def compare(pipe: Any, small: str, steps: int, **inputs: Any) -> dict[str, float]:
    """Seconds with and without acceleration, and the mean squared difference of the images over their mean square."""

    def run() -> tuple[torch.Tensor, float]:
        begin = time.perf_counter()
        found = pipe(**inputs, num_inference_steps=steps, generator=torch.Generator().manual_seed(0), output_type="np")
        return torch.as_tensor(found.images), time.perf_counter() - begin

    run()
    own, alone = run()
    with mlem.accelerate(pipe, small=small, budget=0.5):
        run()  # calibrates
        found, seconds = run()
    error = (found - own).square().mean() / own.square().mean()
    return {"seconds alone": alone, "seconds accelerated": seconds, "relative error": float(error)}


if __name__ == "__main__":
    folder, small, prompt, *steps = sys.argv[1:]
    pipeline = DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    print(compare(pipeline, small, int(steps[0]) if steps else 32, prompt=prompt))
