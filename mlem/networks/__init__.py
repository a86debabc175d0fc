"""Networks: how they are built by name and size, which classes a file may name, and what they cost."""

from mlem.networks.cost import evaluating, flops, parameters, seconds_per_image, to_channels_last
from mlem.networks.dit import DIT_SIZES, dit
from mlem.networks.registry import ARCHITECTURES, CLASSES, build, config_of, from_config, told
from mlem.networks.unet import SIZES, unet

__all__ = [
    "ARCHITECTURES",
    "CLASSES",
    "DIT_SIZES",
    "SIZES",
    "build",
    "config_of",
    "dit",
    "evaluating",
    "flops",
    "from_config",
    "parameters",
    "seconds_per_image",
    "to_channels_last",
    "told",
    "unet",
]
