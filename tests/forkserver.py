"""Commands in processes of their own that need no imports: forked from one that has made them all.

`python train.py` spends most of a short run on imports. Here a server makes them once, and for each command forks a
child that takes over arguments, folder and environment, and runs the script as `__main__`. PYTHONPATH may name another
copy of the repository.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import functools
import gc
import importlib
import json
import math
import os
import runpy
import select
import selectors
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Never, Self

REPOSITORY = Path(__file__).resolve().parents[1]
LIMIT = 1 << 20
"""Bytes of a request, at most."""
MODULES = (
    "mlem.networks.unet_2d",
    "hydra.core.override_parser.overrides_parser",
    "matplotlib.pyplot",
    "mlem.cli.sample",
    "mlem.cli.train",
    "sklearn.datasets",
    "wandb.sdk.launch",
)
"""What commands import, now or later."""
OURS = ("mlem", "tests", "benchmarks")
NUMBER = struct.Struct("i")


class Forked:
    """A command that runs; as subprocess.Popen with its output caught as text."""

    def __init__(self, args: list[str], cwd: Path, env: Mapping[str, str]) -> None:
        """args: the script, or `-m` and a module, and its options."""
        self.args, self.returncode = args, None
        pipes = [os.pipe() for _ in range(3)]
        self._out, self._err, self._status = (ours for ours, _ in pipes)
        request = json.dumps({"args": args, "cwd": str(cwd), "env": dict(env)}).encode()
        assert len(request) < LIMIT
        socket.send_fds(_server(), [request], [theirs for _, theirs in pipes])
        for _, theirs in pipes:
            os.close(theirs)
        self.pid = self._next()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.communicate()

    def _next(self) -> int:
        """What the server tells next: the process, then how it ended."""
        told = os.read(self._status, NUMBER.size)
        assert told, "the server of processes has ended"
        return NUMBER.unpack(told)[0]

    def poll(self) -> int | None:
        if self.returncode is None and select.select([self._status], [], [], 0)[0]:
            self.returncode = self._next()
            os.close(self._status)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """All of standard output and standard error, when it has ended, and all those that it started.

        Raises AssertionError, which says where each stood, when that takes longer than `timeout` seconds.
        """
        if not hasattr(self, "_texts"):
            told: dict[int, bytes] = {self._out: b"", self._err: b""}
            still = set(told)
            if not self._read(told, still, math.inf if timeout is None else timeout):
                for pid in (self.pid, *children(self.pid)):
                    _abort(pid)
                self._read(told, still, 10)
                raise AssertionError(f"{self.args} not over after {timeout} s: {told[self._err].decode()}")
            self._texts = told[self._out].decode(), told[self._err].decode()
        while self.poll() is None:
            select.select([self._status], [], [])
        return self._texts

    def _read(self, told: dict[int, bytes], still: set[int], seconds: float) -> bool:
        """Whether those that are `still` open have been read to their ends within the time."""
        deadline = time.monotonic() + seconds
        while still:
            left = None if seconds == math.inf else max(0, deadline - time.monotonic())
            ready = select.select([*still], [], [], left)[0]
            if not ready:
                return False
            for descriptor in ready:
                told[descriptor] += (more := os.read(descriptor, LIMIT))
                if not more:
                    still.remove(descriptor)
                    os.close(descriptor)
        return True

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _abort(pid: int) -> None:
    """End a process, which says where it stands, and wait for that, so that no two speak at once."""
    with contextlib.suppress(ProcessLookupError):
        ending = os.pidfd_open(pid)
        os.kill(pid, signal.SIGABRT)
        select.select([ending], [], [], 10)
        os.close(ending)


def children(pid: int) -> list[int]:
    """The processes that it started, from its main thread; none when it is over."""
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []


@functools.cache
def _server() -> socket.socket:
    """The connection to the server, which is started where there is none, and ends with this process."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    command = [sys.executable, "-m", __name__, str(theirs.fileno())]
    env = {key: value for key, value in os.environ.items() if not key.startswith("COV_")}
    env |= {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    null = subprocess.DEVNULL
    server = subprocess.Popen(command, cwd=REPOSITORY, env=env, pass_fds=[theirs.fileno()], stdin=null, stdout=null)
    theirs.close()

    def end() -> None:
        ours.close()
        server.wait()

    atexit.register(end)
    return ours


# --- the server ----------------------------------------------------------------------------------------------------


def serve(control: socket.socket) -> tuple[dict[str, Any], list[int]] | None:
    """Fork for every request until nobody can ask any more; a request and its files are returned in the child."""
    running: dict[int, tuple[int, int]] = {}  # descriptor of the process -> its number, where its end is told
    with selectors.DefaultSelector() as selector:
        selector.register(control, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fileobj is not control:
                    selector.unregister(key.fileobj)
                    _tell_end(key.fd, *running.pop(key.fd))
                    continue
                request, files, _, _ = socket.recv_fds(control, LIMIT, 3)
                if not request:
                    return None
                *outputs, status = files
                if (pid := os.fork()) == 0:
                    for descriptor in [status, *running, *(end for _, end in running.values())]:
                        os.close(descriptor)
                    return json.loads(request), outputs
                for output in outputs:
                    os.close(output)
                os.write(status, NUMBER.pack(pid))
                process = os.pidfd_open(pid)
                running[process] = pid, status
                selector.register(process, selectors.EVENT_READ)


def _tell_end(process: int, pid: int, status: int) -> None:
    _, how = os.waitpid(pid, 0)
    os.close(process)
    with contextlib.suppress(BrokenPipeError):  # nobody asks any more
        os.write(status, NUMBER.pack(os.waitstatus_to_exitcode(how)))
    os.close(status)


def become(request: dict[str, Any], outputs: list[int]) -> None:
    """Take over what the request asks for, and do as `python script options` would."""
    for target, output in enumerate(outputs, 1):
        os.dup2(output, target)
        os.close(output)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    from lightning.fabric.utilities import rank_zero as fabric
    from lightning_utilities.core import rank_zero

    # found out when they were imported
    fabric.rank_zero_only.rank = rank_zero.rank_zero_only.rank = int(os.environ.get("RANK", "0"))
    from wandb.sdk.data_types._private import MEDIA_TMP

    # a folder of its own, for the end of the process removes it
    MEDIA_TMP._finalizer.detach()  # type: ignore[attr-defined]
    MEDIA_TMP.__init__("wandb-media")
    checkout = request["env"]["PYTHONPATH"]
    if checkout != str(REPOSITORY):
        turn_to(checkout)
    run(request["args"])


def turn_to(checkout: str) -> None:
    """Import from another copy of the repository, all that is ours anew."""
    for name in [name for name in sys.modules if name.partition(".")[0] in OURS]:
        del sys.modules[name]
    sys.path[:] = [checkout if entry == str(REPOSITORY) else entry for entry in sys.path]


def run(args: list[str]) -> None:
    """As `python args`."""
    if args[0] == "-m":
        sys.argv, sys.path[0] = args[1:], str(Path.cwd())
        runpy.run_module(args[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = args, str(Path(args[0]).parent)
        runpy.run_path(args[0], run_name="__main__")


def end_after(job: Callable[[], None]) -> Never:
    """Do the job and end as Python does, but for taking all modules apart, which takes a second of processor time."""
    code = 1
    try:
        job()
        code = 0
    except SystemExit as error:
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
        else:
            code = error.code or 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    threading._shutdown()  # type: ignore[attr-defined]  (waits for threads, as multiprocessing has it)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main() -> None:
    """Import what commands import, then serve at the socket whose descriptor is given."""
    for module in MODULES:
        importlib.import_module(module)
    faulthandler.enable()  # for communicate()
    gc.freeze()  # else each child's collector would copy all of these objects
    with socket.socket(fileno=int(sys.argv[1])) as control:
        asked = serve(control)
    end_after(lambda: become(*asked) if asked is not None else None)


if __name__ == "__main__":
    main()
