"""Quality of samples: FID, KID, precision and recall; pathwise error, PSNR and SSIM to a reference.

Names are imported on first use: torchmetrics takes seconds to import, which `import mlem.metrics` and the command line
avoid.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlem.images import quantise
    from mlem.metrics.fid import FID, FewImagesWarning, Score, frechet_distance
    from mlem.metrics.kernel import kernel_distance
    from mlem.metrics.neighbours import precision_recall
    from mlem.metrics.pathwise import ImageMean, PathwiseError, mean_error, pathwise_error
    from mlem.metrics.random_features import RandomFeatures
    from mlem.metrics.reference import reference_path, reference_statistics
    from mlem.metrics.scores import Measure
    from mlem.metrics.similarity import psnr, ssim

_HOMES = {
    "FID": "mlem.metrics.fid",
    "FewImagesWarning": "mlem.metrics.fid",
    "ImageMean": "mlem.metrics.pathwise",
    "Measure": "mlem.metrics.scores",
    "PathwiseError": "mlem.metrics.pathwise",
    "RandomFeatures": "mlem.metrics.random_features",
    "Score": "mlem.metrics.fid",
    "frechet_distance": "mlem.metrics.fid",
    "kernel_distance": "mlem.metrics.kernel",
    "mean_error": "mlem.metrics.pathwise",
    "pathwise_error": "mlem.metrics.pathwise",
    "precision_recall": "mlem.metrics.neighbours",
    "psnr": "mlem.metrics.similarity",
    "quantise": "mlem.images",
    "reference_path": "mlem.metrics.reference",
    "reference_statistics": "mlem.metrics.reference",
    "ssim": "mlem.metrics.similarity",
}

__all__ = [
    "FID",
    "FewImagesWarning",
    "ImageMean",
    "Measure",
    "PathwiseError",
    "RandomFeatures",
    "Score",
    "frechet_distance",
    "kernel_distance",
    "mean_error",
    "pathwise_error",
    "precision_recall",
    "psnr",
    "quantise",
    "reference_path",
    "reference_statistics",
    "ssim",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
