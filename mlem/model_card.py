"""Model cards: the README.md of a level's or a family's folder, with the metadata that the Hugging Face hub reads.

Their text comes from the other files of the folder. `mlem.model_code` has the blocks of code.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from mlem.conditions import Described, described
from mlem.model_code import Export, by_diffusers, by_mlem, family_by_mlem, quoted

__all__ = ["family_card", "level_card"]

_ERROR = "mean squared error of the noise estimate on held-out samples"
_SHOWN = ("steps", "training_seconds", "error", "seconds", "batch_size", "device")
"""Measurements with their own row on a card."""


def level_card(export: Export) -> str:
    """The card of a level."""
    about, conditions = export.about, export.conditions
    parts = [
        _head(about, conditions, "diffusers" if export.of_diffusers else None),
        f"# {about['name']}, a diffusion model{_of(about)}",
        "A level of an mlem family: networks of increasing cost for one data set, sampled alone or together.",
        _table(["", ""], [*_facts(export), *_measurements(about["measured"])]),
        "## Sampling with mlem",
        by_mlem(export),
    ]
    if export.of_diffusers:
        parts += ["## Sampling with diffusers", *_by_diffusers(export)]
    return "\n\n".join(parts) + "\n"


def family_card(folder: str, levels: Sequence[Mapping[str, Any]]) -> str:
    """The card of a family.

    Args:
        folder: its name.
        levels: their mlem.json, cheapest first.
    """
    largest = levels[-1]
    conditions = described(largest.get("conditions"))
    told = "".join(f"They take `{name}`, {_kind(value)}. " for name, value in conditions.items())
    columns = ["level", "parameters", "MFLOPs per call", "ms per sample", "error", "training steps"]
    rows = [
        [
            f"[{about['name']}](level_{about['name']}/README.md)",
            f"{about['parameters']:,}",
            _flops(about),
            *(_number(about["measured"], name) for name in ("seconds", "error", "steps")),
        ]
        for about in levels
    ]
    parts = [
        _head(largest, conditions, None),
        f"# A family of diffusion models{_of(largest)}",
        f"Networks of increasing cost for one data set, which mlem samples alone or together. {told}"
        f"Licence of the data set: {_licence(largest)}.",
        _table(columns, rows),
        f"Error: {_ERROR}.",
        family_by_mlem(folder, conditions),
        f"With a calibration (`python -m mlem.multilevel calibrate {folder}`) the levels share the work: "
        "`sample(..., plan=family.plan(budget=0.3))`. The folder of each level can be read alone; its card says how to "
        "sample it with diffusers.",
    ]
    return "\n\n".join(parts) + "\n"


def _head(about: Mapping[str, Any], conditions: Described, library: str | None) -> str:
    """The hub's metadata. It knows licences only by lower-case names."""
    licence = about.get("licence", "")
    lines = [f"license: {licence or 'unknown'}"]
    if licence and not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", licence):
        lines = ["license: other", f"license_name: {json.dumps(licence)}"]
    if library is not None:
        lines.append(f"library_name: {library}")
    if len(about["shape"]) == 3 and not conditions:
        lines.append("pipeline_tag: unconditional-image-generation")
    return "\n".join(["---", *lines, "tags:", "- diffusion", "- mlem", "---"])


def _facts(export: Export) -> list[list[str]]:
    """Rows that describe a level."""
    about = export.about
    return [
        ["data set", f"{_plain(about['data'] or 'not stated')}; a sample has shape {tuple(about['shape'])}"],
        ["licence of the data set", _licence(about)],
        ["network", f"{_plain(export.kind)}, {about['parameters']:,} parameters, {_flops(about)} MFLOPs per call"],
        *([f"takes `{name}`", _kind(value)] for name, value in export.conditions.items()),
        ["predicts", f"`{export.prediction}`"],
        ["noise schedule", _schedule(about["schedule"])],
    ]


def _measurements(measured: Mapping[str, Any]) -> list[list[str]]:
    """Rows of a level's measurements."""
    rows: list[list[str]] = []
    if "steps" in measured:
        seconds = f", {_number(measured, 'training_seconds')} s" if "training_seconds" in measured else ""
        rows.append(["training", f"{_number(measured, 'steps')} steps{seconds}"])
    if "error" in measured:
        rows.append(["error", f"{_number(measured, 'error')}: {_ERROR}"])
    if "seconds" in measured:
        batch = f" in batches of {measured['batch_size']}" if "batch_size" in measured else ""
        device = f" on {_plain(measured['device'])}" if "device" in measured else ""
        rows.append(["time per call", f"{_number(measured, 'seconds')} ms per sample{batch}{device}"])
    return rows + [[_plain(name), _plain(value)] for name, value in measured.items() if name not in _SHOWN]


def _by_diffusers(export: Export) -> list[str]:
    """How to sample a level with diffusers, or why that is impossible; paragraphs."""
    code = by_diffusers(export)
    if code is None and export.scheduler is None:
        return [f"No diffusers scheduler fits this network, whose prediction is `{export.prediction}`."]
    if code is None:
        return [
            f"`{export.kind}.from_pretrained({quoted(export.folder)})` is the network for the pipeline of its class."
        ]
    alike = "The same noise gives the samples above"
    if export.prediction.clip is not None:
        alike = "The samples have the same distribution; diffusers draws the noise of every step"
    elif export.grid == "trailing":
        alike += (
            f", for numbers of steps that divide {export.about['timesteps']}; for others, diffusers' DDIM steps to "
        )
        alike += "noise levels other than those of its next timesteps"
    if export.index is None:
        alike = f"This folder is not a diffusers pipeline, but the loop is short. {alike}"
    elif export.conditions:
        alike += f". `{export.index['_class_name']}` is the pipeline for a UNet2DModel with classes, here with the "
        alike += "scheduler of this folder; pass the number of steps, its default is one"
    return [f"{alike}.", code]


def _of(about: Mapping[str, Any]) -> str:
    return f" of {_plain(about['data'])}" if about["data"] else ""


def _licence(about: Mapping[str, Any]) -> str:
    return _plain(about.get("licence") or "not stated")


def _flops(about: Mapping[str, Any]) -> str:
    return f"{about['flops'] / 1e6:,.4g}"


def _number(measured: Mapping[str, Any], name: str) -> str:
    """A measurement as a table cell, times in milliseconds; empty if missing."""
    value = measured.get(name, "")
    if not isinstance(value, int | float):
        return _plain(value)
    written = {"seconds": f"{1e3 * value:.3g}", "training_seconds": f"{value:,.0f}", "error": f"{value:.4g}"}
    return written.get(name, f"{value:,}")


def _kind(value: int | tuple[int | None, ...]) -> str:
    """A condition in words."""
    if isinstance(value, tuple):
        return f"rows of shape {str(value).replace('None', 'n')}"
    return f"the class, 0 to {value - 1}; {value} is no class" if value > 1 else "0, the one class"


def _schedule(config: Mapping[str, Any]) -> str:
    """The kind of a noise schedule and its options; for a table, its length."""
    options = {name: value for name, value in config.get("config", config).items() if name != "kind"}
    short = [f"{name} {len(value) if isinstance(value, list) else value}" for name, value in options.items()]
    return _plain(", ".join([str(config["kind"]), *short]))


def _plain(value: Any) -> str:
    """Text for a table cell."""
    return " ".join(str(value).split()).replace("|", "\\|")


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
