"""Bridges to other libraries, one file each."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlem.interop.schedulers import RandomizedMidpointScheduler as RandomizedMidpointScheduler

__all__ = ["RandomizedMidpointScheduler"]


def __getattr__(name: str) -> object:
    # diffusers takes seconds to import
    if name not in __all__:
        raise AttributeError(f"module 'mlem.interop' has no attribute {name!r}")
    from mlem.interop import schedulers

    return getattr(schedulers, name)
