"""Writing files so that a partial file is never mistaken for a complete one.

Lives here: atomic writes, checksums, JSON, locks. Does not know the files' contents.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import secrets
from collections.abc import Generator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

__all__ = [
    "CHECKSUM",
    "atomic_write",
    "cache_folder",
    "check_format",
    "check_writable",
    "checksum",
    "clear_leftovers",
    "damaged",
    "first_process",
    "folder_lock",
    "read_json",
    "read_object",
    "remove",
    "sha256",
    "write_json",
    "write_record",
    "write_text",
    "writing",
]

CHECKSUM = "checksum"
"""The key, or column, that holds a record's own checksum."""
_REMEDY = "restore it or delete it and make it again"
_OF_ANOTHER_KIND = (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError, RuntimeError)


def cache_folder() -> Path:
    """The user's folder for what can be made again: ~/.cache/mlem, or below XDG_CACHE_HOME."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mlem"


def first_process() -> bool:
    """Whether this process is rank 0 of a run; works before there is a process group."""
    return all(os.environ.get(name, "0") == "0" for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"))


@contextmanager
def folder_lock(folder: str | os.PathLike[str]) -> Generator[None, None, None]:
    """Lock `folder` for this process; the lock ends with the process, however it ends.

    Raises ValueError if another process holds it.
    """
    lock = Path(folder) / ".lock"
    with writing(lock):
        lock.parent.mkdir(parents=True, exist_ok=True)
        lock.touch()
    with open(lock, "w", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{folder} is in use by another run; wait for it, or choose another folder") from None
        yield


@contextmanager
def atomic_write(path: str | os.PathLike[str], durable: bool = True) -> Generator[IO[bytes], None, None]:
    """Open a binary file beside `path` that replaces it when the block ends without an error.

    A kill or a full disk at any moment leaves either the old file or the new one. The temporary name starts with a
    dot.

    Args:
        path: of the file.
        durable: whether to fsync the file before the replacement and the folder after it; without, it is safe against
            kills, not against power cuts.
    """
    path = Path(path)
    temporary = path.parent / f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp"
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as file:
                yield file
                file.flush()
                if durable:
                    os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
        if durable:
            _fsync_folder(path.parent)


def clear_leftovers(folder: str | os.PathLike[str]) -> None:
    """Remove partial files of killed runs in `folder` and below; call only with the folder's lock held."""
    for leftover in Path(folder).rglob(".*.tmp"):
        leftover.unlink(missing_ok=True)


@contextmanager
def writing(path: str | os.PathLike[str]) -> Generator[None, None, None]:
    """Make every OSError of the block that names no other file give the path, the problem and the remedy.

    A full disk names no path, and the name of a temporary file beside `path` means little to the user.
    """
    path = Path(path)
    try:
        yield
    except (OSError, RuntimeError) as raised:
        error = raised if isinstance(raised, OSError) else raised.__context__  # torch.save has an error of its own
        if not isinstance(error, OSError) or error.errno is None or isinstance(error.__cause__, OSError):
            raise  # not a write failure, or already named
        at = None if error.filename is None else Path(os.fsdecode(error.filename))
        if at is not None and not path.is_relative_to(at) and not at.name.startswith(f".{path.name}."):
            raise  # from another file, which is being read
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        remedy = "make room there" if full else "make it writable, or choose another folder"
        why = f"{error.strerror}: {at}" if at is not None and path.is_relative_to(at) else error.strerror
        # the same type, so that handlers of the original catch it
        named = type(error)(f"{path} cannot be written ({why}); {remedy}, then run the same command again")
        named.errno = error.errno
        raise named from error


def check_writable(folder: str | os.PathLike[str]) -> None:
    """Raise OSError if files cannot be created in `folder`; call before long work that writes there."""
    folder = Path(folder)
    probe = folder / f".{folder.name}.{os.getpid()}.tmp"
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()


def _fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: str | os.PathLike[str]) -> None:
    """Delete the file `path`, if it exists, durably: it does not return after a power cut."""
    path = Path(path)
    if path.exists():
        path.unlink()
        _fsync_folder(path.parent)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` (UTF-8) to `path` atomically."""
    with atomic_write(path) as file:
        file.write(text.encode())


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write `value` as indented JSON to `path` atomically; NaN and infinity are rejected."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def write_record(path: str | os.PathLike[str], value: Mapping[str, Any]) -> None:
    """Write a JSON object with its own checksum, which `read_json` checks: no changed digit goes unnoticed."""
    write_json(path, {**value, CHECKSUM: checksum(json.loads(json.dumps(value, allow_nan=False)))})


def checksum(value: Any) -> str:
    """SHA-256 of plain data, independent of the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read a JSON file. Raises ValueError naming the file if it is not valid JSON or fails its checksum."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); {_REMEDY}") from error
    if isinstance(value, dict) and CHECKSUM in value and value.pop(CHECKSUM) != checksum(value):
        raise ValueError(
            f"{path} differs from its checksum: it is damaged, or was edited; {_REMEDY} (or remove its line "
            f'"{CHECKSUM}" if you meant the edit)'
        )
    return value


def read_object(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a JSON file that must hold an object. Raises ValueError naming the file if it holds anything else."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a JSON {type(value).__name__}, not an object; {_REMEDY}")
    return value


def check_format(plain: Any, known: int, what: str | os.PathLike[str], remedy: str) -> None:
    """Raise ValueError naming `what` and the remedy unless `plain` is an object of format `known`."""
    found = repr(plain.get("format")) if isinstance(plain, dict) else f"{type(plain).__name__}, not an object"
    if found != repr(known):
        raise ValueError(f"{what} has format {found}, but this version reads {known}; {remedy}")


@contextmanager
def damaged(what: str | os.PathLike[str], remedy: str = _REMEDY) -> Generator[None, None, None]:
    """Turn errors in unpacking plain data into one ValueError naming `what` and the remedy.

    Only for plain data: an error of the program itself would be mistaken for one of the file.
    """
    try:
        yield
    except _OF_ANOTHER_KIND as error:
        said = f"no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise ValueError(f"{what} is damaged ({said}); {remedy}") from error


def sha256(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
