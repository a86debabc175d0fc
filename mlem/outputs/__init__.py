"""Samples on disk: one PNG per index, written atomically, split over ranks, made once.

The files, and two commands:

    folder/settings.json     how they were made; other settings are rejected
    folder/00000012.png      sample 12; from 1000 on, sample 12345 is 00012/00012345.png
    folder/images.sha256     SHA-256 of every image; manifest.json counts them and vouches for this list
    folder/ledger.json       total cost of the runs so far
    folder/grid.png          the first samples side by side
    folder/samples.npz, shards/   the samples packed, if `format=` says so

    python -m mlem.outputs verify FOLDER
    python -m mlem.outputs merge OUT PART PART ..
"""

from mlem.outputs.folder import claim, finish, write_samples
from mlem.outputs.images import png_tree, read_pixels, read_png, sample_path, write_png
from mlem.outputs.manifest import Survey, survey, verify
from mlem.outputs.merge import merge
from mlem.outputs.packs import FORMATS, pack

__all__ = [
    "FORMATS",
    "Survey",
    "claim",
    "finish",
    "merge",
    "pack",
    "png_tree",
    "read_pixels",
    "read_png",
    "sample_path",
    "survey",
    "verify",
    "write_png",
    "write_samples",
]
