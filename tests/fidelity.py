"""Our Inception path beside torch-fidelity's own calculation: `python -m tests.fidelity FOLDER` in FOLDER.

torch-fidelity imports torchvision for things that are not used here, and torchvision's wheels fail beside a CPU
torch: where it is missing, a stand-in with empty names serves. The weights are random, in the real format.
"""

from __future__ import annotations

import json
import sys
import warnings
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import nn

COUNT = 12
DATA = ["data=dead_leaves", "data.options.size=16", f"data.options.count={COUNT}", "trainer=cpu"]
NAMES = {
    "fid": "frechet_inception_distance",
    "kid": "kernel_inception_distance_mean",
    "precision": "precision",
    "recall": "recall",
}
"""Ours and theirs."""


class StandIn(ModuleType):
    """Any module of torchvision."""

    __path__: list[str] = []  # noqa: RUF012

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


class Finder:
    """Finds StandIns."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(name, self) if name.split(".")[0] == "torchvision" else None  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> StandIn:
        return StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


def stand_in_for_torchvision() -> None:
    if find_spec("torchvision") is not None:
        return
    sys.meta_path.insert(0, Finder())  # type: ignore[arg-type]
    import torchvision.transforms  # pyright: ignore[reportMissingImports]

    class Compose(list):
        def __call__(self, image: Any) -> torch.Tensor:
            return torch.from_numpy(np.array(image)).permute(2, 0, 1)  # all that torch-fidelity does to an image

    torchvision.transforms.Compose = Compose


def random_weights(path: Path) -> None:
    """A state dict of torch-fidelity's Inception, scaled so that activations neither vanish nor explode."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Blank(FeatureExtractorInceptionV3):
        def load_state_dict(self, *_: Any, **__: Any) -> None:
            pass

    torch.save({}, path)
    network = Blank("blank", ["2048"], str(path))
    generator = torch.Generator().manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=generator)
        elif isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1, generator=generator)
            module.running_var.uniform_(0.8, 1.2, generator=generator)
    torch.save(network.state_dict(), path)


def theirs(weights: Path) -> dict[str, float]:
    """torch-fidelity, from the two folders."""
    import torch_fidelity

    found = torch_fidelity.calculate_metrics(
        input1="generated",
        input2="real",
        samples_find_deep=True,
        fid=True,
        kid=True,
        prc=True,
        kid_subset_size=COUNT,
        kid_subsets=2,
        feature_extractor="inception-v3-compat",
        feature_extractor_weights_path=str(weights),
        batch_size=COUNT,
        cuda=False,
        cache=False,
        save_cpu_ram=True,
        verbose=False,
    )
    return {kind: found[name] for kind, name in NAMES.items()}


def refusals(weights: Path) -> dict[str, str]:
    """What is said of files that are no Inception."""
    from mlem.files import sha256
    from mlem.metrics import FID

    said, path = {}, Path("wrong.pth")
    for name, state in {"misfit": {"weight": torch.zeros(3)}, "payload": {"run": print}}.items():
        torch.save(state, path)
        try:
            FID("inception", (3, 16, 16), path, sha256(path))
        except ValueError as error:
            said[name] = str(error)
    return said


def main() -> None:
    stand_in_for_torchvision()
    from mlem.files import sha256
    from mlem.images import quantise
    from mlem.metrics import FID, Measure
    from mlem.outputs import read_pixels, write_png
    from tests.commands import job, run_here

    weights = Path("weights.pth")
    random_weights(weights)
    metric = ["metric=fid_inception", f"metric.weights={weights}", f'metric.sha256="{sha256(weights)}"']
    metric += ["metric.kid=true", "metric.precision_recall=true"]

    from mlem.cli.metrics import measure_of, prepared

    asked = job("sample", *DATA, *metric)
    shards = prepared(asked.data)
    reals = shards.images(range(COUNT))
    noise = torch.randn(reals.shape, generator=torch.Generator().manual_seed(1))
    generated = (1.5 * reals.flip(0) + 0.3 * noise).roll(3, 2)  # values outside [-1, 1] too
    for index, (real, fake) in enumerate(zip(quantise(reals), quantise(generated), strict=True)):
        write_png(Path(f"real/{index}.png"), real)
        write_png(Path(f"generated/{index % 3}/{index}.png"), fake)

    results: dict[str, Any] = {"theirs": theirs(weights), "refusals": refusals(weights), "sha256": sha256(weights)}
    run_here("sample", "eval=folder", "folder=generated", "out=scores", "batch_size=5", *DATA, *metric)
    results["png"] = json.loads(Path("scores/metrics.json").read_text())["scores"]

    measure = measure_of(asked.metric, asked.data, shards)
    assert isinstance(measure, Measure)
    fid = measure.start("cpu")
    fid.update(generated, range(COUNT))
    results["tensor"] = [vars(score) for score in measure.scores(fid)]
    results["cached"] = measure.cached
    assert torch.equal(read_pixels(Path("generated/0/0.png")), quantise(generated)[0])
    assert isinstance(fid, FID)
    weights.unlink()  # 96 MB
    Path("results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
