"""How good the samples are: FID, and the pathwise error to a reference. Names are loaded when first used.

The torchmetrics import takes seconds, so neither `import mlem.metrics` nor the command line pays for it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlem.images import quantise
    from mlem.metrics.fid import FID, FewImagesWarning, FIDResult, frechet_distance, reference_statistics
    from mlem.metrics.pathwise import PathwiseError, pathwise_error
    from mlem.metrics.random_features import RandomFeatures

_HOMES = {
    "FID": "mlem.metrics.fid",
    "FIDResult": "mlem.metrics.fid",
    "FewImagesWarning": "mlem.metrics.fid",
    "PathwiseError": "mlem.metrics.pathwise",
    "RandomFeatures": "mlem.metrics.random_features",
    "frechet_distance": "mlem.metrics.fid",
    "pathwise_error": "mlem.metrics.pathwise",
    "quantise": "mlem.images",
    "reference_statistics": "mlem.metrics.fid",
}

__all__ = [
    "FID",
    "FIDResult",
    "FewImagesWarning",
    "PathwiseError",
    "RandomFeatures",
    "frechet_distance",
    "pathwise_error",
    "quantise",
    "reference_statistics",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
