"""A server of processes that have imported everything: each is forked from it, and saves the seconds that takes.

`python -m tests.warm DESCRIPTOR` serves, `Forked` asks. All else is new to the process: its folder, environment,
arguments and streams; it ends as an interpreter does.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
from pathlib import Path
from threading import Thread
from typing import Any

MODULES = ("matplotlib.pyplot", "sklearn.datasets", "wandb", "diffusers.models.unets.unet_2d")
MODULES += tuple(f"mlem.app.{name}" for name in ("train", "sample", "coefficients", "experiment"))


class Forked:
    """`python script arguments` in the manner of `subprocess.Popen` with pipes and text, as far as tests need it."""

    def __init__(self, args: list[str], cwd: Path, env: dict[str, str], connection: socket.socket) -> None:
        self.args, self.returncode = args, None
        pipes = [os.pipe() for _ in range(3)]
        request = json.dumps({"args": args, "cwd": str(cwd), "env": env}).encode()
        socket.send_fds(connection, [len(request).to_bytes(4, "big")], [write for _, write in pipes])
        connection.sendall(request)
        for _, write in pipes:
            os.close(write)
        self._status = open(pipes[2][0], "rb", buffering=0)  # noqa: SIM115
        self._texts = ["", ""]
        self._readers = [Thread(target=self._read, args=(n, pipes[n][0]), daemon=True) for n in range(2)]
        for reader in self._readers:
            reader.start()
        self.pid = int(self._status.read(8))

    def _read(self, number: int, descriptor: int) -> None:
        with open(descriptor, errors="replace") as file:
            self._texts[number] = file.read()

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self._status], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
            self.returncode = int(self._status.read(8))
            self._status.close()
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """What it wrote, when the last process that writes there has ended."""
        for reader in self._readers:
            reader.join(timeout)
            if reader.is_alive():
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
        self.wait(timeout)
        return self._texts[0], self._texts[1]

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def __enter__(self) -> Forked:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: Any) -> None:
        if error:
            self.kill()
        self.communicate(60)


def start_server(env: dict[str, str]) -> socket.socket:
    """The connection to a new server, which ends with this process."""
    ours, theirs = socket.socketpair()
    command = [sys.executable, "-m", "tests.warm", str(theirs.fileno())]
    process = subprocess.Popen(command, cwd=Path(__file__).parents[1], env=env, pass_fds=[theirs.fileno()])
    theirs.close()

    def stop() -> None:
        ours.close()
        process.wait(60)

    atexit.register(stop)
    return ours


def serve(connection: socket.socket) -> dict[str, Any] | None:
    """Fork for each request; returns it in the new process, and None in the server when nobody asks any more."""
    while True:
        size, descriptors, *_ = socket.recv_fds(connection, 4, 3)
        if not size:
            return None
        request = json.loads(connection.recv(int.from_bytes(size, "big"), socket.MSG_WAITALL))
        out, err, status = descriptors
        new = os.fork() == 0
        if new:
            _fork_and_tell(out, err, status)
            os.dup2(out, 1)
            os.dup2(err, 2)
        for descriptor in descriptors:
            os.close(descriptor)
        if new:
            return request


def _fork_and_tell(out: int, err: int, status: int) -> None:
    """Fork; return in the new process alone. This one tells which it is and how it ended."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if pid := os.fork():
        os.close(out)
        os.close(err)
        os.write(status, f"{pid:8}".encode())
        os.write(status, f"{os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]):8}".encode())
        os._exit(0)


def main() -> None:
    for module in MODULES:
        importlib.import_module(module)
    for module in [name for name in sys.modules if name.startswith("mlem.app")]:
        del sys.modules[module]  # they are quick, and the package's names are those of modules once these are imported
    gc.freeze()  # what is here for good need not be looked at, and copied, by every collection
    connection = socket.socket(fileno=int(sys.argv[1]))
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # minders leave nothing to be waited for
    request = serve(connection)
    connection.close()
    if request is None:
        return
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    sys.argv = request["args"]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
