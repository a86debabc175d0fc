"""Work shared by processes, its results in the order of the tasks."""

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

_AHEAD = 2  # tasks for each process that are under way or done before they are needed
_function: Callable[..., Any]


def in_order(
    function: Callable[..., _Result], tasks: Iterable[tuple[Any, ...]], workers: int
) -> Generator[_Result, None, None]:
    """Yield `function(*task)` for each task, in order; memory does not grow with their number.

    Close the iterator to end the processes; they also end when this one is killed.

    Args:
        function: pickled once for each process.
        tasks: the arguments of each call, pickled.
        workers: processes that work; 1: this one alone.

    Raises:
        ValueError: a process was killed.
    """
    if workers == 1:
        yield from itertools.starmap(function, tasks)
        return
    waiting = iter(tasks)
    ahead: deque[Future[_Result]] = deque()
    # spawn: a fork would share locks that are held and threads that are running
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
    # a process that starts here inherits the mask: Ctrl-C is for the parent alone
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
    """End this process, of multiprocessing, when the one that started it dies, whatever it waits for then.

    A process that is killed in between may hold a lock that its processes ask for: they would wait for ever.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _work(task: tuple[Any, ...]) -> Any:
    return _function(*task)
