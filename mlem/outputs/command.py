"""The command `mlem.outputs`: check a folder of samples byte by byte, or join the folders of several runs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mlem.invocation import called, command, in_words_of_the_user, interrupted
from mlem.outputs import merge, sample_path, verify

__all__ = ["main"]

SHOWN = 20
"""Number of faulty images that are listed."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code: 0, 1 for faulty images, 2 for wrong folders."""
    options = _parser().parse_args(arguments)
    try:
        return _verify(options.folder) if options.verb == "verify" else _merge(options.out, options.parts)
    except (ValueError, OSError) as error:
        print(f"{called('outputs')}: {in_words_of_the_user(' '.join(str(error).split()))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return interrupted("outputs", "copied images are kept, the same command continues from there")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(command("outputs"), description="Check folders of samples, or join them.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    one = verbs.add_parser("verify", help="compare every image with the manifest; list what is missing or damaged")
    one.add_argument("folder", type=Path, help="folder of samples, such as runs/digits/samples/ddpm_200")
    one = verbs.add_parser("merge", help="copy the samples of several folders, made with equal settings, into one")
    one.add_argument("out", type=Path, help="folder to write; an interrupted merge continues")
    one.add_argument("parts", type=Path, nargs="+", help="folders of samples")
    return parser


def _verify(folder: Path) -> int:
    count, faults = verify(folder)
    for index, why in list(faults.items())[:SHOWN]:
        print(f"{sample_path(folder, index)} {why}")
    if len(faults) > SHOWN:
        print(f".. and {len(faults) - SHOWN} more")
    if faults:
        print(f"{folder}: {len(faults)} faults; run the sample command again to remake these images")
        return 1
    print(f"{folder}: {count} images, as in the manifest")
    return 0


def _merge(out: Path, parts: Sequence[Path]) -> int:
    print(f"{out}: {merge(out, parts)} images of {len(parts)} folders")
    return 0
