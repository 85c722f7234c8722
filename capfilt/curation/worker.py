"""The worker processes of a download: `python -m capfilt.curation.worker PARENT_PID`.

What runs first is the nursery: it imports img2dataset, which takes seconds, once; then it forks a worker
for each socket it is sent, and says which worker ended how. A worker speaks lines of JSON on its socket.
In: tasks. Out: {"pid": …} and {"ready": true}; {"beat": true} every second; {"done": rows, "ok": successes}
while a shard goes on; {"result": …} or {"error": …, "errno": …} at the end of a task.

No process outlives the one that started it: by the kernel's parent-death signal where there is one (it
reaches a stopped process too), and by the end of its socket everywhere.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import queue
import select
import signal
import socket
import sys
import threading
import time
import traceback
from typing import Any

from capfilt.data.memory import require_memory
from capfilt.settings import DownloadSettings

BEAT_SECONDS = 1.0
_REPORT_SECONDS = 0.2
_REAP_SECONDS = 0.1
_PR_SET_PDEATHSIG = 1
_MAX_REQUEST_BYTES = 1 << 16
_MAX_REQUESTS = 64


class Channel:
    """Messages to the parent; may be used from several threads."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._lock = threading.Lock()

    def send(self, **message: object) -> None:
        """Write one line."""
        with self._lock:
            self._connection.sendall(json.dumps(message).encode("ascii") + b"\n")


def main() -> None:
    """Be the nursery until the parent closes standard input, which is a socket."""
    _die_with_parent(int(sys.argv[1]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt at the terminal is the parent's to handle
    importlib.import_module("capfilt.curation.shard_download")
    control = socket.socket(fileno=os.dup(0))
    os.dup2(2, 1)
    channel = Channel(control)
    num_children = 0
    while True:
        num_children -= _report_ends(channel)
        if not select.select([control], [], [], _REAP_SECONDS if num_children else None)[0]:
            continue
        requests, descriptors, _, _ = socket.recv_fds(control, _MAX_REQUEST_BYTES, _MAX_REQUESTS)
        if not requests:
            return
        # requests are far apart; should some come together, each has its line and its socket
        for number, request in enumerate(requests.splitlines()):
            _fork_worker(json.loads(request), descriptors[number], [*descriptors[number + 1 :], control.fileno()])
            num_children += 1


def _fork_worker(request: dict[str, Any], descriptor: int, others: list[int]) -> None:
    """Start a worker with its socket `descriptor`; a socket must end with the one process it belongs to."""
    nursery = os.getpid()
    if os.fork() != 0:
        os.close(descriptor)
        return
    for other in others:
        os.close(other)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    _be_worker(socket.socket(fileno=descriptor), request, nursery)


def _report_ends(channel: Channel) -> int:
    """Say how workers ended that did. Gives their number."""
    num_ended = 0
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return num_ended
        if pid == 0:
            return num_ended
        channel.send(pid=pid, code=os.waitstatus_to_exitcode(status))
        num_ended += 1


def _be_worker(connection: socket.socket, request: dict[str, Any], nursery: int) -> None:
    """Work on tasks until the parent closes the socket; never returns."""
    try:
        _die_with_parent(nursery)
        log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        os.dup2(log, 1)
        os.dup2(log, 2)
        channel = Channel(connection)
        channel.send(pid=os.getpid())
        tasks: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        threading.Thread(target=_read_tasks, args=(connection, tasks), daemon=True).start()
        threading.Thread(target=_beat, args=(channel,), daemon=True).start()
        from capfilt.curation.shard_download import ShardDownloader

        settings = request["settings"]
        downloader = ShardDownloader(DownloadSettings(**settings | {"ports": tuple(settings["ports"])}))
        channel.send(ready=True)
        while True:
            _work(downloader, tasks.get(), channel)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(1)  # the nursery's own way out is not a worker's


def _work(downloader: Any, task: dict[str, Any], channel: Channel) -> None:
    kind = task.pop("task")
    last = 0.0

    def report(done: int, ok: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= _REPORT_SECONDS:
            last = now
            channel.send(done=done, ok=ok)

    try:
        result = downloader.split(**task) if kind == "split" else downloader.download(**task, report=report)
    except MemoryError:
        raise  # this process has come to its end; another one tries again
    except Exception as error:
        require_memory()
        traceback.print_exc()
        channel.send(error=f"{type(error).__name__}: {error}", errno=getattr(error, "errno", None))
    else:
        channel.send(result=result)


def _die_with_parent(parent: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the line above
        os._exit(1)


def _read_tasks(connection: socket.socket, tasks: queue.SimpleQueue[dict[str, Any]]) -> None:
    with connection.makefile("rb") as lines:
        for line in lines:
            tasks.put(json.loads(line))
    os._exit(0)


def _beat(channel: Channel) -> None:
    while True:
        try:
            channel.send(beat=True)
        except OSError:
            os._exit(0)
        time.sleep(BEAT_SECONDS)


if __name__ == "__main__":
    main()
