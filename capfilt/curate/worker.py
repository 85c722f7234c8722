"""The worker process of a download: `python -m capfilt.curate.worker PARENT_PID`.

In, a line of JSON each on standard input: the settings, then tasks. Out, a line of JSON each on standard
output: {"ready": true}; {"beat": true} every second; {"done": rows, "ok": successes} while a shard goes on;
{"result": …} or {"error": …, "errno": …} at the end of a task. What libraries print goes to standard error.

The process ends with its parent: by the kernel's parent-death signal where there is one (it reaches a stopped
process too), and by the end of its standard input everywhere.
"""

from __future__ import annotations

import ctypes
import json
import os
import queue
import signal
import sys
import threading
import time
import traceback
from typing import Any

from capfilt.settings import DownloadSettings

BEAT_SECONDS = 1.0
_REPORT_SECONDS = 0.2
_PR_SET_PDEATHSIG = 1


class Channel:
    """Messages to the parent; may be used from several threads."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._lock = threading.Lock()

    def send(self, **message: object) -> None:
        """Write one line."""
        data = json.dumps(message).encode("ascii") + b"\n"
        with self._lock:
            while data:
                data = data[os.write(self._descriptor, data) :]


def main() -> None:
    """Work on tasks until the parent closes standard input."""
    _die_with_parent(int(sys.argv[1]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt at the terminal is the parent's to handle
    channel = Channel(os.dup(1))
    os.dup2(2, 1)
    tasks: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    threading.Thread(target=_read_tasks, args=(tasks,), daemon=True).start()
    threading.Thread(target=_beat, args=(channel,), daemon=True).start()
    settings = tasks.get()
    settings["ports"] = tuple(settings["ports"])
    from capfilt.curate.shard_download import ShardDownloader

    downloader = ShardDownloader(DownloadSettings(**settings))
    channel.send(ready=True)
    while True:
        _work(downloader, tasks.get(), channel)


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
    except Exception as error:
        traceback.print_exc()
        channel.send(error=f"{type(error).__name__}: {error}", errno=getattr(error, "errno", None))
    else:
        channel.send(result=result)


def _die_with_parent(parent: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the line above
        os._exit(1)


def _read_tasks(tasks: queue.SimpleQueue[dict[str, Any]]) -> None:
    for line in sys.stdin.buffer:
        tasks.put(json.loads(line))
    os._exit(0)


def _beat(channel: Channel) -> None:
    while True:
        channel.send(beat=True)
        time.sleep(BEAT_SECONDS)


if __name__ == "__main__":
    main()
