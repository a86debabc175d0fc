"""DeepCache (Ma et al., arXiv:2312.00858): the deep features of a UNet are reused in N - 1 of N evaluations.

On its way up a UNet joins, path by path, features from below with skip connections. Path 0, the shallowest, begins at
the first convolution; the next ones begin at the ResNet blocks and downsamplers of the way down, in order. The feature
that arrives from below at path `branch` is kept when the whole network runs. In between, only the blocks at the ends
of paths 0 to `branch` run, on the kept feature.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn

from mlem.arguments import check_whole
from mlem.networks.calling import by_position, unwrapped
from mlem.networks.cost import flops

__all__ = ["DeepCache", "Reuse", "deep_cache_in"]

NOISE = 20.0
"""sigma / alpha above which features serve no call below: near pure noise they have another size."""

_UNETS = ("UNet2DModel", "UNet2DConditionModel", "PatchUNet2DModel")
_DOWN = ("DownBlock2D", "AttnDownBlock2D", "CrossAttnDownBlock2D")
_UP = ("UpBlock2D", "AttnUpBlock2D", "CrossAttnUpBlock2D")


@dataclass(frozen=True)
class Reuse:
    """How the deep features of a UNet are reused.

    Args:
        every: N: the whole network runs at evaluations 0, N, 2 N, .. of a trajectory; 1: at all of them.
        branch: the skip path, from 0, below which features are reused. The paper uses 2 for DDPM, 0 for Stable
            Diffusion.

    Raises:
        ValueError: a number is out of range.
    """

    every: int
    branch: int = 2

    def __post_init__(self) -> None:
        check_whole("every of reuse", self.every)
        check_whole("branch of reuse", self.branch, 0)

    def __str__(self) -> str:
        return f"every {self.every}, branch {self.branch}"

    def whole(self, calls: float) -> float:
        """How many of so many calls of a trajectory run the whole network."""
        return math.ceil(calls / self.every)

    def whole_at(self, kappas: Iterable[float]) -> int:
        """How many calls of a trajectory, at these sigma / alpha, run the whole network."""
        whole, served, kept = 0, 0, math.nan
        for here in kappas:
            if whole and self.serves(served, kept, here):
                served += 1
            else:
                whole, served, kept = whole + 1, 0, here
        return whole

    def serves(self, served: int, kept: float, here: float) -> bool:
        """Whether features that served so often serve once more.

        Args:
            served: calls.
            kept, here: sigma / alpha where they were kept and of the call; NaN: unknown.
        """
        return served < self.every - 1 and not (kept > NOISE and here <= NOISE)


class DeepCache(nn.Module):
    """A UNet that runs as a whole at every Nth call, and in between on the deep feature that it kept.

    Unlike the paper's, it also runs as a whole at the first call that is not near pure noise, whose features ruined
    samples below (`LOG.md`, 2026-11-29), if it knows where it is called. That costs one whole call at most.

    It is not a function of (x, t): its calls must be those of one trajectory, in order and of the same samples. `start`
    begins another trajectory; so does a call with another number of rows.

    Args:
        network: a UNet2DModel or UNet2DConditionModel of diffusers, or one on patches; it is not changed.
        reuse: when the whole network runs, and what is kept.
        shape: of one sample, for which FLOPs are counted.
        conditions: what the network takes besides x and t, as in `Level`.

    Attributes:
        kappa: sigma / alpha of the next call; NaN: unknown.
        shallow_share: FLOPs of a call on the kept feature, as a share of those of the whole network.
        share: `shallow_share` if the last call was on the kept feature, else 1.

    Raises:
        ValueError: the network is not such a UNet, or has no such branch.
    """

    def __init__(
        self,
        network: nn.Module,
        reuse: Reuse,
        shape: Sequence[int],
        conditions: Mapping[str, int | tuple[int | None, ...]] | None = None,
    ) -> None:
        super().__init__()
        self.network, self.reuse = unwrapped(network), reuse
        # not submodules: all their parameters belong to the network
        self._cut = _cut(self.network, reuse.branch)
        self._calls = by_position(self.network), by_position(self._cut.shallow)
        self.shallow_share = self.share = 1.0
        self.kappa = math.nan
        self.start()
        if reuse.every > 1:
            whole, shallow = (flops(self, shape, conditions) for _ in range(2))
            self.shallow_share = shallow / whole
            self.start()

    def start(self) -> None:
        """Begin a trajectory: the next call runs the whole network."""
        self._served, self._kept_at, self._cut.recall.feature = 0, math.nan, None

    def evaluations(self, calls: float, whole: int | None = None) -> float:
        """FLOPs of the first calls of a trajectory, over those of the whole network at one.

        whole: how many of them run the whole network; by default every Nth.
        """
        as_whole = self.reuse.whole(calls) if whole is None else whole
        return as_whole + (calls - as_whole) * self.shallow_share

    def forward(self, x: Tensor, time: Tensor, **conditions: Tensor) -> Any:
        """The output of the network: x (B, ...), time (B,) and conditions (B, ...)."""
        kept = self._cut.recall.feature
        run_whole, run_shallow = self._calls
        known = kept is not None and len(kept) == len(x)
        if known and self.reuse.serves(self._served, self._kept_at, self.kappa):
            self._served, self.share = self._served + 1, self.shallow_share
            return run_shallow(x, time, **conditions)
        self._served, self._kept_at, self.share = 0, self.kappa, 1.0
        hook = self._cut.below.register_forward_hook(self._keep)
        try:
            return run_whole(x, time, **conditions)
        finally:
            hook.remove()

    def _keep(self, module: nn.Module, inputs: object, output: Any) -> None:
        self._cut.recall.feature = output[0] if isinstance(output, tuple) else output


def deep_cache_in(network: object) -> DeepCache | None:
    """The DeepCache in a network, which may be guided, or None."""
    parts = network.modules() if isinstance(network, nn.Module) else ()
    return next((part for part in parts if isinstance(part, DeepCache)), None)


class _Recall(nn.Module):
    """Replaces the middle of a shallow network: returns the kept feature, whatever the input."""

    def __init__(self) -> None:
        super().__init__()
        self.feature: Tensor | None = None

    def forward(self, *inputs: object) -> Tensor | None:
        return self.feature


class _Cut(NamedTuple):
    """A UNet cut at a skip path.

    Args:
        shallow: the part above, a network of the same modules.
        below: the part below, whose output is kept.
        recall: supplies the kept output to the shallow network.
    """

    shallow: nn.Module
    below: nn.Module
    recall: _Recall


def _cut(network: Any, branch: int) -> _Cut:
    """Cut a diffusers UNet at a skip path. Raises ValueError if it cannot be cut."""
    kind = type(network).__name__
    if kind not in _UNETS or not type(network).__module__.startswith(("diffusers.", "mlem.")):
        raise ValueError(f"features are reused in a {' or a '.join(_UNETS)}, but this is a {kind}; leave out reuse")
    if kind == "PatchUNet2DModel":
        inner = _cut(network.unet, branch)
        return inner._replace(shallow=_with(network, unet=inner.shallow))
    ups = [*network.up_blocks]
    for block, known in [*((one, _DOWN) for one in network.down_blocks), *((one, _UP) for one in ups)]:
        if type(block).__name__ not in known:
            raise ValueError(
                f"features are reused in a UNet of {', '.join(known)}, but this one has a {type(block).__name__}; "
                "leave out reuse"
            )
    deepest = sum(len(block.resnets) for block in ups) - 1
    if branch >= deepest:  # there, only the middle block would be skipped
        raise ValueError(f"branch of reuse must be in [0, {deepest - 1}] for this UNet, got {branch}")
    below, kept = ups[-1], branch + 1
    shallow_ups: list[nn.Module] = []
    while kept:
        block = ups.pop()
        own = len(block.resnets) - kept  # its ResNet blocks that stay below
        below = _inner(block, own - 1) if own > 0 else ups[-1]
        shallow_ups.insert(0, _part(block, slice(max(own, 0), None)))
        kept -= min(kept, len(block.resnets))
    recall = _Recall()
    downs = nn.ModuleList(_downs(network.down_blocks, branch))
    shallow = _with(network, down_blocks=downs, mid_block=recall, up_blocks=nn.ModuleList(shallow_ups))
    return _Cut(shallow, below, recall)


def _downs(blocks: Sequence[Any], paths: int) -> list[nn.Module]:
    """The first blocks of the way down, in which this many paths begin."""
    found: list[nn.Module] = []
    for block in blocks:
        if not paths:
            break
        own = len(block.resnets)
        found.append(block if paths > own else _with(_part(block, slice(paths)), downsamplers=None))
        paths -= min(paths, own + 1)
    return found


def _part(block: Any, rows: slice) -> nn.Module:
    """A block with some of its ResNet blocks and the parts that belong to them."""
    return _with(block, **{name: getattr(block, name)[rows] for name in _lists(block)})


def _inner(block: Any, number: int) -> nn.Module:
    """The module whose output is that of one ResNet block of a block: itself, or the attention after it."""
    return getattr(block, _lists(block)[-1])[number]


def _lists(block: Any) -> list[str]:
    return [name for name in ("resnets", "attentions") if hasattr(block, name)]


def _with(module: nn.Module, **parts: nn.Module | None) -> nn.Module:
    """A copy of a module that shares all parts except these."""
    other = copy.copy(module)
    vars(other)["_modules"] = vars(module)["_modules"] | parts
    return other
