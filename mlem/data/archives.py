"""Official archives: where to get them, and checking that a file is the right one."""

from __future__ import annotations

import fcntl
import hashlib
import http.client
import os
import urllib.error
import urllib.request
from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from mlem.files import writing

__all__ = ["checked_md5", "download", "located"]

_BLOCK = 2**20
_TIMEOUT = 30  # seconds without a byte


def located(source: str | os.PathLike[str], name: str) -> Path:
    """The archive at `source`: itself, or the file `name` in it if it is a folder."""
    path = Path(source)
    return path / name if path.is_dir() else path


def checked_md5(path: Path, expected: str, *, origin: str, any_checksum: bool) -> str:
    """The MD5 of `path` in hex. ValueError if there is no such file, or its MD5 differs, unless `any_checksum`."""
    if not path.is_file():
        raise ValueError(f"{path} does not exist; get it from {origin}")
    found = _md5(path)
    if found != expected and not any_checksum:
        raise ValueError(
            f"{path} has MD5 {found}, the official file has {expected}; get it again from {origin}, or accept "
            "another archive of the same format with --any-checksum"
        )
    return found


def download(url: str, path: Path, md5: str) -> None:
    """Fetch `url` to `path`, unless it exists: first to a file beside it, resuming an earlier attempt.

    Safe to call from several processes. ValueError, and nothing at `path`, if that fails or the MD5 differs.
    """
    part = path.with_name(f".{path.name}.part")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        part.touch()
    with open(part, "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # released however the process ends
        if path.exists():
            part.unlink(missing_ok=True)
            return
        _fetch(url, file, path)
        file.flush()
        os.fsync(file.fileno())
        if (found := _md5(part)) != md5:
            file.truncate(0)
            raise ValueError(f"{url} returned a file with MD5 {found}, the official one has {md5}; run it again")
        os.replace(part, path)


def _fetch(url: str, file: IO[bytes], path: Path) -> None:
    """Append the missing rest of `url` to `file`, which will become `path`."""
    begin = file.tell()
    request = urllib.request.Request(url, headers={"Range": f"bytes={begin}-"} if begin else {})
    with _named(url):
        try:
            response = urllib.request.urlopen(request, timeout=_TIMEOUT)
        except urllib.error.HTTPError as error:
            if error.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE:  # it is already complete
                return
            raise
    with response, _bar(Path(url).name) as report:
        if response.status != http.client.PARTIAL_CONTENT:
            begin = file.seek(0)
            file.truncate()
        length = int(response.headers.get("Content-Length") or 0)
        report(begin, total=begin + length or None)
        while True:
            with _named(url):
                block = response.read(_BLOCK)
            if not block:
                break
            with writing(path):
                file.write(block)
                file.flush()
            report(len(block))
        if length and file.tell() < begin + length:
            raise ValueError(f"{url} broke off after {file.tell()} bytes; run the same command again to continue")


@contextmanager
def _named(url: str) -> Generator[None, None, None]:
    try:
        yield
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        raise ValueError(
            f"cannot download {url} ({reason}); run the same command again to continue, or fetch the file by other "
            "means and pass it with --source"
        ) from error


@contextmanager
def _bar(name: str) -> Generator[Callable[..., None], None, None]:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task(name, total=None)
        yield lambda count, **options: bar.update(task, advance=count, **options)


def _md5(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, partial(hashlib.md5, usedforsecurity=False)).hexdigest()
