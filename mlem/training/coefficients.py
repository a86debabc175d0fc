"""Learning the coefficients of a family: the Lightning side of `mlem.multilevel.learning`.

The module holds only alpha and beta, so a checkpoint is tiny. Samples, coins and directions of a step are functions of
(seed, step): a resumed run repeats an uninterrupted one, and ranks share the coins and split the samples, so that their
mean gradient is that of one rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from mlem.denoiser import NetworkDenoiser
from mlem.multilevel.learning import TANGENTS, GradientEstimate, Objective, first_order, interval
from mlem.noise import RESERVED
from mlem.training.optimizers import renew_options
from mlem.training.progress import BarProgress, LineProgress

__all__ = [
    "HELD_OUT",
    "KINDS",
    "PLANS",
    "TIMES",
    "TRAINING",
    "CoefficientsModule",
    "Fit",
    "LearningLines",
    "learning_progress",
    "replicates",
]

TRAINING, HELD_OUT = RESERVED["learning"].start, RESERVED["judging"].start
"""First indices of the samples for learning and of the held-out ones: no other sample shares their noise."""
TIMES = (0.05, 0.2, 0.35, 0.5, 0.65, 0.8, 0.95)
"""Times at which p_k is logged."""
PLANS = 4
"""Plans per held-out sample."""
KINDS = ("systematic", "bernoulli")
"""The coins with which laws are compared."""


@dataclass(frozen=True)
class Fit:
    """Settings of learning.

    Attributes:
        images: samples to learn from, a multiple of `batch_size`; their references are cached.
        batch_size: samples per step, over all ranks.
        draws: replicates of the coins per step, at least 2; per sample if tangents is "reverse".
        updates: optimizer steps.
        learning_rate: of the first step; it decays to zero.
        tangents: "reverse", "exact" or "random".
        held_out: samples for the final evaluation, and as many others to accept or drop the updates.
        reference_steps: of the many-step run.
        weight: of the cost; None: chosen to keep the cost near its value at the start.
        log_every: steps between lines of progress.

    Raises:
        ValueError: for values out of range.
    """

    images: int
    batch_size: int
    draws: int
    updates: int
    learning_rate: float
    tangents: str
    held_out: int
    reference_steps: int
    weight: float | None = None
    log_every: int = 20

    def __post_init__(self) -> None:
        if self.tangents not in TANGENTS:
            raise ValueError(f"tangents must be one of {', '.join(TANGENTS)}, got {self.tangents!r}")
        if self.draws < 2:
            raise ValueError(f"draws must be >= 2, since each is a baseline for the others, got {self.draws}")
        if self.images % self.batch_size:
            raise ValueError(f"images must be a multiple of batch_size {self.batch_size}, got {self.images}")


class _Steps:
    """Counts steps. Stateless, so that Lightning may stop and resume it anywhere."""

    def __init__(self, count: int) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[int]:
        return iter(range(self._count))

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class CoefficientsModule(pl.LightningModule):
    """alpha and beta of levels 2 .. K as parameters (float64), and the weight of the cost.

    Args:
        objective: what is minimised; its networks are not part of the module.
        start: (2 + knots, K - 1), where learning begins.
        nearest: like start, the baseline: coefficients closest to the calibrated law.
        fit: settings of learning.
        names: of the levels.
    """

    alpha: nn.Parameter
    beta: nn.Parameter
    weight: Tensor

    def __init__(self, objective: Objective, start: Tensor, nearest: Tensor, fit: Fit, names: list[str]) -> None:
        super().__init__()
        alpha = start[:-1] if objective.knots else start[0]
        self.alpha, self.beta = nn.Parameter(alpha.clone()), nn.Parameter(start[-1].clone())
        # nan: to be measured; saved in the checkpoint, so that a resumed run uses the same value
        self.register_buffer(
            "weight", torch.tensor(torch.nan if fit.weight is None else fit.weight, dtype=torch.float64)
        )
        self.objective, self.fit_options, self.names = objective, fit, names
        self.first, self.nearest = start.clone(), nearest.clone()
        self._references: dict[tuple[int, int | None], Tensor] = {}

    @property
    def theta(self) -> Tensor:
        """(2 + knots, K - 1), detached, on the CPU."""
        return torch.cat([self.alpha.view(-1, len(self.beta)), self.beta[None]]).detach().cpu()

    def train_dataloader(self) -> Any:
        """One entry per step; a step depends only on its number."""
        return _Steps(self.fit_options.updates)

    def on_fit_start(self) -> None:
        self._home = self.trainer.strategy.root_device
        for denoiser in self.objective.denoisers:
            if isinstance(denoiser, NetworkDenoiser) and isinstance(denoiser.network, nn.Module):
                denoiser.network.to(self._home)
        if bool(torch.isnan(self.weight)):
            self.weight.fill_(self._mean(self._measured_weight()))

    def on_train_start(self) -> None:
        optimizer: Any = self.optimizers(use_pl_optimizer=False)
        scheduler: Any = self.lr_schedulers()
        renew_options(optimizer, scheduler, self.fit_options.learning_rate)

    def _measured_weight(self) -> float:
        options, found = self.fit_options, []
        for batch in range(options.images // options.batch_size):
            drawn = self._replicates(self.first, -1 - batch, batch)  # of steps that never occur
            found.append(self.objective.weight_for(self.first, *drawn))
        return sum(found) / len(found)

    def _mean(self, value: float) -> float:
        """The mean over ranks, whose shares are equal."""
        mean = self.trainer.strategy.reduce(torch.tensor(value, dtype=torch.float64, device=self._home))
        return float(mean)

    def _share(self, batch: int) -> Tensor:
        """Indices of this rank's samples of a batch."""
        size, ranks = self.fit_options.batch_size, self.trainer.world_size
        share = size // ranks
        first = TRAINING + batch * size + self.trainer.global_rank * share
        return torch.arange(first, first + share, device=self._home)

    def _reference(self, batch: int, steps: int | None) -> Tensor:
        """Reference of this rank's samples of a batch, computed once; steps: None means p = 1."""
        if (batch, steps) not in self._references:
            with torch.no_grad():
                self._references[batch, steps] = self.objective.reference(self._share(batch), steps)
        return self._references[batch, steps]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        estimate = self._estimate(self.global_step)
        self._record(self._mean(estimate.mse.mean().item()), estimate.cost, self._mean(estimate.left))
        # linear in the parameters: its gradient is the estimate, averaged over ranks like any other
        gradient = estimate.gradient.to(self.alpha)
        return (self.alpha * gradient[:-1].view_as(self.alpha)).sum() + (self.beta * gradient[-1]).sum()

    def _estimate(self, step: int) -> GradientEstimate:
        """Estimate of J and its gradient from this rank's samples."""
        theta, options, objective, weight = self.theta, self.fit_options, self.objective, self.weight.item()
        number = step % (options.images // options.batch_size)
        if options.tangents == "reverse":
            return first_order(objective, theta, *self._replicates(theta, step, number), weight)
        truth = self._reference(number, options.reference_steps)
        directions = objective.directions(step, options.draws) if options.tangents == "random" else None
        drawn = objective.draw(theta, step, options.draws)
        return objective.estimate(theta, drawn, self._share(number), truth, weight, directions)

    def _replicates(self, theta: Tensor, step: int, batch: int) -> tuple[Tensor, Tensor, Tensor]:
        """`replicates` for this rank's samples of a batch."""
        indices, plain = self._share(batch), self._reference(batch, None)
        return replicates(self.objective, self.fit_options, theta, step, indices, plain, self.trainer.global_rank)

    def _record(self, mse: float, cost: float, left: float) -> None:
        theta, values = self.theta, {"mse": mse, "cost": cost, "variance_left": left}
        values["objective"] = values["mse"] + self.weight.item() * cost
        for k, name in enumerate(self.names[1:]):
            values |= {f"alpha/{name}" + f"/{j}" * (j > 0): theta[j, k].item() for j in range(len(theta) - 1)}
            values[f"beta/{name}"] = theta[-1, k].item()
        p = self.objective.coefficients(theta).probabilities(self.objective.schedule, TIMES)
        for k, name in enumerate(self.names[1:], 1):
            values |= {f"p/{name}/t{time:g}": p[row, k].item() for row, time in enumerate(TIMES)}
        # immediately: Lightning writes after the step's checkpoint, and a kill in between would lose the line
        for logger in self.loggers:
            logger.log_metrics(values, self.global_step)
        self.log_dict({key: values[key] for key in ("objective", "mse", "cost")}, logger=False, prog_bar=True)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam([self.alpha, self.beta], lr=self.fit_options.learning_rate, betas=(0.9, 0.99))
        # to zero, which averages the noise of the last gradients
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / self.fit_options.updates)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def judge(self) -> dict[str, Any]:
        """The objective on held-out samples before, at the start of and after learning; every rank must call it.

        "Before" uses the coefficients closest to the calibrated law, "start" those predicted best by the calibration.
        For systematic and bernoulli coins. Each sample has its own coins, from the same uniform numbers in each case,
        so samples are independent: `half_width` is half of a 95 % interval; `change` (after minus before) and `learned`
        (after minus start) are paired differences. Plain numbers.
        """
        thetas = {"before": self.nearest, "start": self.first, "after": self.theta}
        weight, errors = self.weight.item(), self._errors(HELD_OUT, list(thetas.values()))
        costs = {name: self.objective.cost(theta).item() for name, theta in thetas.items()}
        judged: dict[str, Any] = {"samples": len(errors), "plans": PLANS, "weight": weight}
        for number, coins in enumerate(KINDS):
            judged[coins] = {}
            for place, (name, cost) in enumerate(costs.items()):
                mse, half = interval(errors[:, number, place])
                judged[coins][name] = {"objective": mse + weight * cost, "half_width": half, "mse": mse, "cost": cost}
            for place, (name, since) in enumerate({"change": "before", "learned": "start"}.items()):
                change, half = interval(errors[:, number, 2] - errors[:, number, place])
                change += weight * (costs["after"] - costs[since])
                judged[coins][name] = {"objective": change, "half_width": half}
        return judged

    def settle(self) -> dict[str, Any]:
        """Return to the start unless the updates lower the objective; every rank must call it, before `judge`.

        They do if the 95 % interval of the change lies below 0, on as many samples as `judge` has, which are neither
        learned from nor held out, and over both kinds of coins. Returns the change, its `half_width`, and whether the
        updates are `kept`. Plain numbers.
        """
        theta, weight = self.theta, self.weight.item()
        errors = self._errors(TRAINING + self.fit_options.images, [self.first, theta]).mean(1)
        change, half = interval(errors[:, 1] - errors[:, 0])
        change += weight * (self.objective.cost(theta) - self.objective.cost(self.first)).item()
        if not (kept := change + half < 0):
            with torch.no_grad():
                self.alpha.copy_(self.first[:-1].view_as(self.alpha))
                self.beta.copy_(self.first[-1])
        return {"objective": change, "half_width": half, "kept": kept}

    def _errors(self, first: int, thetas: Sequence[Tensor]) -> Tensor:
        """Errors of these laws on `held_out` samples from this index on, of all ranks: (N, kinds, laws)."""
        count, ranks = self.fit_options.held_out, self.trainer.world_size
        indices = torch.arange(first + self.trainer.global_rank, first + count, ranks, device=self._home)
        pairs = [(coins, theta) for coins in KINDS for theta in thetas]
        columns: list[list[Tensor]] = [[] for _ in pairs]
        for block in indices.split(self.fit_options.batch_size):
            with torch.no_grad():
                truth = self.objective.reference(block, self.fit_options.reference_steps)
            for column, (coins, theta) in zip(columns, pairs, strict=True):
                column.append(self.objective.held_out(theta, coins, block, truth, PLANS))
        mine = torch.stack([torch.cat(column) for column in columns], 1)
        return _gathered(mine, ranks).view(count, len(KINDS), len(thetas))


def replicates(
    objective: Objective, fit: Fit, theta: Tensor, step: int, indices: Tensor, plain: Tensor, rank: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Counts (D, R, K) of a step, and for each the indices (D, B) of its samples and their runs (D, B, *shape).

    With tangents "reverse" each sample of the global batch has its own draws, B = 1; otherwise they share
    them. indices, plain: (N,) and (N, *shape), this rank's samples of the batch and their runs with p = 1.
    """
    if fit.tangents != "reverse":
        counts = objective.draw(theta, step, fit.draws).counts
        return counts, indices.expand(fit.draws, -1), plain.expand(fit.draws, *plain.shape)
    own = len(indices) * fit.draws
    counts = objective.draw(theta, step, fit.batch_size * fit.draws).counts[rank * own : (rank + 1) * own]
    return counts, indices.repeat_interleave(fit.draws)[:, None], plain.repeat_interleave(fit.draws, 0)[:, None]


def _gathered(mine: Tensor, ranks: int) -> Tensor:
    """The rows of all ranks."""
    if ranks == 1:
        return mine
    import torch.distributed as distributed

    parts: list[Any] = [None] * ranks
    distributed.all_gather_object(parts, mine)
    return torch.cat(parts)


class LearningLines(LineProgress):
    """A line every few steps: objective, error, cost."""

    def __init__(self, batch_size: int, every: int) -> None:
        super().__init__(batch_size, "coefficients")
        self._every = every

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if trainer.is_global_zero and step % self._every == 0:
            metrics, speed = trainer.callback_metrics, self._speed.read(trainer, self._batch_size)
            parts = [f"{key} {float(metrics[key]):.4g}" for key in ("objective", "mse", "cost")]
            parts += [f"{speed[1]} left"] if speed else []
            print(f"{self._name}: step {step}/{trainer.max_steps}, {', '.join(parts)}", flush=True)


def learning_progress(fit: Fit, watched: bool) -> pl.Callback:
    """A bar in a terminal (`watched`), otherwise lines."""
    return BarProgress(fit.batch_size) if watched else LearningLines(fit.batch_size, fit.log_every)
