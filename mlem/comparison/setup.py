"""What the samplers of a comparison share, and the runs of an entry."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from mlem.comparison.entry import Entry
from mlem.comparison.handmade import level_name
from mlem.comparison.row import MULTILEVEL, Row
from mlem.family import Family
from mlem.grids import TimeGrid
from mlem.level import Level
from mlem.metrics import Measure
from mlem.metrics.similarity import SMALLEST
from mlem.multilevel.identity import plan_for_use
from mlem.multilevel.plan import Plan
from mlem.multilevel.planner import check_estimator
from mlem.networks import Reuse
from mlem.reusing import reusing, whole_calls
from mlem.sampling import Sampler, solver_of
from mlem.solvers import GridPoint, GridPoints, Solver, quadrature_weights

__all__ = ["Run", "Setup", "Truth"]


@dataclass(frozen=True)
class Run:
    """A sampler at one number of steps, to be measured.

    Attributes:
        row: names and settings, without measurements.
        solver: with its options.
        grid: name of the time grid; None for the solver's own choice.
        plan: what runs at each evaluation; None: the level `row.level` runs whole at all of them.
        cost: per image, in evaluations of the largest level by FLOPs.
        reuse: of the deep features of that level.
    """

    row: Row
    solver: Solver
    grid: str | None
    plan: Plan | None
    cost: float
    reuse: Reuse | None = None

    @property
    def alone(self) -> bool:
        """Whether one level runs, whole at every evaluation."""
        return self.plan is None and self.reuse is None


@dataclass(frozen=True)
class Truth:
    """Reference samples of a batch.

    Attributes:
        x: (B, *shape).
        pictures: the images, (B, C, H, W); None if the family has no `comparable` images.
    """

    x: Tensor
    pictures: Tensor | None


@dataclass(frozen=True)
class Setup:
    """What the samplers of a comparison share.

    Attributes:
        family: its largest level gives the references.
        blocks: indices of the images, in batches.
        seed: of the noise.
        reference_steps: of the references.
        device: where networks run.
        precision: of the networks, as in `Sampler`.
        measure: FID and similar; None for the error alone.
    """

    family: Family
    blocks: list[list[int]]
    seed: int = 0
    reference_steps: int = 1000
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    precision: str = "fp32"
    measure: Measure | None = None

    @property
    def count(self) -> int:
        """Number of images."""
        return sum(map(len, self.blocks))

    @property
    def caption(self) -> str:
        """The beginning of a caption: data, images, reference."""
        return (
            f"{self.family.data}, {self.count} images, seed {self.seed}; reference: level {self.family.level().name}, "
            f"{self.reference_steps} steps, same noise"
        )

    def runs(self, entry: Entry) -> list[Run]:
        """The runs of an entry, by steps. Raises ValueError for what does not fit the family or the solver."""
        solver, found = solver_of(entry.solver, **entry.options), []
        expand = self._together if entry.planned else self._alone
        for steps in entry.steps:
            grid = solver.grid(self.family.schedule, steps, entry.grid)
            row = Row(entry.label, steps, "", solver=entry.method, grid=grid.name, target=entry.target)
            row = replace(row, rival=entry.rival, reference=solver.reference if solver.coupled else "")
            found += expand(entry, solver, grid, row)
        return found

    def _alone(self, entry: Entry, solver: Solver, grid: TimeGrid, row: Row) -> Iterator[Run]:
        points = GridPoint.of(self.family.schedule, grid)
        evaluations = solver.evaluations(points)
        if entry.reuse is not None and not solver.sequential:
            raise ValueError(f"{solver.name} solves for many times at once: leave out reuse")
        names = self.family.names if entry.reuse is None else self.family.names[-1:]
        for name in [level_name(self.family, one) for one in entry.levels or names]:
            level = self.family.level(name)
            cost = evaluations * level.flops / self.family.level().flops
            if entry.reuse is not None:
                cache = reusing(level, entry.reuse).cache
                cost = cache.evaluations(evaluations, _whole_calls(entry.reuse, solver, points))
            yield Run(replace(row, level=name, levels=name), solver, entry.grid, None, cost, entry.reuse)

    def _together(self, entry: Entry, solver: Solver, grid: TimeGrid, row: Row) -> Iterator[Run]:
        points = GridPoint.of(self.family.schedule, grid)
        plan, seed = self._plan(entry, solver, points), 0 if entry.spec is None else entry.spec.seed
        names, top = plan.levels or tuple(self.family.names), self.family.level()
        cache = None if entry.reuse is None or top.name not in names else reusing(top, entry.reuse).cache
        known = plan.fingerprint(seed)[:12]
        row = replace(row, level=MULTILEVEL, levels="+".join(names), coins=plan.coins, plan=known)
        flops = torch.tensor([self.family.level(name).flops for name in names], dtype=torch.float64)
        for delta in entry.deltas or (None,):
            for trial in range(entry.trials) if entry.trials is not None else (None,):
                tossed = delta is not None or trial is not None
                drawn = plan.redrawn(delta or 0.0, seed + (trial or 0)) if tossed else plan
                cost = drawn.cost(flops / top.flops)
                if cache is not None:
                    calls = drawn.calls[-1].item()
                    cost -= calls - cache.evaluations(calls, _whole_calls(cache.reuse, solver, points, drawn))
                yield Run(replace(row, delta=delta, trial=trial), solver, entry.grid, drawn, cost, entry.reuse)

    def _plan(self, entry: Entry, solver: Solver, points: GridPoints) -> Plan:
        if entry.spec is not None:
            return plan_for_use(entry.spec, self.family, solver, points, entry.reuse)
        if isinstance(entry.made, Plan):
            return entry.made
        assert entry.made is not None
        plan = entry.made.plan(self.family, solver.evaluations(points))
        check_estimator(solver, points, plan.estimator)
        return plan

    def sampler(self, run: Run) -> Sampler:
        """The sampler of this run."""
        model = self.family if run.plan is not None else self.family.level(run.row.level)
        return self._bind(model, run.solver, run.row.steps, run.grid, run.plan, run.reuse)

    def reference(self, solver: str) -> Sampler:
        """The many-step sampler of the largest level, the reference for runs with this `solver.reference`."""
        return self._bind(self.family.level(), solver, self.reference_steps)

    @property
    def comparable(self) -> bool:
        """Whether samples are images, directly or decoded, large enough for `mlem.metrics.ssim`."""
        decoder, shape = self.family.decoder, self.family.shape
        if decoder is not None:
            shape = decoder.picture_shape(shape)
        elif self.family.level().latents:
            return False
        return len(shape) == 3 and min(shape[1:]) >= SMALLEST

    def truth(self, x: Tensor) -> Truth:
        """These samples (B, *shape) of the reference, for comparison."""
        return Truth(x, self.family.pictures(x.to(self.device)) if self.comparable else None)

    def pictures(self, samples: Tensor) -> Tensor:
        """The images of samples (B, *shape), on the CPU; see `Family.pictures`."""
        return self.family.pictures(samples.to(self.device)).cpu()

    def warm_up(self) -> None:
        """Keep warm-up out of the timings: the first call for a batch size sets up kernels."""
        for level in self.family.levels:
            for size in {len(self.blocks[0]), len(self.blocks[-1])}:
                self._bind(level, "ddim", 2).run(range(size))

    def _bind(
        self,
        model: Family | Level,
        solver: str | Solver,
        steps: int,
        grid: str | None = None,
        plan: Plan | None = None,
        reuse: Reuse | None = None,
    ) -> Sampler:
        return Sampler(
            model,
            solver=solver,
            steps=steps,
            grid=grid,
            plan=plan,
            reuse=reuse,
            seed=self.seed,
            device=self.device,
            precision=self.precision,
        )


def _whole_calls(reuse: Reuse, solver: Solver, points: GridPoints, plan: Plan | None = None) -> int | None:
    """Calls that run the whole network; None where they are not known before the run."""
    if not solver.linear or (plan is not None and plan.per_sample):
        return None
    return whole_calls(reuse, quadrature_weights(solver, points.schedule, points)[1], plan)
