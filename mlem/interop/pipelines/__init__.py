"""diffusers pipelines accelerated by smaller networks."""

from mlem.interop.pipelines.acceleration import Acceleration, accelerate, restore

__all__ = ["Acceleration", "accelerate", "restore"]
