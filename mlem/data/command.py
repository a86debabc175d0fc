"""The command `mlem.data`: prepare a data set, as in `python -m mlem.data digits --out data/digits`."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from typing import Any, Never

from mlem.data.datasets import DATASETS
from mlem.data.options import Option, check_known, description_of, options_of
from mlem.data.preparing import SHARD_SIZE, prepare
from mlem.data.shards.manifest import MANIFEST, Manifest, plain_folder
from mlem.invocation import command as typed
from mlem.invocation import in_words_of_the_user, interrupted

__all__ = ["main"]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Never:
        raise ValueError(f"{message} (see {self.prog} --help)")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code: 0, 2 for a wrong option or folder, 130 for Ctrl-C."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if arguments and not arguments[0].startswith("-") and arguments[0] not in DATASETS:
            check_known("data set", arguments[0], DATASETS)
        options = vars(_parser().parse_args(arguments))
        _run(options.pop("dataset"), options.pop("out"), options)
    except (ValueError, OSError) as error:
        print(f"error: {in_words_of_the_user(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return interrupted("data", "finished shards are kept, the same command continues from there")
    return 0


def _run(name: str, out: str, options: dict[str, Any]) -> None:
    began = time.perf_counter()
    made = prepare(name, out, **options)
    seconds = time.perf_counter() - began
    manifest = Manifest.read(plain_folder(out) / MANIFEST)
    size = sum(record.bytes for record in manifest.shards)
    kept = f" ({manifest.count - made} were there)" if made < manifest.count else ""
    what = f"{manifest.count} images{kept}{_in_classes(manifest.classes)}"
    print(f"{out}: {what}, {size / 1e6:.1f} MB, {seconds:.1f} s, {made / seconds:.0f} images/s")
    if manifest.left_out:
        named = "; ".join(list(manifest.left_out.values())[:3])
        print(f"{len(manifest.left_out)} broken images are left out, listed in {MANIFEST}: {named}", file=sys.stderr)


def _in_classes(names: Sequence[str]) -> str:
    """Their number and names, only some if there are many."""
    if not names:
        return ""
    shown = [*names[:10], "..", names[-1]] if len(names) > 12 else names
    return f" in {len(names)} class{'es' * (len(names) > 1)} ({', '.join(shown)})"


def _parser() -> _Parser:
    parser = _Parser(prog=typed("data"), description="Prepare a data set as WebDataset shards with a manifest.")
    commands = parser.add_subparsers(dest="dataset", metavar="dataset", required=True)
    for name, dataset in DATASETS.items():
        text = description_of(dataset)
        formatter = argparse.ArgumentDefaultsHelpFormatter
        command = commands.add_parser(name, help=text, description=text, formatter_class=formatter)
        text = "folder to write; finished work of an interrupted run is kept"
        command.add_argument("--out", required=True, default=argparse.SUPPRESS, metavar="FOLDER", help=text)
        command.add_argument("--shard-size", type=int, default=SHARD_SIZE, metavar="N", help="images per shard")
        command.add_argument("--workers", type=int, default=1, metavar="N", help="processes that prepare images")
        for option in options_of(dataset).values():
            _add_option(command, option)
    return parser


def _add_option(command: argparse.ArgumentParser, option: Option) -> None:
    default = argparse.SUPPRESS if option.required or option.default is None else option.default
    if option.kind is bool:
        action = argparse.BooleanOptionalAction if default else "store_true"
        command.add_argument(option.flag, action=action, default=default, help=option.help)
        return
    command.add_argument(
        option.flag,
        type=option.kind,
        default=default,
        required=option.required,
        metavar=option.kind.__name__.upper(),
        help=option.help,
    )
