"""Families on disk: exact round trips, diffusers' own loader, and every way in which a file can be wrong."""

from __future__ import annotations

import functools
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DModel
from safetensors.torch import load_file, save_file
from torch import nn

from mlem import family as family_module
from mlem.family import Family
from mlem.files import read_json, sha256
from mlem.level import WEIGHTS, Level
from mlem.predictions import V
from mlem.schedule import NoiseSchedule
from mlem.weights import read_weights
from tests.commands import execute_code
from tests.problems import level


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved level."""
    level().save(tmp_path)
    return tmp_path


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Edit a file as who means it does: checksums of it are removed."""
    about = read_json(path)  # without its own
    change(about)
    path.write_text(json.dumps(about))
    if path.name == "config.json":
        edit_json(path.with_name("mlem.json"), lambda about: about.pop("config_sha256", None))


def replace_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Edit the tensors of a saved level, and its checksum, so that only the tensors are wrong."""
    weights = load_file(folder / WEIGHTS)
    change(weights)
    save_file(weights, folder / WEIGHTS)
    edit_json(folder / "mlem.json", lambda about: about.update(sha256=sha256(folder / WEIGHTS)))


def assert_same_weights(a: nn.Module, b: nn.Module) -> None:
    ours, theirs = a.state_dict(), b.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


# --- round trips ---------------------------------------------------------------------------------------------------


def test_save_and_load_are_exact(tmp_path: Path) -> None:
    schedule = NoiseSchedule.from_diffusers({"beta_schedule": "squaredcos_cap_v2"})
    options: dict[str, Any] = {"schedule": schedule, "prediction": "eps", "data": "digits"}
    family = Family([level("xs", **options), level("s", measured={"error": 0.1, "steps": 30}, **options)])
    family.save(tmp_path / "family")
    again = Family.load(tmp_path / "family")
    assert again.names == ["xs", "s"]
    assert (again.shape, again.data) == ((1, 8, 8), "digits")
    assert again.schedule.fingerprint == schedule.fingerprint
    for old, new in zip(family.levels, again.levels, strict=True):
        assert_same_weights(old.network, new.network)
        assert (old.common(), old.measured, old.flops, old.parameters) == (
            new.common(),
            new.measured,
            new.flops,
            new.parameters,
        )
        x, t = torch.ones(2, 1, 8, 8), torch.tensor([0.1, 1.0])
        with torch.no_grad():
            assert torch.equal(old.denoiser(x, t), new.denoiser(x, t))
        assert not new.network.training


@pytest.mark.usefixtures("float64")
def test_float64_weights_stay_exact(tmp_path: Path) -> None:
    first = level()
    first.save(tmp_path)
    assert_same_weights(first.network, Level.load(tmp_path).network)


def test_diffusers_loads_a_level(folder: Path) -> None:
    theirs, ours = UNet2DModel.from_pretrained(folder, use_safetensors=True), Level.load(folder).network
    x, timestep = torch.ones(2, 1, 8, 8), torch.tensor([0, 500])
    with torch.no_grad():
        torch.testing.assert_close(theirs(x, timestep).sample, ours(x, timestep).sample, rtol=0, atol=1e-6)


def test_saving_again_replaces(tmp_path: Path) -> None:
    Family([level("xs"), level("s")]).save(tmp_path)
    Family([level("s", seed=1)]).save(tmp_path)
    again = Family.load(tmp_path)
    assert again.names == ["s"]
    assert_same_weights(again.levels[0].network, level("s", seed=1).network)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["README.md", "family.json", "level_s"]


@functools.cache
def pair(seed: int) -> Family:
    return Family([level("xs", seed=seed), level("s", seed=seed)])


def test_a_save_that_fails_leaves_the_old_family(tmp_path: Path) -> None:
    old, new = pair(0), Family([level("xs", seed=1), level("s", seed=1)])
    old.save(tmp_path)
    with torch.no_grad():
        next(new.levels[1].network.parameters()).view(-1)[0] = float("nan")
    with pytest.raises(ValueError, match="hold NaN or infinity; not saved to "):
        new.save(tmp_path)
    assert Family.load(tmp_path).weights_hash == old.weights_hash
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["README.md", "family.json", "level_s", "level_xs"]


@pytest.mark.parametrize("done", [0, 1, 2, 4, 5])
def test_a_save_that_is_killed_leaves_the_old_family_or_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, done: int
) -> None:
    """At every removal and move on the way; and never old beside new levels."""
    old, new, steps = pair(0), pair(1), 0
    old.save(tmp_path)

    def until(act: Callable[..., Any]) -> Callable[..., Any]:
        def step(path: Path, *rest: Any, **options: Any) -> Any:
            nonlocal steps
            if str(path).endswith(".tmp") or options:  # of a file that is written, or nothing to remove
                return act(path, *rest, **options)
            steps += 1
            if steps > done:
                raise KeyboardInterrupt
            return act(path, *rest)

        return step

    with monkeypatch.context() as patched:
        patched.setattr("mlem.family.remove", until(family_module.remove))
        patched.setattr("shutil.rmtree", until(shutil.rmtree))
        patched.setattr("os.replace", until(os.replace))
        if done < 5:
            with pytest.raises(KeyboardInterrupt):
                new.save(tmp_path)
        else:
            new.save(tmp_path)
    if done == 0:
        assert Family.load(tmp_path).weights_hash == old.weights_hash
    elif done < 5:
        with pytest.raises(FileNotFoundError, match=r"holds no family \(no family.json\); make one with: "):
            Family.load(tmp_path)
    new.save(tmp_path)
    assert Family.load(tmp_path).weights_hash == new.weights_hash
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["README.md", "family.json", "level_s", "level_xs"]


# --- families that do not fit together -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ({}, {"shape": (1, 16, 16)}, r"^levels xs and s differ in shape: \(1, 8, 8\) and \(1, 16, 16\); "),
        ({"prediction": V(clip=1.0)}, {}, r"^level xs clips its estimate of the data, so that no sum over levels "),
        ({"data": "digits"}, {"data": "celeba"}, r"^levels xs and s differ in data: digits and celeba; "),
    ],
)
def test_levels_must_agree(first: dict[str, Any], second: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Family([level("xs", **first), level("s", **second)])


def test_levels_must_rise_in_cost() -> None:
    small, large = level("xs"), level("s")
    with pytest.raises(
        ValueError, match=rf"^levels must rise in cost, but s takes {large.flops} FLOPs and xs {small.flops}; "
    ):
        Family([large, small])
    with pytest.raises(ValueError, match=r"^levels must rise in cost, but a takes .* and b "):
        Family([level("xs", name="a"), level("xs", name="b")])


def test_names_must_differ() -> None:
    same = [level("xs", name="a"), level("s", name="b"), level("m", name="a")]
    for levels in (same, [same[0], same[2]]):
        with pytest.raises(ValueError, match=r"^two levels are called 'a'; give each its own name$"):
            Family(levels)


@pytest.mark.parametrize("name", ["", "a/b", "../up", "."])
def test_a_name_must_be_a_folder_name(name: str) -> None:
    with pytest.raises(ValueError, match=r"^level name must be letters, digits, .*, got "):
        level(name=name)


def test_an_empty_family_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^a family needs at least one level$"):
        Family([])


def test_unknown_prediction_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^prediction must be one of v, eps, x0, edm, .*, sit, got 'noise'$"):
        level(prediction="noise")


# --- files that are wrong ------------------------------------------------------------------------------------------


class Payload:
    """Leaves a mark when unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_header(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[3] ^= 0x40
    path.write_bytes(data)


SPOILERS: dict[str, Callable[[Path], object]] = {
    "truncated": truncate,
    "header": flip_header,
    "zero bytes": lambda path: path.write_bytes(b""),
    "html": lambda path: path.write_text("<!DOCTYPE html><html><body>404 Not Found</body></html>"),
    "pickle": lambda path: path.write_bytes(pickle.dumps(Payload(path.parent / "mark"))),
    "torch": lambda path: torch.save({"a": Payload(path.parent / "mark")}, path),
}


@pytest.mark.parametrize("how", SPOILERS)
def test_what_is_not_safetensors_is_refused(folder: Path, how: str) -> None:
    path = folder / WEIGHTS
    SPOILERS[how](path)
    with pytest.raises(ValueError, match="is not a safetensors file") as caught:
        Level.load(folder)
    assert str(caught.value).startswith(f"{path} is not a safetensors file")
    assert "\n" not in str(caught.value)
    assert not (folder / "mark").exists()


@pytest.mark.parametrize("place", [0.3, 0.5, 0.999])
def test_one_flipped_byte_is_found(folder: Path, place: float) -> None:
    path = folder / WEIGHTS
    data = bytearray(path.read_bytes())
    data[int(place * len(data))] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=rf"^{path} differs from its checksum in mlem.json; copy it again"):
        Level.load(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_weights_are_named(folder: Path, value: float) -> None:
    replace_weights(folder, lambda weights: weights["conv_in.bias"][2].fill_(value))
    with pytest.raises(ValueError, match=rf"^{folder / WEIGHTS}: weights conv_in.bias hold NaN or infinity; "):
        Level.load(folder)


def test_non_finite_weights_are_not_saved(folder: Path) -> None:
    broken, before = level(), (folder / WEIGHTS).read_bytes()
    with torch.no_grad():
        broken.network.conv_out.weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"^weights conv_out.weight hold NaN or infinity; not saved to "):
        broken.save(folder)
    assert (folder / WEIGHTS).read_bytes() == before


def test_keys_that_differ_are_listed(folder: Path) -> None:
    def change(weights: dict[str, torch.Tensor]) -> None:
        del weights["conv_in.bias"]
        weights["extra.bias"] = torch.zeros(1)
        weights["conv_out.bias"] = torch.zeros(7)

    replace_weights(folder, change)
    with pytest.raises(ValueError, match=r"does not fit config.json, 3 keys differ: ") as caught:
        Level.load(folder)
    for words in (
        "conv_in.bias (missing)",
        "extra.bias (extra)",
        "conv_out.bias ((7,) in the file, (1,) in the network)",
    ):
        assert words in str(caught.value)
    assert str(caught.value).endswith("check the size in model=")


def test_at_most_five_keys_are_listed(tmp_path: Path) -> None:
    level("s").save(tmp_path)
    with pytest.raises(ValueError, match=r"(\d+) keys differ") as caught:
        read_weights(tmp_path / WEIGHTS, level("xs").network)
    assert str(caught.value).count(" in the network)") == 5


def test_an_edited_schedule_is_refused(folder: Path) -> None:
    edit_json(folder / "mlem.json", lambda about: about["schedule"].update(offset=0.01))
    with pytest.raises(ValueError, match=rf"^{folder}/mlem.json was edited: its schedule does not match"):
        Level.load(folder)


@pytest.mark.parametrize("field", ["sha256", "schedule", "shape", "prediction", "schedule_hash"])
def test_a_missing_field_is_named(folder: Path, field: str) -> None:
    edit_json(folder / "mlem.json", lambda about: about.pop(field))
    with pytest.raises(ValueError, match=rf"^{folder}/mlem.json has no {field}; "):
        Level.load(folder)


@pytest.mark.parametrize("name", ["mlem.json", "config.json"])
def test_broken_json_is_named(folder: Path, name: str) -> None:
    truncate(folder / name)
    with pytest.raises(ValueError, match=rf"^{folder / name} is not valid JSON"):
        Level.load(folder)


@pytest.mark.parametrize("name", ["mlem.json", "config.json"])
@pytest.mark.parametrize("plain", [[], "text", 3, None], ids=str)
def test_json_of_another_kind_is_named(folder: Path, name: str, plain: object) -> None:
    (folder / name).write_text(json.dumps(plain))
    with pytest.raises(ValueError, match=rf"^{folder / name} holds a JSON \w+, not an object; restore it or"):
        Level.load(folder)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("mlem.json", {"schedule": []}),
        ("mlem.json", {"schedule": {"kind": "cosine", "ofset": 1}}),
        ("mlem.json", {"shape": None}),
        ("mlem.json", {"shape": [1, 8]}),
        ("mlem.json", {"shape": [1, 8, "8"]}),
        ("mlem.json", {"name": 3}),
        ("mlem.json", {"name": "../xs"}),
        ("mlem.json", {"prediction": []}),
        ("mlem.json", {"measured": 3}),
        ("config.json", {"in_channels": "one"}),
        ("config.json", {"block_out_channels": 8}),
        ("config.json", {"down_block_types": ["Nothing", "Nothing"]}),
    ],
    ids=str,
)
def test_fields_of_another_kind_are_named(folder: Path, name: str, change: dict[str, Any]) -> None:
    edit_json(folder / name, lambda about: about.update(change))
    with pytest.raises(ValueError, match=rf"^{folder / name} is damaged \([^\n]*\); copy it again or train [^\n]*$"):
        Level.load(folder)


@pytest.mark.parametrize(
    ("plain", "says"),
    [
        ([], "holds a JSON list, not an object; "),
        ({}, "has format None, but this version reads 1; copy the family again or make it again: python train.py"),
        ({"format": 1}, r"is damaged \(no 'levels'\); copy the family again or make it again: python train.py"),
        ({"format": 1, "levels": 3}, r"is damaged \(.*\); copy the family again or make it again: python train.py"),
    ],
    ids=str,
)
def test_a_damaged_family_is_named(tmp_path: Path, plain: object, says: str) -> None:
    (tmp_path / "family.json").write_text(json.dumps(plain))
    with pytest.raises(ValueError, match=rf"^{tmp_path}/family.json {says}"):
        Family.load(tmp_path)


def test_another_format_is_refused(folder: Path) -> None:
    edit_json(folder / "mlem.json", lambda about: about.update(format=2))
    with pytest.raises(ValueError, match=r"mlem.json has format 2, but this version reads 1; copy it again or"):
        Level.load(folder)


def test_missing_files_are_named(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    with pytest.raises(FileNotFoundError, match=rf"^{folder / WEIGHTS} is missing; "):
        Level.load(folder)
    with pytest.raises(FileNotFoundError, match=r"holds no level \(no mlem.json\)"):
        Level.load(folder / "elsewhere")
    with pytest.raises(FileNotFoundError, match=r"holds no family \(no family.json\)"):
        Family.load(folder)


# --- a save that is cut short --------------------------------------------------------------------------------------


def test_a_save_beyond_the_file_size_limit_keeps_the_old_file(folder: Path) -> None:
    """A real limit of the operating system, in a process of its own."""
    code = f"""
    import resource
    from tests.problems import level
    new = level(seed=1)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    new.save({str(folder)!r})
    """
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    done = execute_code(code)
    assert done.returncode == 1
    assert "cannot be written (File too large); make room there" in done.stderr
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == files
    assert_same_weights(Level.load(folder).network, level().network)
