"""Damaged, hostile and odd data: each is refused with the shard and the key named, and nothing is ever executed."""

from __future__ import annotations

import io
import os
import pickle
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mlem.data import Shards, ensure, prepare
from mlem.data.shards.manifest import Manifest, ShardRecord
from mlem.files import sha256

PIXELS = np.arange(0, 256, 4, dtype=np.uint8).reshape(8, 8)


def encoded(pixels: np.ndarray = PIXELS, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


def plain(name: str, data: bytes | None = None) -> tuple[tarfile.TarInfo, bytes]:
    data = encoded() if data is None else data
    member = tarfile.TarInfo(name)
    member.size = len(data)
    return member, data


def special(name: str, kind: bytes, target: str = "") -> tuple[tarfile.TarInfo, bytes]:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member, b""


def crafted(folder: Path, *shards: list, shape=(1, 8, 8), count: int = 2) -> Path:
    """A data set whose manifest is right about every byte: only the contents are at fault."""
    folder.mkdir()
    records = []
    for number, members in enumerate(shards):
        path = folder / f"shard-{number:06d}.tar"
        with tarfile.open(path, "w") as tar:
            for member, data in members:
                tar.addfile(member, io.BytesIO(data))
        records.append(ShardRecord(path.name, count, path.stat().st_size, sha256(path)))
    Manifest("crafted", shape, {}, count * len(shards), count, tuple(records)).write(folder / "manifest.json")
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sound data set of three shards."""
    prepare("dead_leaves", tmp_path / "data", size=8, count=30, shard_size=10, progress=False)
    return tmp_path / "data"


def touch(path: Path) -> None:
    """A later time of change, also where a clock ticks slowly."""
    seen = path.stat()
    os.utime(path, ns=(seen.st_atime_ns, seen.st_mtime_ns + 10**9))


# --- damage that the manifest finds ---


@pytest.mark.parametrize("cut", [0, 1, 511, 512, 1024, 0.25, 0.5, 0.75, -10240, -512, -1])
def test_shard_cut_anywhere_is_named(folder, cut):
    path = folder / "shard-000001.tar"
    size = path.stat().st_size
    keep = int(cut * size) if isinstance(cut, float) else cut % size
    os.truncate(path, keep)
    with pytest.raises(ValueError, match=rf"shard-000001\.tar has {keep} bytes, the manifest says {size}; prepare"):
        Shards.open(folder)


@pytest.mark.parametrize(("place", "what"), [(700, "pixels"), (3, "name in a header"), (148, "checksum"), (-5, "end")])
def test_one_flipped_bit_is_named(folder, place, what):
    Shards.open(folder)  # remembered as sound, which must not hide the damage
    path = folder / "shard-000002.tar"
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)
    touch(path)
    with pytest.raises(ValueError, match=r"shard-000002\.tar has SHA-256 .*; prepare the data set again"):
        Shards.open(folder)


def test_missing_shard_is_named(folder):
    (folder / "shard-000001.tar").unlink()
    with pytest.raises(FileNotFoundError, match=r"shard-000001\.tar is missing; prepare"):
        Shards.open(folder)


def test_missing_data_set_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no data set in .*; make one: python -m mlem\.data"):
        Shards.open(tmp_path)


def test_verification_is_remembered_until_the_file_changes(folder):
    first = Shards.open(folder)
    path = folder / "shard-000000.tar"
    times, data = path.stat(), bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    again = Shards.open(folder)  # same size and time: not read again
    assert [again.key(i) for i in range(30)] == [first.key(i) for i in range(30)]
    assert torch.equal(again.images(range(30)), first.images(range(30)))
    touch(path)
    with pytest.raises(ValueError, match="SHA-256"):
        Shards.open(folder)


@pytest.mark.parametrize("rubbish", [b"", b"PK\x03\x04 not a zip", b"\x93NUMPY rubbish", pickle.dumps({"keys": 1})])
def test_damaged_memory_of_a_verification_is_ignored(folder, rubbish):
    (folder / ".index.npz").write_bytes(rubbish)
    assert len(Shards.open(folder)) == 30


def test_memory_that_cannot_be_written_is_left_out(folder):
    (folder / ".index.npz").mkdir()  # stands for a read-only folder, which root could write
    assert len(Shards.open(folder)) == 30
    os.truncate(folder / "shard-000000.tar", 100)
    with pytest.raises(ValueError, match="has 100 bytes"):
        Shards.open(folder)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"format": 1', '"format": 99', "format is 99, but this version reads 1"),
        ('"shards"', '"chards"', r"is not a manifest \(KeyError\('shards'\)\)"),
        ('"count": 30', '"count": 31', "count is 31, its shards hold 30"),
        ('"file": "shard-000000.tar"', '"file": "../shard-000000.tar"', "is not the name of a shard"),
        ('"file": "shard-000000.tar"', '"file": "pipe:touch x.tar"', "is not the name of a shard"),
        ('"left_out": {}', '"left_out": {"abc": "x"}', "left_out names 'abc', none of the 31 images; restore it"),
        (
            '"left_out": {}',
            '"left_out": {"00000031": "x"}',
            "left_out names '00000031', none of the 31 images; restore",
        ),
        ("{", "", "is not valid JSON"),
    ],
)
def test_damaged_manifest_is_named(folder, old, new, message):
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(ValueError, match=rf"manifest\.json.*{message}"):
        Shards.open(folder)


@pytest.mark.parametrize("address", ["pipe:touch ran", "http://host/x", "file:x", "s3:x", "pipe:touch ran |"])
@pytest.mark.parametrize("use", [Shards.open, lambda a: ensure("digits", a), lambda a: prepare("digits", a)])
def test_address_instead_of_a_folder_is_refused(use, address, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="is a URL, not a folder"):
        use(address)
    assert not list(tmp_path.iterdir())


# --- contents at fault, though every checksum is right ---

FAULTS = {
    "repeated key": ([plain("a.png"), plain("a.png")], r"key 'a' is duplicate or interleaved .*'a\.png'"),
    "two images": ([plain("a.png"), plain("a.jpg")], r"key 'a' is duplicate or interleaved .*'a\.jpg'"),
    "key again later": ([plain("a.png"), plain("b.png"), plain("a.png")], "key 'a' is duplicate or interleaved"),
    "interleaved": ([plain("a.png"), plain("b.png"), plain("a.cls", b"1")], "key 'a' is duplicate or interleaved"),
    "no image": ([plain("a.png"), plain("b.cls", b"1")], "key '[ab]' has no (image|cls) member"),
    "no label": ([plain("a.png"), plain("a.cls", b"1"), plain("b.png")], "key 'b' has no cls member"),
    "too few": ([plain("a.png")], "holds 1 images that can be read, the manifest says 2"),
    "none": ([], "holds 0 images that can be read, the manifest says 2"),
    "parent folder": ([plain("../../x.png"), plain("b.png")], r"member '\.\./\.\./x\.png' leads outside"),
    "hidden parent": ([plain("a/../../x.png"), plain("b.png")], "leads outside"),
    "absolute": ([plain("/tmp/mlem-x.png"), plain("b.png")], r"member '/tmp/mlem-x\.png' leads outside"),
    "symbolic link": ([special("a.png", tarfile.SYMTYPE, "/etc/passwd"), plain("b.png")], r"'a\.png' is a link"),
    "hard link": ([plain("a.png"), special("b.png", tarfile.LNKTYPE, "a.png")], r"'b\.png' is a link"),
    "device": ([special("a.png", tarfile.CHRTYPE), plain("b.png")], r"'a\.png' is a link, folder or device"),
    "folder": ([special("a", tarfile.DIRTYPE), plain("b.png")], "'a' is a link, folder or device"),
    "odd suffix": ([plain("a.gif"), plain("b.png")], r"member 'a\.gif' is not one of \.png \.jpg"),
    "two suffixes": ([plain("a.seg.png"), plain("b.png")], r"member 'a\.seg\.png' is not one of"),
    "no suffix": ([plain("a"), plain("b.png")], "member 'a' is not one of"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faulty_shard_is_refused(tmp_path, fault):
    members, message = FAULTS[fault]
    folder = crafted(tmp_path / "data", members)
    with pytest.raises(ValueError, match=rf"shard-000000\.tar.*{message}"):
        Shards.open(folder)
    assert [path.name for path in tmp_path.rglob("*")] == ["data", *(p.name for p in folder.iterdir())]
    assert not Path("/tmp/mlem-x.png").exists()


def test_key_in_two_shards_is_refused(tmp_path):
    folder = crafted(tmp_path / "data", [plain("a.png"), plain("b.png")], [plain("c.png"), plain("b.png")])
    with pytest.raises(ValueError, match=r"shard-000001\.tar: key 'b' is also in shard-000000\.tar"):
        Shards.open(folder)


def test_header_damage_that_ends_a_tar_early_is_found_by_the_count(tmp_path):
    folder = crafted(tmp_path / "data", [plain("a.png"), plain("b.png")])
    path = folder / "shard-000000.tar"
    data = bytearray(path.read_bytes())
    data[1024 + 148] ^= 1  # the second header: plain tar reading ends here without a word
    path.write_bytes(data)
    with tarfile.open(path) as tar:
        assert tar.getnames() == ["a.png"]
    record = ShardRecord(path.name, 2, len(data), sha256(path))
    Manifest("crafted", (1, 8, 8), {}, 2, 2, (record,)).write(folder / "manifest.json")
    with pytest.raises(ValueError, match="holds 1 images that can be read, the manifest says 2"):
        Shards.open(folder)


class Payload:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return (Path.touch, (self.target,))


@pytest.mark.parametrize("suffix", ["pyd", "pickle", "pkl", "pth", "npy"])
def test_pickle_is_refused_and_never_executed(tmp_path, suffix):
    payload = pickle.dumps(Payload(tmp_path / "executed"))
    pickle.loads(payload)
    (tmp_path / "executed").unlink()  # the payload does work, when it is run
    folder = crafted(tmp_path / "data", [plain("a.png"), plain(f"a.{suffix}", payload), plain("b.png")])
    with pytest.raises(ValueError, match=rf"member 'a\.{suffix}' is not one of"):
        Shards.open(folder)
    folder = crafted(tmp_path / "renamed", [plain("a.png", payload), plain("b.png")])
    with pytest.raises(ValueError, match=r"shard-000000\.tar: image 'a' cannot be decoded as PNG, JPEG or WebP"):
        Shards.open(folder).read(0)
    assert not (tmp_path / "executed").exists()


def test_side_files_and_folders_in_names_are_allowed(tmp_path):
    members = [plain("n/a.png"), plain("n/a.cls", b"1"), plain("n/b.PNG"), plain("n/b.cls", b"2")]
    shards = Shards.open(crafted(tmp_path / "data", members))
    assert [shards.key(0), shards.key(1)] == ["n/a", "n/b"]
    assert torch.equal(shards.read(1), torch.from_numpy(PIXELS)[None])


# --- images ---


def header_only(width: int, height: int) -> bytes:
    """A PNG that is its header: 8-bit grey, `width` x `height`."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    data = b"IDAT" + zlib.compress(b"\0")
    chunks = (struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in (header, data, b"IEND"))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


@pytest.mark.parametrize("side", [8200, 9600, 30_000])  # above our limit, Pillow's warning and Pillow's error
def test_giant_image_is_refused_from_its_header(tmp_path, side):
    folder = crafted(
        tmp_path / "data", [plain("a.png", header_only(side, side)), plain("b.png")], shape=(1, side, side)
    )
    with pytest.raises(ValueError, match=r"shard-000000\.tar: image 'a' has more than 67108864 pixels"):
        Shards.open(folder).read(0)


ODD_IMAGES = {
    "empty": (b"", "cannot be decoded"),
    "text": (b"<html>not found</html>", "cannot be decoded"),
    "half": (encoded()[:50], "cannot be decoded"),
    "gif": (encoded(kind="GIF"), "cannot be decoded"),
    "bmp": (encoded(kind="BMP"), "cannot be decoded"),
    "16 bit": (encoded(PIXELS.astype(np.uint16) * 256), "is I;16 8 x 8, the manifest says L 8 x 8"),
    "colour": (encoded(np.stack([PIXELS] * 3, -1)), "is RGB 8 x 8, the manifest says L 8 x 8"),
    "alpha": (encoded(np.stack([PIXELS] * 2, -1)), "is LA 8 x 8, the manifest says L 8 x 8"),
    "other size": (encoded(PIXELS[:4]), "is L 4 x 8, the manifest says L 8 x 8"),
}


@pytest.mark.parametrize("odd", ODD_IMAGES)
def test_broken_or_odd_image_is_named(tmp_path, odd):
    data, message = ODD_IMAGES[odd]
    shards = Shards.open(crafted(tmp_path / "data", [plain("a.png"), plain("b.png", data)]))
    assert torch.equal(shards.read(0), torch.from_numpy(PIXELS)[None])
    with pytest.raises(ValueError, match=rf"shard-000000\.tar: image 'b' {message}.*; prepare"):
        shards.images([0, 1])


@pytest.mark.parametrize(("kind", "options"), [("JPEG", {"quality": 95}), ("WebP", {"lossless": True})])
def test_jpeg_and_webp_are_read(tmp_path, kind, options):
    colour = np.stack([PIXELS, PIXELS.T, 255 - PIXELS], -1)
    data = encoded(colour, kind, **options)
    suffix = {"JPEG": "jpg", "WebP": "webp"}[kind]
    members = [plain(f"a.{suffix}", data), plain("b.png", encoded(colour))]
    shards = Shards.open(crafted(tmp_path / "data", members, shape=(3, 8, 8)))
    expected = np.array(Image.open(io.BytesIO(data)).convert("RGB"))
    assert torch.equal(shards.read(0), torch.from_numpy(expected).permute(2, 0, 1))
    assert torch.equal(shards.read(1), torch.from_numpy(colour).permute(2, 0, 1))


def test_any_flipped_byte_in_an_image_is_an_error_of_ours(tmp_path):
    sound = encoded()
    broken = []
    for place in range(len(sound)):
        for flip in (1, 128, 255):
            broken.append(bytearray(sound))
            broken[-1][place] ^= flip
    members = [plain(f"{i:04d}.png", bytes(data)) for i, data in enumerate(broken)]
    shards = Shards.open(crafted(tmp_path / "data", members, count=len(members)))
    refused = 0
    for i in range(len(members)):
        try:
            assert shards.read(i).shape == (1, 8, 8)
        except ValueError as error:
            refused += f"image '{i:04d}'" in str(error)
    # the rest are wrong pixels: Pillow does not compare the checksum of the pixel data, which is why the manifest does
    assert refused > 0.6 * len(members)
