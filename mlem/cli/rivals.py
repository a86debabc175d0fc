"""`sample.py eval=rivals`: time of the recommended settings and of every alternative."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial

import torch
from rich.console import Console
from rich.table import Table

from mlem.cli.auto import print_choice
from mlem.cli.paths import family_folder
from mlem.cli.progress import WorkProgress
from mlem.cli.schema import Benchmark, Sample
from mlem.comparison.coupled import Comparison
from mlem.comparison.entry import Entry
from mlem.comparison.fastest import NAME, Fastest
from mlem.comparison.figures import rivals_vs_time
from mlem.comparison.rivals import fastest, recommended
from mlem.comparison.setup import Run
from mlem.multilevel.candidate import Recommendation

__all__ = ["measured_rivals"]


def measured_rivals(job: Sample, comparison: Comparison, entries: Sequence[Entry]) -> Callable[[], None]:
    """Measure recommended settings and rivals, write `fastest.json` and its figure; returns a function that prints."""
    options = job.eval
    assert isinstance(options, Benchmark)
    advice = _advice(job, comparison, options)
    own = [recommended(choice, target) for target, choice in advice.items()]
    runs = _dealt([_possible(comparison, entry) for entry in [*entries, *own]])
    if not runs:
        raise ValueError("eval.samplers: there is nothing to run; list at least one sampler")
    with WorkProgress(comparison.cost(runs)) as advance:
        comparison.measure(runs, advance)
    source = job.family or str(family_folder(None, job.root, job.data))
    found = fastest(comparison, runs, advice, options.targets, options.kind, source)
    path = comparison.folder / NAME
    found.save(path)
    rivals_vs_time(found, path.with_suffix(".png"))
    return partial(_print, found, advice)


def _advice(job: Sample, comparison: Comparison, options: Benchmark) -> dict[float, Recommendation]:
    """The recommendation for each target that can be reached."""
    family, found = comparison.family, dict[float, Recommendation]()
    torch.nn.ModuleList(level.network for level in family.levels).to(comparison.setup.device)
    for target in options.targets:
        try:
            found[target] = family.recommend(
                mse=target, kind=options.kind, batch_size=job.batch_size, check=options.check
            )
        except ValueError as error:
            print(f"left out: the recommendation for {target:g}: {error}", flush=True)
    return found


def _possible(comparison: Comparison, entry: Entry) -> list[Run]:
    """The runs of an entry; none, printing why, if the family cannot run it."""
    try:
        return comparison.runs(entry)
    except ValueError as error:
        print(f"left out: {entry.label}, {entry.solver}: {error}", flush=True)
        return []


def _dealt(runs: Sequence[Sequence[Run]]) -> list[Run]:
    """One run of each entry in turn, so that other load on the machine affects all rivals alike."""
    return [run for ones in itertools.zip_longest(*runs) for run in ones if run is not None]


def _print(found: Fastest, advice: dict[float, Recommendation]) -> None:
    """Print the recommendations, and a table: ms/image of the fastest run that reaches each error."""
    if found.recommendation is not None:
        print_choice(advice[found.recommendation.target])
    table = Table(title="ms/image of the fastest run with an error of at most ..", caption=found.about["caption"])
    table.add_column("rival")
    for target in found.targets:
        table.add_column(f"{target:.0e}", justify="right")
    for group in found.groups:
        best = [found.best(target, [group]) for target in found.targets]
        table.add_row(group, *("" if row is None else f"{1e3 * row.seconds:.2f}" for row in best))
    Console(width=None if Console().is_terminal else 120).print(table)
