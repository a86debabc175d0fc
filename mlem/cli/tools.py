"""The installed command `mlem`: its tools by name."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from mlem.cli.errors import USAGE, instead
from mlem.invocation import interrupted

__all__ = ["main"]

_TOOLS = {
    "data": ("mlem.data.command", "prepare a data set as shards with a manifest"),
    "multilevel": ("mlem.multilevel.command", "calibrate a family, show its calibration, memorise a plan"),
    "outputs": ("mlem.outputs.command", "check folders of samples, or join them"),
    "report": ("mlem.report.command", "write the report.html of a run folder again"),
    "runs": ("mlem.runs", "list the training runs below a folder"),
}
"""name: the module of its `main`, and what it does."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the tool named by the first argument with the others; return the exit code: 2 for bad input."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage())
        return 0 if arguments else USAGE
    name, *others = arguments
    if name not in _TOOLS:
        print(f"mlem: {name}: there is no such tool{instead(name, list(_TOOLS))}", file=sys.stderr)
        return USAGE
    try:
        return importlib.import_module(_TOOLS[name][0]).main(others)
    except KeyboardInterrupt:  # during its import
        return interrupted(name, "nothing was started")


def _usage() -> str:
    lines = [
        "Train a family of diffusion networks and sample it fast: tools besides mlem-train and mlem-sample.",
        "",
    ]
    lines += ["usage: mlem TOOL ...", ""]
    lines += [f"  {name:12s}{words}" for name, (_, words) in _TOOLS.items()]
    return "\n".join([*lines, "", "For more: mlem TOOL --help, mlem-train --help and mlem-sample --help"])
