"""Folders of odd, broken and hostile pictures: each converted as documented, or named; nothing written elsewhere."""

from __future__ import annotations

import io
import json
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, features

from mlem.data import Shards, prepare
from mlem.data.command import main
from tests.archives import encoded, smooth
from tests.test_data_archives import contents, pixels_of

RAMP = np.arange(0, 256, 4, dtype=np.uint8).reshape(8, 8)
COLOUR = np.stack([RAMP, RAMP.T, 255 - RAMP], -1)


def stored(root: Path, out: Path, **options) -> Shards:
    prepare("folder", out, source=str(root), progress=False, **({"size": 8} | options))
    return Shards.open(out)


def png(rows: bytes, width: int, height: int, depth: int, kind: int) -> bytes:
    """A PNG of these bytes, rows without filters. kind: 0 grey, 2 RGB, 4 grey and alpha, 6 RGBA."""
    stride = len(rows) // height
    lines = b"".join(b"\0" + rows[i * stride : (i + 1) * stride] for i in range(height))
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    chunks = (header, b"IDAT" + zlib.compress(lines), b"IEND")
    chunks = (struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def only(tmp_path: Path, data: bytes, name: str = "a.png", **options) -> np.ndarray:
    """What one file becomes, (size, size, 3)."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / name).write_bytes(data)
    return pixels_of(stored(tmp_path / "in", tmp_path / "out", **options))[0]


# --- conversions ---

HIGH = (RAMP.astype(np.uint16) << 8) + 255 - RAMP  # the low byte says something else
ALPHA = np.where(np.arange(64).reshape(8, 8) % 3 == 0, 255, 0).astype(np.uint8)
OVER_WHITE = np.where(ALPHA[..., None] == 255, COLOUR, 255)
GREY = np.stack([RAMP] * 3, -1)
PALETTE = Image.fromarray(COLOUR).quantize(64)


def palette(transparent: int | None = None) -> bytes:
    file = io.BytesIO()
    PALETTE.save(file, "PNG", **({} if transparent is None else {"transparency": transparent}))
    return file.getvalue()


CONVERSIONS = {
    "rgb": (encoded(COLOUR, "PNG"), COLOUR),
    "lossless webp": (encoded(COLOUR, "WebP", lossless=True), COLOUR),
    "grey": (encoded(RAMP, "PNG"), GREY),
    "one bit": (
        png(bytes(range(0, 64, 8)), 8, 8, 1, 0),
        np.unpackbits(np.arange(0, 64, 8, dtype=np.uint8)).reshape(8, 8, 1).repeat(3, -1) * 255,
    ),
    "16-bit grey": (encoded(HIGH, "PNG"), GREY),
    "16-bit grey and alpha": (png(np.stack([HIGH, 0 * HIGH + 65535], -1).astype(">u2").tobytes(), 8, 8, 16, 4), GREY),
    "16-bit colour": (png(np.stack([HIGH] * 3, -1).astype(">u2").tobytes(), 8, 8, 16, 2), GREY),
    "alpha": (encoded(np.concatenate([COLOUR, ALPHA[..., None]], -1), "PNG"), OVER_WHITE),
    "webp with alpha": (
        encoded(np.concatenate([COLOUR, ALPHA[..., None]], -1), "WebP", lossless=True, exact=True),
        OVER_WHITE,
    ),
    "grey and alpha": (encoded(np.stack([RAMP, ALPHA], -1), "PNG"), np.where(ALPHA[..., None] == 255, GREY, 255)),
    "palette": (palette(), np.asarray(PALETTE.convert("RGB"))),
    "palette with a transparent colour": (
        palette(5),
        np.where(np.asarray(PALETTE)[..., None] == 5, 255, np.asarray(PALETTE.convert("RGB"))),
    ),
}


@pytest.mark.parametrize("kind", CONVERSIONS)
def test_odd_images_are_converted_as_documented(kind, tmp_path):
    data, expected = CONVERSIONS[kind]
    np.testing.assert_array_equal(only(tmp_path, data), expected)


def test_half_transparent_is_mixed_with_white(tmp_path):
    alpha = RAMP[..., None]
    found = only(tmp_path, encoded(np.concatenate([COLOUR, alpha], -1), "PNG"))
    share = alpha / 255.0
    assert np.abs(found - (share * COLOUR + (1 - share) * 255)).max() <= 1


def test_cmyk_is_converted_by_the_plain_formula(tmp_path):
    ink = np.array([40, 90, 160, 50], np.uint8)
    image = Image.fromarray(np.broadcast_to(ink, (16, 16, 4)).copy(), "CMYK")
    image.save(tmp_path / "x.jpg", quality=100)
    found = only(tmp_path, (tmp_path / "x.jpg").read_bytes(), "a.jpg")
    assert np.abs(found - (255.0 - ink[:3]) * (255 - ink[3]) / 255).max() <= 3


TURNED = {
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a),
}


@pytest.mark.parametrize("orientation", TURNED)
def test_exif_orientation_is_applied(orientation, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    found = only(tmp_path, encoded(COLOUR, "PNG", exif=exif))
    np.testing.assert_array_equal(found, TURNED[orientation](COLOUR))


def test_the_first_frame_of_several_is_taken(tmp_path):
    assert features.check("webp")
    frames = [Image.fromarray(COLOUR), Image.fromarray(255 - COLOUR)]
    frames[0].save(tmp_path / "x.webp", save_all=True, append_images=frames[1:], lossless=True)
    np.testing.assert_array_equal(only(tmp_path, (tmp_path / "x.webp").read_bytes(), "a.webp"), COLOUR)


# --- cropping and scaling ---


def test_the_middle_square_is_cut_and_scaled_by_a_box(tmp_path):
    wide = smooth(1, (37, 24))[0]
    expected = wide[:, 6:30].reshape(12, 2, 12, 2, 3).astype(float)
    across = np.floor(expected.mean(3) + 0.5)
    np.testing.assert_array_equal(only(tmp_path, encoded(wide, "PNG"), size=12), np.floor(across.mean(1) + 0.5))


def test_without_crop_the_whole_image_is_stretched(tmp_path):
    tall = smooth(1, (8, 32))[0]
    expected = np.floor(tall.reshape(8, 4, 8, 3).mean(1) + 0.5)
    np.testing.assert_array_equal(only(tmp_path, encoded(tall, "PNG"), crop=False), expected)


@pytest.mark.parametrize("name", ["box", "bilinear", "bicubic", "lanczos"])
def test_every_filter_is_the_one_it_is_called(name, tmp_path):
    image = smooth(1, (50, 50))[0]
    expected = Image.fromarray(image).resize((8, 8), Image.Resampling[name.upper()])
    np.testing.assert_array_equal(only(tmp_path, encoded(image, "PNG"), filter=name), np.asarray(expected))


# --- which files ---


def test_only_images_in_the_tree_are_read_in_the_order_of_their_paths(tmp_path):
    root, outside = tmp_path / "in", tmp_path / "outside"
    for folder in (root / "b" / "c", root / ".hidden", outside):
        folder.mkdir(parents=True)
    kept = {"a.PNG": "PNG", "b.jpeg": "JPEG", "b/c/x.webp": "WebP", "b/z.jpg": "JPEG"}
    for number, (name, kind) in enumerate(kept.items()):
        (root / name).write_bytes(encoded(np.full((8, 8, 3), 40 * number, np.uint8), kind))
    for name in (".hidden/a.png", "._a.png", "a.gif", "a.txt", "a.png.bak", "png"):
        (root / name).write_bytes(encoded(COLOUR, "PNG"))
    (outside / "x.png").write_bytes(encoded(COLOUR, "PNG"))
    (root / "link.png").symlink_to(outside / "x.png")
    (root / "broken.png").symlink_to(outside / "none.png")
    (root / "linked").symlink_to(outside)
    (root / "loop").symlink_to(root)
    (root / "folder.png").mkdir()
    os.mkfifo(root / "pipe.png")
    found = pixels_of(stored(root, tmp_path / "out"))
    assert [round(float(image.mean()) / 40) for image in found] == [0, 1, 2, 3]


def test_odd_names_write_nothing_outside(tmp_path):
    root = tmp_path / "in"
    root.mkdir()
    names = [b"..\\..\\x.png", b"..png", b"-rf.png", b"a\nb.png", b"\xff\xfe.png", b"$(touch y).png", b"a;b|c.png"]
    names += [b"pipe:touch z.png", "ä\u202e.png".encode(), b" .png", b"%2e%2e%2fx.png"]
    for name in names:
        with open(os.fsencode(root) + b"/" + name, "wb") as file:
            file.write(b"broken" if name == b"\xff\xfe.png" else encoded(COLOUR, "PNG"))
    before = sorted(os.listdir(os.fsencode(root)))
    shards = stored(root, tmp_path / "out", max_broken=0.2)
    assert len(shards) == len(names) - 1 - 2  # what begins with a dot is hidden
    assert [shards.key(i) for i in range(2)] == ["00000000", "00000001"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]
    assert sorted(os.listdir(os.fsencode(root))) == before
    assert {path.name for path in (tmp_path / "out").iterdir()} <= {
        "manifest.json",
        "shard-000000.tar",
        ".index.npz",
        ".lock",
    }


# --- broken images ---


def with_broken(root: Path, count: int = 20, broken: tuple[int, ...] = (3, 11)) -> list[np.ndarray]:
    """PNGs, of which some are broken; return the pixels of the others."""
    root.mkdir(exist_ok=True)
    images = list(smooth(count, (8, 8)))
    for i, image in enumerate(images):
        data = encoded(image, "PNG")
        (root / f"{i:02d}.png").write_bytes(data[: len(data) // 2] if i in broken else data)
    return [image for i, image in enumerate(images) if i not in broken]


def test_a_broken_image_stops_the_preparation_and_is_named(tmp_path, capsys):
    with_broken(tmp_path / "in")
    assert main(["folder", "--source", str(tmp_path / "in"), "--size", "8", "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: 2 broken of 20 images, 0 allowed: '03.png' cannot be decoded as PNG, JPEG or WebP")
    assert "'11.png'" in error
    assert error.endswith("or allow a share with --max-broken")
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_a_share_of_broken_images_is_left_out_and_named(tmp_path, capsys):
    expected = with_broken(tmp_path / "in")
    command = ["folder", "--source", str(tmp_path / "in"), "--size", "8", "--shard-size", "6"]
    stopped, whole, two = (str(tmp_path / name) for name in ("stopped", "whole", "two"))
    assert main([*command, "--out", stopped, "--max-broken", "0.05"]) == 2
    assert "2 broken of 20 images, 1 allowed" in capsys.readouterr().err
    kept = json.loads((tmp_path / "stopped/manifest.unfinished.json").read_text())
    assert [record["count"] for record in kept["shards"]] == [5]  # of 6
    for out in (stopped, whole):
        assert main([*command, "--out", out, "--max-broken", "0.1"]) == 0
    printed = capsys.readouterr()
    assert f"{stopped}: 18 images (5 were there)" in printed.out
    assert "2 broken images are left out, listed in manifest.json: '03.png' cannot be decoded" in printed.err
    assert contents(tmp_path / "stopped") == contents(tmp_path / "whole")
    shards = Shards.open(whole)
    np.testing.assert_array_equal(pixels_of(shards), expected)
    assert [record.count for record in shards.manifest.shards] == [5, 5, 6, 2]
    assert list(shards.manifest.left_out) == ["00000003", "00000011"]
    images = shards.images(range(len(shards)))
    assert torch.equal(images, torch.from_numpy(np.stack(expected)).permute(0, 3, 1, 2) / 127.5 - 1)
    # all there: nothing to do, but the limit still holds
    assert prepare("folder", whole, source=str(tmp_path / "in"), size=8, shard_size=6, max_broken=0.1) == 0
    with pytest.raises(ValueError, match="2 broken of 20 images, 0 allowed"):
        prepare("folder", whole, source=str(tmp_path / "in"), size=8, shard_size=6)
    assert main([*command, "--out", two, "--max-broken", "0.1", "--workers", "2"]) == 0
    assert contents(tmp_path / "two") == contents(tmp_path / "whole")


def test_a_damaged_shard_with_gaps_is_remade(tmp_path):
    with_broken(tmp_path / "in")
    stored(tmp_path / "in", tmp_path / "out", shard_size=6, max_broken=0.1)
    before = contents(tmp_path / "out")
    os.truncate(tmp_path / "out" / "shard-000001.tar", 100)
    prepare("folder", tmp_path / "out", source=str(tmp_path / "in"), size=8, shard_size=6, max_broken=0.1)
    assert contents(tmp_path / "out") == before


def test_a_shard_may_hold_nothing(tmp_path):
    expected = with_broken(tmp_path / "in", 6, (0, 1))
    shards = stored(tmp_path / "in", tmp_path / "out", shard_size=2, max_broken=0.5)
    assert [record.count for record in shards.manifest.shards] == [0, 2, 2]
    np.testing.assert_array_equal(pixels_of(shards), expected)


BROKEN = {
    "giant": (png(b"\0", 30_000, 30_000, 8, 0), r"'a\.png' has more than 67108864 pixels"),
    "large": (png(b"\0", 8_200, 8_200, 8, 0), r"'a\.png' has more than 67108864 pixels"),
    "gif": (encoded(RAMP, "GIF"), r"'a\.png' cannot be decoded as PNG, JPEG or WebP \(it is none of them\)"),
    "bmp": (encoded(RAMP, "BMP"), "it is none"),
    "tiff": (encoded(RAMP, "TIFF"), "it is none"),
    "empty": (b"", "it is none"),
    "page": (b"<html>not found</html>", "it is none"),
    "half": (encoded(smooth(1, (64, 64))[0], "PNG")[:3000], "cannot be decoded"),
    "half a jpeg": (encoded(smooth(1, (64, 64))[0])[:900], "cannot be decoded"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_what_is_no_image_is_named(fault, tmp_path):
    data, message = BROKEN[fault]
    with pytest.raises(ValueError, match=f"1 broken of 1 images, 0 allowed: .*{message}"):
        only(tmp_path, data)


def test_a_file_that_cannot_be_read_is_named_like_a_broken_one(tmp_path, monkeypatch):
    from mlem.data.datasets import folder

    def vanished(path: Path, *_: object) -> np.ndarray:
        raise FileNotFoundError(2, "No such file or directory", str(path))

    monkeypatch.setattr(folder, "_image", vanished)
    with pytest.raises(ValueError, match=r"0 allowed: 'a\.png' No such file or directory; repair"):
        only(tmp_path, encoded(COLOUR, "PNG"))


def test_any_flipped_byte_is_an_image_or_a_name(tmp_path):
    (tmp_path / "in").mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    for kind in ("PNG", "JPEG", "WebP"):
        sound = encoded(COLOUR, kind, exif=exif)
        for place in range(0, len(sound), 3):
            data = bytearray(sound)
            data[place] ^= 255
            (tmp_path / "in" / f"{kind}{place}.{kind}".lower()).write_bytes(data)
    shards = stored(tmp_path / "in", tmp_path / "out", max_broken=0.99)
    assert 0 < len(shards.manifest.left_out) < shards.manifest.total
    assert all("0x" not in why for why in shards.manifest.left_out.values())  # no address in memory: the same each run


# --- the command line ---


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "prepare it: python -m mlem.data folder --source FOLDER --out out"),
        (["--source", "none"], "none is not a folder; name the folder that holds the images"),
        (["--source", "pipe:ls"], "folder 'pipe:ls' is a URL, not a folder"),
        (["--source", "."], "holds no image: no file in it ends in .png, .jpg, .jpeg, .webp"),
        (["--source", ".", "--size", "0"], "size must be >= 1, got 0"),
        (["--source", ".", "--filter", "nearest"], "filter must be one of box, bilinear, bicubic, lanczos"),
        (["--source", ".", "--max-broken", "1"], "max_broken must be in [0, 1), got 1.0"),
        (["--source", ".", "--max-broken", "nan"], "max_broken must be in [0, 1), got nan"),
    ],
)
def test_a_wrong_command_is_one_line(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["folder", *arguments, "--out", "out"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_another_folder_is_refused(tmp_path):
    with_broken(tmp_path / "in", broken=())
    stored(tmp_path / "in", tmp_path / "out")
    (tmp_path / "in" / "new.png").write_bytes(encoded(COLOUR, "PNG"))
    with pytest.raises(ValueError, match=r"out holds other data: count is 20, requested 21, listing is"):
        stored(tmp_path / "in", tmp_path / "out")
    with pytest.raises(ValueError, match="filter is 'box', requested 'bicubic'"):
        stored(tmp_path / "in", tmp_path / "out", filter="bicubic")
