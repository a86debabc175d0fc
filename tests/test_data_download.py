"""`python -m mlem.data --download`: whole, resumed, wrong, and without a network; from a server of our own."""

from __future__ import annotations

import hashlib
import http.server
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlem.data import Shards, archives
from mlem.data.command import main
from mlem.data.datasets import cifar10
from tests import archives as make


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Our own server is asked directly."""
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "127.0.0.1")


class Server(http.server.BaseHTTPRequestHandler):
    data = b""
    ranges = True
    cut: int | None = None
    asked: list[str | None]

    def do_GET(self):
        begin = self.headers["Range"]
        self.asked.append(begin)
        start = int(begin.removeprefix("bytes=").removesuffix("-")) if begin and self.ranges else 0
        if start >= len(self.data):
            self.send_error(416)
            return
        self.send_response(206 if begin and self.ranges else 200)
        self.send_header("Content-Length", str(len(self.data) - start))
        self.end_headers()
        self.wfile.write(self.data[start : self.cut])

    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Server]]:
    """Serves the archive as the official address, with its checksum as the official one."""
    make.cifar10(path := tmp_path / "official.tar.gz")
    data = path.read_bytes()
    path.unlink()
    handler = type("Handler", (Server,), {"data": data, "asked": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        monkeypatch.setattr(cifar10, "URL", f"http://127.0.0.1:{running.server_port}/{cifar10.ARCHIVE}")
        monkeypatch.setattr(cifar10, "MD5", hashlib.md5(data).hexdigest())
        yield handler
        running.shutdown()


def test_download_then_prepare(server, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["cifar10", "--download", "--out", "data/cifar10"]) == 0
    assert (tmp_path / "data" / cifar10.ARCHIVE).read_bytes() == server.data
    assert len(Shards.open("data/cifar10")) == 50
    assert main(["cifar10", "--download", "--split", "test", "--out", "data/test"]) == 0
    assert server.asked == [None]  # the second time it is there


@pytest.mark.parametrize("ranges", [True, False])
def test_a_download_that_broke_off_goes_on(server, tmp_path, ranges):
    path = tmp_path / cifar10.ARCHIVE
    server.ranges, server.cut = ranges, 5000
    with pytest.raises(ValueError, match=r"127\.0\.0\.1.*(broke off after 5000 bytes|IncompleteRead)"):
        archives.download(cifar10.URL, path, cifar10.MD5)
    assert not path.exists()
    server.cut = None
    archives.download(cifar10.URL, path, cifar10.MD5)
    assert path.read_bytes() == server.data
    assert server.asked == [None, "bytes=5000-"]
    assert [one.name for one in tmp_path.iterdir()] == [path.name]


def test_a_download_that_was_whole_already_is_kept(server, tmp_path):
    (tmp_path / f".{cifar10.ARCHIVE}.part").write_bytes(server.data)
    archives.download(cifar10.URL, tmp_path / cifar10.ARCHIVE, cifar10.MD5)
    assert (tmp_path / cifar10.ARCHIVE).read_bytes() == server.data


def test_a_wrong_download_is_thrown_away(server, tmp_path, capsys):
    server.data = b"another file"
    assert main(["cifar10", "--download", "--source", str(tmp_path / "x.tar.gz"), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert (
        f"returned a file with MD5 {hashlib.md5(server.data).hexdigest()}, the official one has {cifar10.MD5}" in error
    )
    assert not (tmp_path / "x.tar.gz").exists()
    server.asked = []
    with pytest.raises(ValueError, match="returned a file with MD5"):
        archives.download(cifar10.URL, tmp_path / "x.tar.gz", cifar10.MD5)
    assert server.asked == [None]  # from the beginning


def test_no_network_is_one_line(tmp_path, capsys, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setattr(cifar10, "URL", f"http://127.0.0.1:{port}/{cifar10.ARCHIVE}")
    monkeypatch.chdir(tmp_path)
    assert main(["cifar10", "--download", "--out", "out"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: cannot download {cifar10.URL} ([Errno 111] Connection refused); ")
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "data" / cifar10.ARCHIVE).exists()
