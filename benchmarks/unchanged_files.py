"""Running commands for `unchanged.py` and reading what they leave: JSON, CSV, pictures, the page of a report."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
"""Of the code that is looked at: the checkout in which this file is."""


def attempt(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """What a function returns, or a text that begins with "failed: "."""
    try:
        return function(*arguments, **options)
    except Exception as error:
        return f"failed: {type(error).__name__}: {' '.join(str(error).split())}"


def run(work: Path, *arguments: object) -> None:
    """`python ARGUMENTS` in `work`, in one thread, with the code in ROOT. Raises RuntimeError with its last line."""
    words = [str(ROOT / word) if word in ("train.py", "sample.py") else str(word) for word in arguments]
    own = re.compile(r"(WANDB|NETRC|SLURM|TORCHELASTIC).*|.*RANK|.*WORLD_SIZE|MASTER_.*|FORCE_COLOR|TTY_.*")
    environment = {key: value for key, value in os.environ.items() if not own.fullmatch(key)}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "160", "NETRC": os.devnull}
    done = subprocess.run([sys.executable, *words], cwd=work, env=environment, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip() or "no message").splitlines()[-1]
        raise RuntimeError(f"python {' '.join(map(str, arguments))}: {last}")


def remove(work: Path, *names: str | Path) -> None:
    """Remove folders and files in `work`, so that no command finds its work done."""
    for path in (work / name for name in names):
        if path.is_dir():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)


def load(path: Path) -> Any:
    """A JSON file, or the lines of a JSONL or CSV file."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in text.splitlines()]
    if path.suffix == ".csv":
        return [{key: number(value) for key, value in row.items()} for row in csv.DictReader(io.StringIO(text))]
    return json.loads(text)


def number(text: str) -> Any:
    """A text as a number, or as numbers where it holds several, or as it is."""
    try:
        found = [float(part.replace(",", "")) for part in text.split()]
    except ValueError:
        return text
    return found if len(found) > 1 else (found or [text])[0]


def pixels(source: Path | io.BytesIO) -> Tensor:
    """The pixels of a picture: uint8."""
    with Image.open(source) as image:
        return torch.from_numpy(np.array(image))


class Page(HTMLParser):
    """What a reader sees, but for versions and dates: words, entries of tables, shapes and hashes of pictures."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.words: list[str] = []
        self.cells: list[Any] = []
        self.pictures: list[Tensor] = []
        self._inside = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._inside = tag
        if tag == "img":
            data = (dict(attrs)["src"] or "").split(",", 1)[1]
            seen = pixels(io.BytesIO(base64.b64decode(data)))
            self.pictures.append(torch.tensor([*seen.shape, *hashlib.sha256(seen.numpy().tobytes()).digest()]))

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside in ("style", "script") or not data.strip():
            return
        self.words.append(re.sub(r"\b[0-9a-f]{40}\b(-dirty)?|\d{4}-\d\d-\d\d \S+|\b\d+\.\d+\.\d+\b", "", data))
        if self._inside == "td":
            self.cells.append(number(data))
