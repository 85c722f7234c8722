"""The parent's side of the worker processes: starts and hears them, tells dead and hung ones, ends them.

In: settings and tasks. Out: the workers' messages; `failure` says in words why one cannot go on.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import capfilt
from capfilt.curation.politeness import MAX_REFUSALS, PAUSE_SECONDS
from capfilt.data.texts import clean_for_terminal
from capfilt.errors import CapfiltError
from capfilt.settings import DownloadSettings

SILENCE_SECONDS = 10.0
"""A worker beats every second; one that is silent this long is stopped or stuck, unless it waits for a core."""
START_SECONDS = 300.0
"""Time for the imports of the nursery on a machine that has other things to do."""
STALL_SECONDS = 120.0
"""Time without a finished row beyond what the rows' own deadlines and the hosts' pauses allow."""
MAX_BLAMED_ROWS = 8
"""Rows of one shard that may be given up because their pictures kill workers."""

_ONE_THREAD = {"OMP_NUM_THREADS": "1", "ARROW_DEFAULT_MEMORY_POOL": "system"}
"""The nursery forks, so it must have no second thread: not of BLAS, nor of Arrow's allocator."""

_END_SECONDS = 10.0
_MAX_NURSERIES = 3


class Nursery:
    """Starts workers: a process that has imported what they need, and forks them."""

    def __init__(self, settings: DownloadSettings, log_dir: Path) -> None:
        self._settings = settings
        self._log_dir = log_dir
        self._num_workers = 0
        self.number = 0
        """How many there have been."""
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._buffer = b""
        self._codes: dict[int, int] = {}

    def start_worker(self) -> Worker:
        """Start a worker, and the nursery first where none is alive and well.

        Raises CapfiltError when nurseries do not live.
        """
        if self.is_lost(self.number):
            self._start()
        assert self._control is not None
        self._num_workers += 1
        log = self._log_dir / f"worker-{self._num_workers}.log"
        ours, theirs = socket.socketpair()
        request = json.dumps({"log": str(log), "settings": asdict(self._settings)}).encode("ascii") + b"\n"
        # where the nursery has just ended, the worker that never speaks says so
        with theirs, suppress(OSError):
            socket.send_fds(self._control, [request], [theirs.fileno()])
        return Worker(ours, self, self._settings, log)

    def exit_code_of(self, pid: int | None) -> int | None:
        """Exit code of a worker that has ended, negative for a signal; None when it is not known."""
        assert self._control is not None
        end = time.monotonic() + 2.0
        while pid is not None and pid not in self._codes and (left := end - time.monotonic()) > 0:
            data = self._control.recv(1 << 16) if select.select([self._control], [], [], left)[0] else b""
            if not data:
                break
            *lines, self._buffer = (self._buffer + data).split(b"\n")
            for message in map(json.loads, lines):
                self._codes[message["pid"]] = message["code"]
        return self._codes.pop(pid, None) if pid is not None else None

    def has_ended(self) -> bool:
        """Whether there is none, or it is about to end: its socket closes before its workers lose theirs."""
        if self._control is None:
            return True
        watch = select.poll()
        watch.register(self._control, 0)  # POLLHUP is reported unasked, whatever there still is to read
        return bool(watch.poll(0))

    def is_lost(self, number: int) -> bool:
        """Whether the nursery of that number starts no worker any more."""
        return number != self.number or self.has_ended() or self.is_stopped()

    def is_stopped(self) -> bool:
        """Whether somebody has stopped it (SIGSTOP): then it starts no worker."""
        return self._process is not None and _states(self._process.pid) == {"T"}

    def last_words(self) -> str:
        """What the nursery wrote last; where it cannot import something, it says so there."""
        return _last_line(self._log_dir / f"nursery-{self.number}.log")

    def stop(self) -> None:
        """End the nursery, and with it what is left of its workers."""
        if self._process is not None and self._control is not None:
            self._process.kill()
            self._process.wait()
            self._control.close()

    def _start(self) -> None:
        if self.number == _MAX_NURSERIES:
            raise CapfiltError(
                f"The download's processes do not live: {self.last_words()}. Mend what that names, or install capfilt "
                "anew, and repeat the command."
            )
        self.stop()
        self.number += 1
        self._buffer = b""
        # the folder capfilt was imported from, and not the working directory, is where the worker finds it
        root = str(Path(capfilt.__file__).resolve().parents[1])
        paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        self._control, theirs = socket.socketpair()
        with theirs, open(self._log_dir / f"nursery-{self.number}.log", "wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "capfilt.curation.worker", str(os.getpid())],
                stdin=theirs.fileno(),
                stdout=log,
                stderr=log,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), **_ONE_THREAD},
            )


class Worker:
    """One worker process and its present task."""

    def __init__(self, connection: socket.socket, nursery: Nursery, settings: DownloadSettings, log: Path) -> None:
        self.task: Any = None
        """What it works on; None when it is idle."""
        self.pid: int | None = None
        """Process id, once it lives."""
        self._connection = connection
        self._connection.setblocking(False)
        self._nursery, self._nursery_number = nursery, nursery.number
        self._log = log
        num_pauses = settings.retries + MAX_REFUSALS
        self._stall = settings.timeout_seconds * (settings.retries + 1) + PAUSE_SECONDS * num_pauses + STALL_SECONDS
        self._buffer = b""
        self._ended = False
        self._heard = self._advanced = time.monotonic()

    def fileno(self) -> int:
        """Descriptor that is readable when there are messages."""
        return self._connection.fileno()

    def give(self, task: Any, message: dict[str, Any]) -> None:
        """Hand over a task. `task` is the parent's own note of it."""
        self.task = task
        self._advanced = time.monotonic()
        self._connection.settimeout(SILENCE_SECONDS)
        try:
            self._connection.sendall(json.dumps(message).encode("ascii") + b"\n")
        except OSError:
            self._ended = True
        finally:
            self._connection.setblocking(False)

    def read_messages(self) -> list[dict[str, Any]]:
        """What it has sent since; never waits."""
        while not self._ended:
            try:
                data = self._connection.recv(1 << 16)
            except BlockingIOError:
                break
            except OSError:
                data = b""
            self._ended = not data
            self._buffer += data
        *lines, self._buffer = self._buffer.split(b"\n")
        messages = [json.loads(line) for line in lines]
        if messages:
            self._heard = time.monotonic()
        if any("beat" not in message for message in messages):
            self._advanced = self._heard
        for message in messages:
            self.pid = message.get("pid", self.pid)
        return [message for message in messages if not message.keys() & {"beat", "ready", "pid"}]

    def failure(self) -> str | None:
        """Why it cannot go on; None while all is well."""
        if self._ended:
            code = self._nursery.exit_code_of(self.pid)
            words = _last_line(self._log) or self._nursery.last_words()
            said = f" ({words})" if words else ""
            if code is None:
                return f"worker process {self.pid or 'before its start'} ended{said}"
            how = f"signal {signal.Signals(-code).name}" if code < 0 else f"code {code}"
            return f"worker process {self.pid} ended with {how}{said}"
        now = time.monotonic()
        silent = now - self._heard
        if self.pid is None and silent > SILENCE_SECONDS and self._nursery.is_stopped():
            return "the process that starts workers was stopped"
        if self.pid is None and silent > START_SECONDS:
            return f"no worker process started within {START_SECONDS:g} s"
        if self.pid is not None and silent > SILENCE_SECONDS and (silent > STALL_SECONDS or not _wants_cpu(self.pid)):
            return f"worker process {self.pid} gave no sign of life for {silent:.0f} s"
        if self.task is not None and now - self._advanced > self._stall:
            return f"worker process {self.pid} made no progress for {self._stall:g} s"
        return None

    def is_unborn(self) -> bool:
        """Whether it never lived because its nursery does not: its task has not been tried."""
        return self.pid is None and self._nursery.is_lost(self._nursery_number)

    def forgive(self) -> None:
        """Count its silence from now on: nobody was listening."""
        self._heard = self._advanced = time.monotonic()

    def stop(self) -> None:
        """End the process now, whatever state it is in, and wait until it is gone."""
        if self.pid is not None and not self._ended:
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            self._connection.settimeout(_END_SECONDS)
            with suppress(OSError):
                while self._connection.recv(1 << 16):
                    pass  # the socket ends when the process does
        self._connection.close()


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


def _wants_cpu(pid: int) -> bool:
    """Whether a thread of the process is ready to run: then it is silent because the machine is busy."""
    return "R" in _states(pid)


def _states(pid: int) -> set[str]:
    """States of a process's threads, as Linux names them: R ready to run, S asleep, T stopped, …"""
    states = set()
    for stat in Path(f"/proc/{pid}/task").glob("*/stat"):
        with suppress(OSError):
            states.add(stat.read_text("utf-8", "replace").rpartition(") ")[2][:1])
    return states


def _last_line(log: Path) -> str:
    try:
        lines = log.read_text("utf-8", "replace").strip().splitlines()
    except OSError:
        return ""
    return clean_for_terminal(lines[-1].strip()) if lines else ""
