"""Finding a trained family."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from mlem.files import read_object


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
            f"python train.py model=family data={config.data.source}"
        )
    return max(found, key=lambda path: path.stat().st_mtime).parent


def _data(path: Path) -> str:
    return read_object(path).get("data", "")
