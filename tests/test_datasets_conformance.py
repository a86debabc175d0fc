"""What every data set must do; a file in `mlem/data/datasets` is found and tested here without an entry of its own.

A data set that reads files says in `DataSet.example` how to write a few of them. Those of official archives are in
EXAMPLES instead.
"""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from mlem.data import DATASETS, Shards, classes_of, count_of, ensure, held_out_batches, make_source, prepare
from mlem.data.command import main
from mlem.data.datasets import celeba, cifar10
from mlem.data.options import Option, options_of
from mlem.data.sources import checked
from tests import archives
from tests.commands import REPOSITORY, environment
from tests.decoders import save_decoder

SHARDS = 4


def _cifar10(folder: Path) -> dict[str, Any]:
    archives.cifar10(folder / cifar10.ARCHIVE)
    return {"source": str(folder), "any_checksum": True}


def _celeba(folder: Path) -> dict[str, Any]:
    archives.celeba(folder, archives.faces(50))
    assert (folder / celeba.ARCHIVE).is_file()
    return {"source": str(folder), "any_checksum": True}


def _latents(folder: Path) -> dict[str, Any]:
    prepare("dead_leaves", folder / "leaves", progress=False, size=8, count=30)
    return {"source": str(folder / "leaves"), "decoder": str(save_decoder(folder / "vae", 3))}


EXAMPLES: dict[str, Callable[[Path], dict[str, Any]]] = {"cifar10": _cifar10, "celeba": _celeba, "latents": _latents}


class Example:
    """A small instance of a data set: its options, count and shard size, and the folder where it was prepared once."""

    def __init__(self, name: str, folder: Path) -> None:
        (folder / "source").mkdir(parents=True)
        self.name, self.whole, self.killed = name, folder / "whole", folder / "killed"
        self.options = EXAMPLES.get(name, DATASETS[name].example)(folder / "source")
        self.source = make_source(name, **self.options).open()
        self.shard_size = -(-self.source.count // SHARDS)
        assert self.prepare(self.whole) == self.source.count

    def prepare(self, out: Path, workers: int = 1) -> int:
        size = self.shard_size
        return prepare(self.name, out, shard_size=size, workers=workers, progress=False, wait=False, **self.options)

    @property
    def command(self) -> list[str]:
        """The same preparation on the command line, without --out."""
        known = options_of(DATASETS[self.name])
        words = [known[key].written(value).split(maxsplit=1) for key, value in self.options.items()]
        return [self.name, "--shard-size", str(self.shard_size), *(part for pair in words for part in pair)]


def contents(folder: Path) -> dict[str, bytes]:
    """Every visible file of a data set; hidden ones are locks and caches."""
    return {path.name: path.read_bytes() for path in folder.glob("[!.]*") if path.is_file()}


class Examples(dict[str, Example]):
    """Made when first asked for."""

    def __init__(self, factory: pytest.TempPathFactory) -> None:
        self._factory = factory

    def __missing__(self, name: str) -> Example:
        self[name] = Example(name, self._factory.mktemp(name))
        return self[name]


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Examples:
    return Examples(tmp_path_factory)


@pytest.fixture
def example(request: pytest.FixtureRequest, examples: Examples) -> Example:
    return examples[request.param]


every = pytest.mark.parametrize("example", DATASETS, indirect=True)

KILLED = """
import os, signal, sys
import sklearn.datasets, webdataset.writer  # once, and not in each child
from mlem.data.command import main

move = os.replace

def move_or_die(source, target):
    if str(target).endswith("shard-000002.tar"):
        os.kill(os.getpid(), signal.SIGKILL)
    move(source, target)

for arguments in eval(sys.argv[1]):
    if not (child := os.fork()):
        os.replace = move_or_die
        main(arguments)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL, arguments
"""
"""Prepares each data set in a process that is killed when its third shard is written, and not yet in its place."""


@pytest.fixture(scope="module")
def _killed(request: pytest.FixtureRequest, examples: Examples) -> None:
    """Of those that are tested, in one process, which imports once."""
    tested = [item for item in request.session.items if "_killed" in getattr(item, "fixturenames", ())]
    names = sorted({item.callspec.params["example"] for item in tested})  # type: ignore[attr-defined]
    commands = [[*examples[name].command, "--out", str(examples[name].killed)] for name in names]
    process = [sys.executable, "-c", textwrap.dedent(KILLED), repr(commands)]
    done = subprocess.run(process, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


# --- the images ---


@every
def test_images_do_not_depend_on_how_the_range_is_cut(example: Example) -> None:
    source, count = example.source, example.source.count
    whole, left_out = checked(source.images, 0, count, source.shape)
    assert not left_out
    third = count // 3
    parts = [checked(source.images, *ends, source.shape)[0] for ends in ((0, third), (third, count))]
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    assert len(np.unique(whole.reshape(count, -1), axis=0)) > 1


@every
def test_the_shards_hold_the_images_of_the_source(example: Example) -> None:
    shards = Shards.open(example.whole)
    assert (len(shards), shards.shape) == (example.source.count, example.source.shape)
    assert make_source(example.name, **example.options).shape == shards.shape
    expected = checked(example.source.images, 0, len(shards))[0]
    for i in range(0, len(shards), max(1, len(shards) // 50)):
        stored = shards.read(i)
        np.testing.assert_array_equal(stored if stored.ndim == 4 else stored.permute(1, 2, 0), expected[i])


@every
def test_labels_travel_with_the_images(example: Example) -> None:
    shards, labels = Shards.open(example.whole), example.source.labels
    (batch,) = held_out_batches(shards, np.arange(len(shards))[::-3], len(shards))
    assert shards.classes == example.source.classes
    if labels is None:
        assert "label" not in batch
        with pytest.raises(ValueError, match=r"have no labels$"):
            shards.labels([0])
        with pytest.raises(ValueError, match=r"was prepared without labels$"):
            classes_of(example.name, example.whole, **example.options)
        return
    assert classes_of(example.name, example.whole, **example.options) == labels.names
    expected = labels.checked(0, len(shards))
    assert len(np.unique(expected)) == len(labels.names), "an example needs every class"
    assert batch["label"].dtype == torch.int64
    np.testing.assert_array_equal(batch["label"], expected[batch["index"]])


# --- the same bytes ---


@every
def test_prepared_twice_gives_the_same_bytes(example: Example, tmp_path: Path) -> None:
    assert main([*example.command, "--out", str(tmp_path)]) == 0
    assert contents(tmp_path) == contents(example.whole)
    assert len(contents(tmp_path)) == SHARDS + 1


# not of latents: each process would import torch, for seconds, and calls the same function
@pytest.mark.parametrize("example", sorted(DATASETS.keys() - {"latents"}), indirect=True)
def test_processes_give_the_same_bytes(example: Example, tmp_path: Path) -> None:
    example.prepare(tmp_path, workers=2)
    assert contents(tmp_path) == contents(example.whole)


@every
@pytest.mark.usefixtures("_killed")
def test_killed_and_run_again_gives_the_same_bytes(example: Example) -> None:
    assert {"shard-000000.tar", "shard-000001.tar", "manifest.unfinished.json"} == set(contents(example.killed))
    kept = {path: path.stat().st_mtime_ns for path in example.killed.glob("*.tar")}
    assert example.prepare(example.killed) == example.source.count - 2 * example.shard_size
    assert contents(example.killed) == contents(example.whole)
    assert kept == {path: path.stat().st_mtime_ns for path in kept}
    assert not list(example.killed.glob(".*.tmp"))


@every
def test_what_is_prepared_is_opened_and_not_made_again(example: Example) -> None:
    before = {path: path.stat().st_mtime_ns for path in example.whole.iterdir()}
    assert len(ensure(example.name, example.whole, **example.options)) == example.source.count
    assert count_of(example.name, example.whole, **example.options) == example.source.count
    assert example.prepare(example.whole) == 0
    after = {path: path.stat().st_mtime_ns for path in example.whole.glob("*.tar")}
    assert after.items() <= before.items()


# --- the options ---


OPTIONS = [(name, option) for name, dataset in DATASETS.items() for option in options_of(dataset).values()]
each_option = pytest.mark.parametrize(("name", "option"), OPTIONS, ids=lambda value: getattr(value, "name", value))


@pytest.mark.parametrize("name", DATASETS)
def test_help_names_every_option(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([name, "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "--out FOLDER" in shown
    for option in options_of(DATASETS[name]).values():
        assert option.flag in shown
        assert option.help, f"{option.name} is not explained: add it under Args: in the docstring"
        assert option.help in shown
        if option.default is not None and option.kind is not bool:
            assert f"{option.help} (default: {option.default})" in shown


@each_option
def test_a_misspelt_option_is_named(name: str, option: Option, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match=rf"^unknown option of {name} '{option.name}_'; did you mean '{option.name}'"):
        make_source(name, **{f"{option.name}_": option.default})
    assert main([name, "--out", "x", f"{option.flag}_"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@each_option
def test_an_option_of_another_type_is_named(name: str, option: Option) -> None:
    null = " or null" if option.optional else ""
    with pytest.raises(ValueError, match=rf"^{option.name} must be of type {option.kind.__name__}{null}, got \[\]$"):
        make_source(name, **{option.name: []})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", DATASETS)
def test_a_yaml_offers_it_to_training(name: str) -> None:
    path = REPOSITORY / "configs/data" / f"{name}.yaml"
    assert path.is_file(), f"{path} is missing: data={name} would not be known"
    config: Any = OmegaConf.load(path)
    assert config.source == name
    assert config.keys() >= {"name", "source", "folder", "held_out", "options"}
    options = options_of(DATASETS[name])
    for key, value in config.options.items():
        options[key].check(value)
        assert value == options[key].default
