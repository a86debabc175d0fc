"""Pipelines of diffusers whose network is one of several levels."""

from mlem.interop.pipelines.acceleration import Acceleration, accelerate, restore

__all__ = ["Acceleration", "accelerate", "restore"]
