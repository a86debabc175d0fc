"""The order of training: every image once a pass, for any number of ranks and workers; exact resume."""

from __future__ import annotations

import itertools
import math
import pickle

import numpy as np
import pytest
import torch

from mlem.data import (
    BatchSource,
    Shards,
    ensure,
    held_out_batches,
    train_loader,
)
from mlem.data.shards.order import GROUP, pass_order, split


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    return ensure("digits", tmp_path_factory.mktemp("data") / "digits", progress=False)


def test_split_is_fixed():
    train, held_out = split(1797, 97)
    assert np.array_equal(np.sort(np.concatenate([train, held_out])), np.arange(1797))
    assert len(held_out) == 97
    assert set(split(1797, 5)[1]) < set(held_out)
    assert split(1797, 5)[1].tolist() == [276, 329, 580, 811, 1114]  # the same for every run, machine and version
    assert len(split(10, 0)[1]) == 0
    for held_out in (-1, 10):
        with pytest.raises(ValueError, match=rf"held_out must be in \[0, 9\] for 10 images, got {held_out}"):
            split(10, held_out)


def test_pass_order_reads_a_few_shards_at_a_time():
    shard_of = np.repeat(np.arange(40), 25)
    order = pass_order(np.arange(1000), shard_of, seed=0, number=0)
    assert np.array_equal(np.sort(order), np.arange(1000))
    groups = shard_of[order].reshape(5, GROUP * 25)
    assert all(len(set(group)) == GROUP for group in groups.tolist())
    assert len(set(shard_of[order[:25]].tolist())) > 3  # shuffled within the group, not shard after shard
    assert not np.array_equal(np.sort(np.unique(groups[0])), np.arange(GROUP))


def test_small_data_are_shuffled_uniformly():
    shard_of = np.repeat(np.arange(3), 2)
    orders = np.stack([pass_order(np.arange(6), shard_of, seed=3, number=n) for n in range(6000)])
    counts = np.stack([(orders == value).sum(0) for value in range(6)])  # value x place
    standard_error = math.sqrt(6000 * (1 / 6) * (5 / 6))
    assert np.abs(counts - 1000).max() < 4.5 * standard_error  # 36 places


few_cores = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")


def everything(digits: Shards, indices: np.ndarray, *, world_size: int, workers: int, stop: int, **options) -> dict:
    """All ranks' batches as one: "index" and "position" by (batch, place in the global batch)."""
    ranks = []
    for rank in range(world_size):
        options |= {"rank": rank, "world_size": world_size, "stop": stop}
        source = BatchSource(digits, indices, batch_size=64, seed=5, **options)
        ranks.append(list(train_loader(source, workers)))
        assert len(ranks[-1]) == len(source)
    return {name: torch.stack([torch.cat([b[name] for b in together]) for together in zip(*ranks, strict=True)])
            for name in ("image", "index", "position")}  # fmt: skip


@few_cores
@pytest.mark.parametrize(("world_size", "workers"), [(1, 0), (1, 2), (2, 0), (2, 2), (4, 3)])
def test_every_key_once_a_pass_for_any_world_size_and_workers(digits, world_size, workers):
    indices, _ = digits.split(97)
    batches = everything(digits, indices, world_size=world_size, workers=workers, stop=55)
    assert torch.equal(batches["position"].flatten(), torch.arange(55 * 64))  # batches in order, none twice
    index = batches["index"].flatten().numpy()
    passes = index[:1700], index[1700:3400]
    for one in passes:
        assert np.array_equal(np.sort(one), indices)
    assert not np.array_equal(*passes)
    alone = everything(digits, indices, world_size=1, workers=0, stop=55)
    for name, value in alone.items():
        assert torch.equal(batches[name], value)
    assert torch.equal(alone["image"][7], digits.images(alone["index"][7]))


@few_cores
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("start", [1, 27, 53])
def test_resume_equals_the_tail(digits, start, workers):
    indices, _ = digits.split(97)
    whole = everything(digits, indices, world_size=2, workers=0, stop=55)
    tail = everything(digits, indices, world_size=2, workers=workers, start=start, stop=55)
    for name, value in tail.items():
        assert torch.equal(value, whole[name][start:])


def test_seed_decides_the_order_and_global_randomness_nothing(digits):
    indices, _ = digits.split(97)
    state = torch.get_rng_state()
    first = next(iter(train_loader(BatchSource(digits, indices, batch_size=32, seed=0))))
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(123)
    again = next(iter(train_loader(BatchSource(digits, indices, batch_size=32, seed=0))))
    other = next(iter(train_loader(BatchSource(digits, indices, batch_size=32, seed=1))))
    assert torch.equal(first["index"], again["index"])
    assert not torch.equal(first["index"], other["index"])


def test_batch_larger_than_the_data_set(digits):
    batch = BatchSource(digits, np.arange(5, 15), batch_size=25, seed=0).batch(1)
    assert batch["position"].tolist() == list(range(25, 50))
    assert sorted(batch["index"][5:15].tolist()) == list(range(5, 15))


@few_cores
@pytest.mark.parametrize("workers", [0, 2])
def test_endless_source_has_no_length(digits, workers):
    source = BatchSource(digits, np.arange(10), batch_size=4, seed=0)
    with pytest.raises(TypeError, match="endless"):
        len(source)
    assert len(list(itertools.islice(train_loader(source, workers), 9))) == 9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 10, "world_size": 4}, "batch_size must be a multiple of world_size 4, got 10"),
        ({"batch_size": 0}, "batch_size must be a multiple of world_size 1, got 0"),
        ({"rank": 2, "world_size": 2}, "got rank 2 and world_size 2"),
        ({"seed": -1}, "seed must be >= 0, got -1"),
        ({"start": 5, "stop": 4}, "got start 5 and stop 4"),
        ({"indices": np.array([1, 1])}, "indices must be distinct"),
        ({"indices": np.array([1797])}, r"in \[0, 1796\]"),
        ({"indices": np.array([], int)}, "at least one image"),
    ],
)
def test_wrong_loader_options_are_named(digits, options, message):
    with pytest.raises(ValueError, match=message):
        BatchSource(digits, **{"indices": np.arange(100), "batch_size": 8, "seed": 0, **options})


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_held_out_images_come_exactly_once(digits, world_size):
    _, held_out = digits.split(98)
    loaders = [held_out_batches(digits, held_out, 16, rank, world_size) for rank in range(world_size)]
    batches = [batch for loader in loaders for batch in loader]
    assert len(batches) == sum(len(loader) for loader in loaders)
    position = torch.cat([batch["position"] for batch in batches])
    assert sorted(position.tolist()) == list(range(98))
    assert torch.equal(torch.cat([batch["index"] for batch in batches]), torch.from_numpy(held_out)[position])
    assert torch.equal(batches[-1]["image"], digits.images(batches[-1]["index"]))
    with pytest.raises(ValueError, match="2 held-out images cannot be split over 3 ranks"):
        held_out_batches(digits, held_out[:2], 16, 0, 3)


def test_pickled_shards_read_the_same(digits):
    digits.read(0)
    copy = pickle.loads(pickle.dumps(digits))
    assert torch.equal(copy.read(1796), digits.read(1796))
    with pytest.raises(IndexError, match="holds images 0 to 1796"):
        copy.read(-1)
