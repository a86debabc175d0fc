"""Data: preparing image data sets as verified WebDataset shards, and reading them for training.

    python -m mlem.data digits --out data/digits

A data set is a file in `mlem.data.datasets`; adding the file is enough. `mlem.data.shards` writes and reads the shards.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING

os.environ["WDS_SECURE"] = "1"  # before any import of webdataset: it would run `pipe:` addresses in a shell

from mlem.data.datasets import DATASETS
from mlem.data.preparing import (
    SHARD_SIZE,
    classes_of,
    count_of,
    decoder_of,
    ensure,
    make_source,
    prepare,
    size_of,
)
from mlem.data.shards.writing import write_shards
from mlem.data.sources import DataSet, Labels, Source, Stored

if TYPE_CHECKING:
    from mlem.data.shards.loading import Batch as Batch
    from mlem.data.shards.loading import BatchSource as BatchSource
    from mlem.data.shards.loading import held_out_batches as held_out_batches
    from mlem.data.shards.loading import train_loader as train_loader
    from mlem.data.shards.reading import Shards as Shards

__all__ = [
    "DATASETS",
    "SHARD_SIZE",
    "Batch",
    "BatchSource",
    "DataSet",
    "Labels",
    "Shards",
    "Source",
    "Stored",
    "classes_of",
    "count_of",
    "decoder_of",
    "ensure",
    "held_out_batches",
    "make_source",
    "prepare",
    "size_of",
    "train_loader",
    "write_shards",
]

_HOMES = {
    "Batch": "shards.loading",
    "BatchSource": "shards.loading",
    "Shards": "shards.reading",
    "held_out_batches": "shards.loading",
    "train_loader": "shards.loading",
}


def __getattr__(name: str) -> object:
    # torch takes seconds to import, which processes that only prepare images should not wait for
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
