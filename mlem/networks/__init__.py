"""Networks: how they are built by name and size, and what they cost."""

from mlem.networks.cost import evaluating, flops, parameters, seconds_per_image
from mlem.networks.unet import SIZES, unet

__all__ = ["SIZES", "evaluating", "flops", "parameters", "seconds_per_image", "unet"]
