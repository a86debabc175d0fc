"""Progress bars."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

__all__ = ["with_bar"]


def with_bar(batches: Sequence[Sequence[int]], show: bool) -> Iterator[Sequence[int]]:
    """Iterate over the batches with a bar that counts images."""
    if not show:
        yield from batches
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("sampling"), BarColumn(), MofNCompleteColumn(), TextColumn("images"), TimeRemainingColumn())
    with Progress(*columns) as bar:
        task = bar.add_task("sampling", total=sum(map(len, batches)))
        for batch in batches:
            yield batch
            bar.advance(task, len(batch))
