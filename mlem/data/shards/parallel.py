"""Work split over processes, with results in the order of the tasks."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

__all__ = ["end_with_parent", "in_order"]

_Result = TypeVar("_Result")

_AHEAD = 2  # tasks per process that are running, or done before they are needed
_function: Callable[..., Any]


def in_order(
    function: Callable[..., _Result], tasks: Iterable[tuple[Any, ...]], workers: int
) -> Generator[_Result, None, None]:
    """Yield `function(*task)` for each task, in order; memory does not grow with their number.

    Close the iterator to end the processes; they also end when this one is killed.

    Args:
        function: pickled once per process.
        tasks: the arguments of each call, pickled.
        workers: number of processes; 1: only this one.

    Raises:
        ValueError: a process was killed.
    """
    if workers == 1:
        yield from itertools.starmap(function, tasks)
        return
    waiting = iter(tasks)
    ahead: deque[Future[_Result]] = deque()
    # spawn: a fork would inherit held locks and running threads
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_begin, initargs=(function,)) as pool:
        try:
            while True:
                for task in itertools.islice(waiting, _AHEAD * workers - len(ahead)):
                    ahead.append(_submit(pool, task))
                if not ahead:
                    return
                yield ahead.popleft().result()
        except BrokenProcessPool as error:
            raise ValueError(
                "a process that prepared images was killed (out of memory?); run the same command with fewer workers"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _submit(pool: ProcessPoolExecutor, task: tuple[Any, ...]) -> Future[Any]:
    # a process started here inherits the mask: only the parent handles Ctrl-C
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return pool.submit(_work, task)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin(function: Callable[..., Any]) -> None:
    global _function
    _function = function
    end_with_parent()


def end_with_parent() -> None:
    """End this multiprocessing child when its parent dies, whatever it is waiting for.

    A killed parent may hold a lock that its children need: they would wait forever.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _work(task: tuple[Any, ...]) -> Any:
    return _function(*task)
