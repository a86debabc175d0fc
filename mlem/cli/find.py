"""Where runs lie: the folders that a job writes, the family that it reads, and what makes one that is not there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from mlem.cli.config import CONFIGS, written
from mlem.files import read_object

_DEFAULT = {"samples": "samples/{sampler}_{steps}", "benchmark": "error_vs_time", "scaling": "scaling_law"}
"""Where each `eval` writes below root; the others write where out= says, or nowhere."""
_SHARED = ("seeds", "format", "metric", "debug")
"""What jobs of `eval=samples` may differ in that write into one folder."""


def run_folder(config: DictConfig, size: str) -> Path:
    """Of the run that trains the level of this size."""
    return Path(config.root) / f"unet_{size}"


def out_folder(config: DictConfig) -> Path:
    """Where `sample.py` writes what it makes."""
    if config.out is not None:
        return Path(config.out)
    return Path(config.root) / _DEFAULT[config.eval.name].format(sampler=config.sampler.name, steps=config.steps)


def folders(config: DictConfig) -> list[Path]:
    """Those that a job writes, whatever else it may read."""
    if "eval" in config:
        return [out_folder(config)] if config.out is not None or config.eval.name in _DEFAULT else []
    if config.dry_run:
        return []
    if config.model.name == "coefficients":
        return [Path(config.root) / "coefficients"]
    if "levels" in config.model:
        return [Path(config.root) / "family", *(run_folder(config, size) for size in config.model.levels)]
    return [run_folder(config, config.model.size)]


def same_job(one: DictConfig, other: DictConfig) -> bool:
    """Whether two jobs of `sample.py` add to the same samples."""
    if "eval" not in one or one.eval.name != "samples":
        return False
    first, second = (
        {key: value for key, value in OmegaConf.to_container(config, resolve=True).items() if key not in _SHARED}  # type: ignore[union-attr]
        for config in (one, other)
    )
    return first == second


def family_folder(config: DictConfig) -> Path:
    """The folder that `family=` names, or of the newest family of this data set beside root.

    Raises FileNotFoundError that says how to make one.
    """
    if config.family is not None:
        return Path(config.family)
    found = [path for path in Path(config.root).parent.glob("*/family/family.json") if _data(path) == config.data.name]
    if not found:
        raise FileNotFoundError(
            f"there is no trained family of {config.data.name} under {Path(config.root).parent}; make one with: "
            f"{training(config, 'family')}"
        )
    return max(found, key=lambda path: path.stat().st_mtime).parent


def training(config: DictConfig, model: str) -> str:
    """The command that trains `model` on the data and under the root of this config."""
    data = config.data
    path = CONFIGS / "data" / f"{data.source}.yaml"
    usual: Any = OmegaConf.load(path).options if path.is_file() else {}
    given = [f"model={model}", f"data={data.source}"]
    given += [f"data.options.{key}={written(value)}" for key, value in data.options.items() if value != usual.get(key)]
    given += [f"root={config.root}"] if config.root != f"runs/{data.name}" else []
    return " ".join(["python train.py", *given])


def _data(path: Path) -> str:
    return read_object(path).get("data", "")
