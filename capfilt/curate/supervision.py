"""The parent's side of a worker process: starts it, hears it, tells a dead or hung one, and ends it.

In: settings and tasks. Out: the worker's messages; `failure` says in words why it cannot go on.
"""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import capfilt
from capfilt.settings import DownloadSettings

SILENCE_SECONDS = 15.0
"""A worker beats every second; one that is silent this long is stopped or stuck."""
START_SECONDS = 120.0
"""Time for the imports of a new worker on a busy machine."""
STALL_SECONDS = 120.0
"""Time without a finished row beyond what the rows' own deadlines allow."""
MAX_BLAMED_ROWS = 8
"""Rows of one shard that may be given up because their pictures kill workers."""


class Worker:
    """One worker process and its present task."""

    def __init__(self, settings: DownloadSettings, log: Path) -> None:
        self.task: Any = None
        """What it works on; None when it is idle."""
        self.ready = False
        self._log = log
        self._stall = settings.timeout_seconds * (settings.retries + 1) + 10 * settings.retries + STALL_SECONDS
        self._buffer = b""
        self._ended = False
        self._heard = self._advanced = time.monotonic()
        self._process = self._start()
        assert self._process.stdout is not None
        os.set_blocking(self._process.stdout.fileno(), False)
        self._write(asdict(settings))

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    def fileno(self) -> int:
        """Descriptor that is readable when there are messages."""
        assert self._process.stdout is not None
        return self._process.stdout.fileno()

    def give(self, task: Any, message: dict[str, Any]) -> None:
        """Hand over a task. `task` is the parent's own note of it."""
        self.task = task
        self._advanced = time.monotonic()
        self._write(message)

    def read_messages(self) -> list[dict[str, Any]]:
        """What it has sent since; never waits."""
        while True:
            try:
                data = os.read(self.fileno(), 1 << 16)
            except BlockingIOError:
                break
            if not data:
                self._ended = True
                break
            self._buffer += data
        *lines, self._buffer = self._buffer.split(b"\n")
        messages = [json.loads(line) for line in lines]
        if messages:
            self._heard = time.monotonic()
        if any("beat" not in message for message in messages):
            self._advanced = time.monotonic()
        self.ready = self.ready or any("ready" in message for message in messages)
        return [message for message in messages if "beat" not in message and "ready" not in message]

    def failure(self) -> str | None:
        """Why it cannot go on; None while all is well."""
        if self._ended:
            code = self._process.wait()
            how = f"ended by signal {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
            return f"worker process {self.pid} {how}{self._last_words()}"
        now = time.monotonic()
        silence = START_SECONDS if not self.ready else SILENCE_SECONDS
        if now - self._heard > silence:
            return f"worker process {self.pid} gave no sign of life for {silence:g} s"
        limit = self._stall if self.ready else START_SECONDS
        if (self.task is not None or not self.ready) and now - self._advanced > limit:
            return f"worker process {self.pid} made no progress for {limit:g} s"
        return None

    def forgive(self) -> None:
        """Count its silence from now on: nobody was listening."""
        self._heard = self._advanced = time.monotonic()

    def stop(self) -> None:
        """End the process now, whatever state it is in."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            try:
                pipe.close()
            except BrokenPipeError:
                pass  # what was not flushed to a dead process is of no use

    def _start(self) -> subprocess.Popen[bytes]:
        # the folder capfilt was imported from, and not the working directory, is where the worker finds it
        root = str(Path(capfilt.__file__).resolve().parents[1])
        paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        with open(self._log, "wb") as log:
            return subprocess.Popen(
                [sys.executable, "-P", "-m", "capfilt.curate.worker", str(os.getpid())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            )

    def _write(self, message: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message).encode("ascii") + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            self._ended = True

    def _last_words(self) -> str:
        lines = self._log.read_text("utf-8", "replace").strip().splitlines()
        return f" ({lines[-1].strip()[:200]})" if lines else ""


@dataclass(slots=True)
class Attempts:
    """The failed attempts at one shard, and what to do next.

    A worker may die for reasons of its own (out of memory, killed), so a shard is tried again once. A row
    during which two workers died is to blame itself: it is skipped from then on, and those deaths do not
    count against the shard.
    """

    deaths: list[int | None] = field(default_factory=list)
    """For each failed attempt the row whose picture was being decoded, where there was one."""
    problems: list[str] = field(default_factory=list)

    @property
    def blamed_rows(self) -> list[int]:
        """Rows to skip."""
        return sorted(row for row, count in Counter(self.deaths).items() if row is not None and count >= 2)

    @property
    def is_hopeless(self) -> bool:
        """Whether the shard has failed for good."""
        blamed = self.blamed_rows
        unexplained = sum(row not in blamed for row in self.deaths)
        return unexplained >= 2 or len(blamed) > MAX_BLAMED_ROWS

    def add(self, problem: str, attempt: Path) -> None:
        """Note a failed attempt whose files are in `attempt`."""
        self.problems.append(problem)
        self.deaths.append(_current_row(attempt))


def _current_row(attempt: Path) -> int | None:
    """The row whose picture the worker was decoding, from the journal it keeps."""
    try:
        data = (attempt / "current").read_bytes()
    except OSError:
        return None
    row = struct.unpack("<q", data)[0] if len(data) == 8 else -1
    return row if row >= 0 else None
