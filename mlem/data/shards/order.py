"""The order of images: the held-out split and the order of each training pass, as pure functions of their seeds."""

from __future__ import annotations

import numpy as np

__all__ = ["GROUP", "pass_order", "permutation", "random_words", "split"]

GROUP = 8  # shards shuffled together: this many files are read at a time
_SPLIT, _SHARDS, _IMAGES = range(3)  # purposes, so that no two uses share random words


def random_words(count: int, *key: int) -> np.ndarray:
    """(count,) uint64 words, a pure function of `key`.

    Raw Philox words: NumPy guarantees their stability across versions, unlike `Generator.permutation`.
    """
    return np.random.Philox(np.random.SeedSequence(key)).random_raw(count)


def permutation(count: int, *key: int) -> np.ndarray:
    """A uniform permutation of range(count), (count,) int64, a pure function of `key`."""
    return np.argsort(random_words(count, *key), kind="stable")


def split(count: int, held_out: int) -> tuple[np.ndarray, np.ndarray]:
    """Sorted (training, held-out) indices of a data set of `count` images; they depend only on these two numbers.

    A larger `held_out` holds out a superset. ValueError unless 0 <= held_out < count.
    """
    if not 0 <= held_out < count:
        raise ValueError(f"held_out must be in [0, {count - 1}] for {count} images, got {held_out}")
    chosen = permutation(count, _SPLIT, count)
    return np.sort(chosen[held_out:]), np.sort(chosen[:held_out])


def pass_order(indices: np.ndarray, shard_of: np.ndarray, *, seed: int, number: int) -> np.ndarray:
    """`indices` in the order of pass `number`: each exactly once, (len(indices),).

    Shards are shuffled and cut into groups of GROUP; images are shuffled within a group, so that reading stays
    inside a few files at a time. A data set of at most GROUP shards is shuffled fully.

    shard_of: (data set size,), the shard of each image.
    """
    shards, shard = np.unique(shard_of[indices], return_inverse=True)
    group = permutation(len(shards), _SHARDS, seed, number)[shard] // GROUP
    return indices[np.lexsort((random_words(len(indices), _IMAGES, seed, number), group))]
