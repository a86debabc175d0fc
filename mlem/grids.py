"""Time grids: the times a solver visits, falling from 1 to 0."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mlem.arguments import MOST_STEPS, check_whole
from mlem.schedule import NoiseSchedule

__all__ = ["GRIDS", "TimeGrid"]


@dataclass(frozen=True)
class TimeGrid:
    """The times that a solver visits: `1 >= times[0] > ... > times[steps] >= 0`.

    Make one with `TimeGrid.make(name, schedule, steps)`; the names are the keys of `GRIDS`.
    """

    name: str
    times: tuple[float, ...]

    def __post_init__(self) -> None:
        falling = all(a > b for a, b in zip(self.times, self.times[1:], strict=False))
        if len(self.times) < 2 or not falling or self.times[0] > 1 or self.times[-1] < 0:
            raise ValueError(f"grid {self.name!r}: times must fall strictly within [0, 1], at least two of them")

    @property
    def steps(self) -> int:
        """Number of steps: one less than the number of times."""
        return len(self.times) - 1

    @staticmethod
    def make(name: str, schedule: NoiseSchedule, steps: int) -> TimeGrid:
        """The grid called `name` with `steps` steps under `schedule`.

        Raises ValueError for an unknown name, steps that are not a whole number >= 1, or more steps than timesteps on
        a discrete grid.
        """
        if name not in GRIDS:
            raise ValueError(f"grid must be one of {', '.join(GRIDS)}, got {name!r}")
        check_whole("steps", steps, most=MOST_STEPS)
        return TimeGrid(name, tuple(GRIDS[name](schedule, steps)))

    def below(self, t: float) -> TimeGrid:
        """The part of the grid from time t on, for samples that do not start from pure noise.

        Raises: ValueError if nothing is left.
        """
        rest = [time for time in self.times if time < t]
        if not 0 < t <= 1 or not rest:
            raise ValueError(f"t must be in (0, 1] and above the end of the grid, {self.times[-1]:g}, got {t}")
        return TimeGrid(self.name, (t, *rest))


def _uniform(schedule: NoiseSchedule, steps: int) -> list[float]:
    """Evenly in t, from 1 to 0."""
    return [(steps - i) / steps for i in range(steps + 1)]


def _down_to_zero(schedule: NoiseSchedule, kappas: Tensor) -> list[float]:
    """Times of falling noise-to-signal ratios, then 0; the first is exactly 1."""
    return [1.0, *schedule.time_from_kappa(kappas[1:]).tolist(), 0.0]


def _kappa_range(schedule: NoiseSchedule) -> tuple[float, float]:
    """Largest kappa with any signal, and the smallest before 0: at the first of the N timesteps."""
    return schedule.kappa(schedule.last).item(), schedule.kappa(1.0 / schedule.num_timesteps).item()


def _ou_range(schedule: NoiseSchedule) -> tuple[float, float]:
    """The same for OU time."""
    return schedule.ou_time(schedule.last).item(), schedule.ou_time(1.0 / schedule.num_timesteps).item()


def _ou_uniform(schedule: NoiseSchedule, steps: int) -> list[float]:
    """Evenly in OU time down to t = 1/N, then 0."""
    high, low = _ou_range(schedule)
    times = torch.linspace(high, low, steps, dtype=torch.float64)
    return [1.0, *schedule.time_from_ou_time(times[1:]).tolist(), 0.0]


def _ou_halving(schedule: NoiseSchedule, steps: int) -> list[float]:
    """Evenly in OU time, `h = s_1 / n`, down to h; then h/2, h/4, .. down to t = 1/N, then 0.

    The steps of Algorithm 3, arXiv:2406.00924v2. At most half of all steps are halvings.
    """
    whole, least = _ou_range(schedule)
    enough = (count for count in range(steps) if whole / (steps - count) / 2**count <= least)
    halvings = min(next(enough, steps), steps // 2)
    even = steps - halvings
    times = [whole * (even - i) / even for i in range(even)] + [whole / even / 2**i for i in range(1, halvings + 1)]
    return [1.0, *schedule.time_from_ou_time(torch.tensor(times[1:], dtype=torch.float64)).tolist(), 0.0]


def _log_snr(schedule: NoiseSchedule, steps: int) -> list[float]:
    """Evenly in log-SNR down to t = 1/N, then 0."""
    high, low = _kappa_range(schedule)
    fractions = torch.linspace(0, 1, steps, dtype=torch.float64)
    return _down_to_zero(schedule, torch.exp(math.log(high) + fractions * math.log(low / high)))


def _karras(schedule: NoiseSchedule, steps: int, rho: float = 7.0) -> list[float]:
    """Evenly in kappa^(1/rho) down to t = 1/N, then 0; eq. 5 of Karras et al., arXiv:2206.00364."""
    high, low = (kappa ** (1 / rho) for kappa in _kappa_range(schedule))
    fractions = torch.linspace(0, 1, steps, dtype=torch.float64)
    return _down_to_zero(schedule, (high + fractions * (low - high)) ** rho)


def _flow(schedule: NoiseSchedule, steps: int) -> list[float]:
    """The sigmas of diffusers' FlowMatchEulerDiscreteScheduler, r of rectified flow, then 0.

    Even in r before its shift, down to the shifted r of the first of the N timesteps.
    """
    high, low = schedule.kappa(1.0).item(), schedule.kappa(1.0 / schedule.num_timesteps).item()
    ratios = torch.linspace(high / (schedule.shift + high), low / (1 + low), steps, dtype=torch.float64)
    return _down_to_zero(schedule, schedule.shift * ratios / (1 - ratios))


def _timesteps(name: str, schedule: NoiseSchedule, steps: int) -> int:
    """N; raises ValueError for more steps."""
    n = schedule.num_timesteps
    if steps > n:
        raise ValueError(f"steps must be in [1, {n}] on the {name} grid, got {steps}")
    return n


def _trailing(schedule: NoiseSchedule, steps: int) -> list[float]:
    """The timesteps of diffusers' `timestep_spacing="trailing"`, then 0."""
    n = _timesteps("trailing", schedule, steps)
    return [round(n - i * n / steps) / n for i in range(steps)] + [0.0]


def _leading(schedule: NoiseSchedule, steps: int) -> list[float]:
    """The timesteps of diffusers' `timestep_spacing="leading"`, then 0; it starts below t = 1."""
    n = _timesteps("leading", schedule, steps)
    stride = n // steps
    return [(i * stride + 1) / n for i in reversed(range(steps))] + [0.0]


GRIDS: dict[str, Callable[[NoiseSchedule, int], list[float]]] = {
    "uniform": _uniform,
    "ou_uniform": _ou_uniform,
    "ou_halving": _ou_halving,
    "log_snr": _log_snr,
    "karras": _karras,
    "flow": _flow,
    "trailing": _trailing,
    "leading": _leading,
}
"""Grid name -> function of schedule and number of steps, returning the times."""
