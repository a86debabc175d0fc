"""Networks: building them by name and size, the classes that a file may name, and their cost."""

from mlem.networks.calling import argument_names, by_position
from mlem.networks.cost import evaluating, flops, parameters, seconds_per_image, to_channels_last
from mlem.networks.deep_cache import DeepCache, Reuse, deep_cache_in
from mlem.networks.dit import DIT_SIZES, dit
from mlem.networks.foreign import ForeignNetwork, read_foreign
from mlem.networks.registry import ARCHITECTURES, CLASSES, build, config_of, from_config, told
from mlem.networks.unet import SIZES, unet

__all__ = [
    "ARCHITECTURES",
    "CLASSES",
    "DIT_SIZES",
    "SIZES",
    "DeepCache",
    "ForeignNetwork",
    "Reuse",
    "argument_names",
    "build",
    "by_position",
    "config_of",
    "deep_cache_in",
    "dit",
    "evaluating",
    "flops",
    "from_config",
    "parameters",
    "read_foreign",
    "seconds_per_image",
    "to_channels_last",
    "told",
    "unet",
]
