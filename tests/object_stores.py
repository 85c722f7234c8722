"""A real S3 server on loopback, and a way between it and its clients that can be slow, or end in the middle."""

from __future__ import annotations

import contextlib
import hashlib
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

BUCKET = "capfilt-tests"


@contextmanager
def serve_s3() -> Iterator[int]:
    """moto's server in a process of its own, with a bucket; gives its port."""
    port = _free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 60
        while not _answers(port):
            assert time.monotonic() < end, "the S3 server does not come up"
            assert server.poll() is None
            time.sleep(0.05)
        yield port
    finally:
        server.kill()
        server.wait()


def environment_for(port: int, cache_dir: Path) -> dict[str, str]:
    """What a client of the server at that port needs to know."""
    return {
        "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_EC2_METADATA_DISABLED": "true",
        "CAPFILT_CACHE_DIR": str(cache_dir),
    }  # fmt: skip


def forget_clients() -> None:
    """fsspec keeps its clients; another server, or another way to it, needs new ones."""
    import fsspec

    fsspec.get_filesystem_class("s3").clear_instance_cache()


def use_server(port: int, cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make this process, and those that it starts, a client of the server."""
    for name, value in environment_for(port, cache_dir).items():
        monkeypatch.setenv(name, value)
    forget_clients()


def make_bucket() -> None:
    """Of the server that this process is a client of."""
    import fsspec

    store = fsspec.filesystem("s3")
    if not store.exists(BUCKET):
        store.mkdir(BUCKET)


def objects_of(address: str) -> dict[str, str]:
    """Name → digest of all that counts."""
    import fsspec

    store, root = fsspec.filesystem("s3"), address.removeprefix("s3://")
    names = [str(name).removeprefix(f"{root}/") for name in store.find(root)]
    counting = [name for name in names if not name.startswith((".lock", ".workers")) and name != "run.json"]
    return {name: hashlib.sha256(store.cat_file(f"{root}/{name}")).hexdigest() for name in counting}


class Way:
    """A port that leads to another one, and does to what passes what a test asks for."""

    def __init__(self, to_port: int) -> None:
        self.port, self._to_port = _free_port(), to_port
        self.seconds_per_piece = 0.0
        """How long each piece of 64 kB is held back."""
        self.cut_after: int | None = None
        """Bytes to the server after which every connection ends in the middle; None: none does."""
        self.num_cut = 0
        self.lost_answer: int | None = None
        """Of the answers from now on, the one that never arrives, and its connection ends."""
        self.replaced: dict[bytes, bytes] = {}
        """What stands for what, of one length."""
        self._listener = socket.create_server(("127.0.0.1", self.port))
        self._ended = False
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._ended = True
        self._listener.close()

    def _accept(self) -> None:
        while not self._ended:
            with contextlib.suppress(OSError):
                client, _ = self._listener.accept()
                threading.Thread(target=self._connect, args=(client,), daemon=True).start()

    def _connect(self, client: socket.socket) -> None:
        with client, socket.create_connection(("127.0.0.1", self._to_port)) as server:
            back = threading.Thread(target=self._carry, args=(server, client, False), daemon=True)
            back.start()
            self._carry(client, server, True)
            back.join()

    def _carry(self, source: socket.socket, sink: socket.socket, is_upload: bool) -> None:
        carried = 0
        with contextlib.suppress(OSError):
            while piece := source.recv(1 << 16):
                carried += len(piece)
                time.sleep(self.seconds_per_piece)
                for old, new in self.replaced.items():
                    piece = piece.replace(old, new)
                if not is_upload and self.lost_answer is not None:
                    self.lost_answer -= 1
                    if self.lost_answer < 0:
                        self.lost_answer = None
                        break
                if is_upload and self.cut_after is not None and carried > self.cut_after:
                    self.num_cut += 1
                    break
                sink.sendall(piece)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def _answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True
