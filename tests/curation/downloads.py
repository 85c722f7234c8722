"""Downloads that tests watch, kill and stop: their processes found, their rows read."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from capfilt.curation.download import DownloadSummary, download
from capfilt.data.commit import read_table
from capfilt.data.rundir import RunDir
from capfilt.settings import DownloadSettings


def rows_of(run: RunDir) -> list[dict[str, Any]]:
    """The rows of all shards, in the table's order."""
    return [row for name in run.shard_names() for row in read_table(run.stage_file("shards", name)).to_pylist()]


def wait_for(condition: Callable[[], Any], seconds: float = 200.0) -> Any:
    """What `condition` gives as soon as it is true of something."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if result := condition():
            return result
        time.sleep(0.02)
    raise AssertionError("waited in vain")


def command_of(pid: int) -> bytes:
    """The command line of a process; empty when it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def children_of(pid: int) -> list[int]:
    """Process ids of the download's processes that `pid` started: nurseries of a command, workers of a nursery."""
    try:
        lists = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children")]
    except OSError:
        return []
    return [int(child) for child in " ".join(lists).split() if b"capfilt.curation.worker" in command_of(int(child))]


def workers_of(pid: int) -> list[int]:
    """Process ids of the download workers of `pid`: its nurseries' children."""
    return [worker for nursery in children_of(pid) for worker in children_of(nursery)]


class Download(threading.Thread):
    """A download that runs beside the test which kills its workers."""

    def __init__(self, table: Path, run: RunDir, settings: DownloadSettings) -> None:
        super().__init__(daemon=True)
        self._arguments = (str(table), run, settings)
        self.summary: DownloadSummary | None = None
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self.summary = download(*self._arguments)
        except BaseException as error:
            self.error = error
