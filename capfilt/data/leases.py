"""Who works on a run of an object store: leases, which are kept by saying again and again that one is alive.

In: a prefix of an object store. Out: a `Lease` that is held until it is released, is lost, or its process ends.

    RUN/.lock/00000007   the command that holds the run, or held it last; the highest number counts
    RUN/.workers/ID      a process that works for the command of that number elsewhere

Number N + 1 is made by a put that replaces nothing, so of several who see N free, or dead, one gets it. Only who made
an object writes it again. A holder whose object has not changed for LEASE_SECONDS, by the clock of who watches it, is
dead. Who could not write for as long, or sees a higher number, knows that others may be at work by now, and publishes
nothing more. A process of the same machine (boot, process namespace) is asked for directly.
"""

from __future__ import annotations

import json
import logging
import os
import re
import socket
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from capfilt.data.paths import http_status, names_in, put, read_bytes, remove
from capfilt.data.texts import clean_for_terminal
from capfilt.errors import RunLockedError, StoreError

if TYPE_CHECKING:
    from upath import UPath

LEASE_SECONDS = 30.0
BEAT_SECONDS = 5.0

FREE = "free"
_NUMBER = re.compile(r"[0-9]{8}")
_MAX_BYTES = 1 << 16
_LOG = logging.getLogger("capfilt")


class Lease:
    """One object that says that this process is alive, while no higher number of the lock is there than its own."""

    def __init__(self, path: UPath, lock: UPath, number: int) -> None:
        """Raises FileExistsError where the object is there, or a higher number."""
        self.path, self._lock, self._number = path, lock, number
        self._facts = {"id": uuid4().hex, **_this_process()}
        self._beats, self._lost_to = 0, ""
        self._valid_until = _now() + LEASE_SECONDS
        if not put_new(path, self._content()):
            raise FileExistsError(str(path))
        if _highest(lock) > number:
            remove(path)
            raise FileExistsError(str(path))
        self._beating, self._ended = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)
        self._thread.start()

    def seconds_left(self) -> float:
        """For how long nobody takes this process for dead. RunLockedError where they may by now."""
        if not self._lost_to and _now() >= self._valid_until:
            self._beat()  # nobody may have noticed
        if self._lost_to or _now() >= self._valid_until:
            by = self._lost_to or f"nobody yet, but the store was not reached for {LEASE_SECONDS:.0f} s"
            raise RunLockedError(
                f"This process no longer holds {self._lock.parent}: held by {by}. What it has not published "
                "by now does not count. Repeat the command; it goes on from what is committed."
            )
        return self._valid_until - _now()

    def release(self) -> None:
        """Stop, and say so."""
        self._ended.set()
        self._thread.join()
        with suppress(StoreError):  # then it expires
            if self._lost_to:
                remove(self.path)
            else:
                self._facts[FREE] = True
                put(self.path, self._content(), mode="overwrite", seconds=BEAT_SECONDS)

    def _keep(self) -> None:
        while not self._lost_to and not self._ended.wait(BEAT_SECONDS):
            self._beat()

    def _beat(self) -> None:
        """Say it once; the lease is longer by that where no higher number is there afterwards."""
        with self._beating, suppress(Exception):  # the next one may get through; if none does, it expires
            began = _now()
            put(self.path, self._content(), mode="overwrite", seconds=LEASE_SECONDS / 3)
            if (highest := _highest(self._lock)) > self._number:
                self._lost_to = f"a later command ({highest:08d})"
            else:
                self._valid_until = began + LEASE_SECONDS

    def _content(self) -> bytes:
        self._beats += 1
        return json.dumps(self._facts | {"beats": self._beats}).encode()


def take_lock(folder: UPath) -> Lease:
    """The next lease of a folder. RunLockedError where it is held; waits where the holder may be dead."""
    while True:
        number = _highest(folder)
        holder = folder / f"{number:08d}"
        beats = _wait_until_dead(holder)
        try:
            lease = Lease(folder / f"{number + 1:08d}", folder, number + 1)
        except FileExistsError:
            continue  # another was faster
        found = _read(holder)
        if found is not None and _beats_of(found) != beats and not found.get(FREE):  # it came back at the last moment
            lease.release()
            raise _locked(folder.parent, found)
        for name in names_in(folder):
            if _NUMBER.fullmatch(name) and int(name) <= number:
                remove(folder / name)
        return lease


def join_lock(folder: UPath, workers: UPath) -> Lease:
    """A lease of a process that works for the command that holds the lock now."""
    return Lease(workers / f"worker-{uuid4().hex}", folder, _highest(folder))


def wait_for_end_of_all(folder: UPath) -> None:
    """Return when no lease of a folder is alive, and remove them. RunLockedError where one lives on."""
    began = _now()
    last: dict[str, tuple[object, float]] = {}
    names = names_in(folder)
    waiting = set(names)
    while waiting:
        for name in sorted(waiting):
            holder = _read(folder / name)
            beats = _beats_of(holder)
            if name not in last or last[name][0] != beats:
                last[name] = beats, _now()
            if _has_ended(holder) or _now() - last[name][1] > LEASE_SECONDS:
                waiting.discard(name)
            elif _now() - began > 2 * LEASE_SECONDS:
                raise _locked(folder.parent, holder or {})
        if waiting:
            _say_that_one_waits(folder.parent, began)
            time.sleep(_pause())
    for name in names:
        remove(folder / name)


def put_new(path: UPath, content: bytes, seconds: float | None = None) -> bool:
    """Put an object that is not there yet; False where another one is. A put whose answer was lost counts."""
    while True:
        try:
            put(path, content, mode="create", seconds=seconds)
        except FileExistsError:
            with suppress(FileNotFoundError, ValueError):
                return read_bytes(path, len(content)) == content
            return False
        except StoreError as error:
            if http_status(error) != 409:  # S3's answer to two at a time: ask again
                raise
            time.sleep(_pause())
        else:
            return True


def _wait_until_dead(path: UPath) -> object:
    """Give the last beat of a holder that has ended. RunLockedError where it lives."""
    began = since = _now()
    holder = _read(path)
    beats = _beats_of(holder)
    while not _has_ended(holder):
        assert holder is not None
        if _beats_of(holder) != beats or _is_alive_here(holder):
            raise _locked(path.parent.parent, holder)
        if _now() - since > LEASE_SECONDS:
            break
        _say_that_one_waits(path.parent.parent, began)
        time.sleep(_pause())
        holder = _read(path)
    return beats


def _say_that_one_waits(run: UPath, began: float) -> None:
    seconds = _now() - began
    if seconds <= _pause():
        _LOG.warning("%s: waiting for up to %.0f s until who worked there is known to have ended.", run, LEASE_SECONDS)


def _pause() -> float:
    return min(1.0, BEAT_SECONDS / 4)


def _locked(run: UPath, holder: dict[str, Any]) -> RunLockedError:
    pid, host = holder.get("pid"), clean_for_terminal(str(holder.get("host")), 100)
    end = f", or end it there: kill {pid}" if isinstance(pid, int) else ""
    who = f"process {pid} of {host}" if isinstance(pid, int) else "a process that does not say who it is"
    return RunLockedError(
        f"{run} is in use by {who}; one command at a time may write to a run. Wait for it to end{end}"
    )


def _read(path: UPath) -> dict[str, Any] | None:
    """What a holder says; nothing where it is not understood, None where there is none."""
    try:
        found = json.loads(read_bytes(path, _MAX_BYTES))
    except FileNotFoundError:
        return None
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _beats_of(holder: dict[str, Any] | None) -> object:
    return None if holder is None else holder.get("beats")


def _highest(folder: UPath) -> int:
    return max((int(name) for name in names_in(folder) if _NUMBER.fullmatch(name)), default=0)


def _now() -> float:
    """Seconds that go on while the machine sleeps."""
    clock = getattr(time, "CLOCK_BOOTTIME", None)
    return time.monotonic() if clock is None else time.clock_gettime(clock)


def _this_process() -> dict[str, Any]:
    facts: dict[str, Any] = {"host": socket.gethostname(), "pid": os.getpid(), "machine": _machine()}
    return facts | {"started": _start_of(os.getpid()) if facts["machine"] else ""}


def _machine() -> str | None:
    """Equal for processes that can ask for each other by number; None where that is not known."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def _start_of(pid: int) -> str:
    """When a process of this machine began, in its kernel's ticks; empty where none runs.

    OSError where that cannot be said.
    """
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            facts = file.read().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        os.stat("/proc/1")  # where it shows other users' processes at all
        return ""
    return "" if facts[0] in "ZX" else facts[19]


def _has_ended(holder: dict[str, Any] | None) -> bool:
    """Whether that is known at once."""
    return holder is None or bool(holder.get(FREE)) or _lives_here(holder) is False


def _is_alive_here(holder: dict[str, Any]) -> bool:
    return _lives_here(holder) is True


def _lives_here(holder: dict[str, Any]) -> bool | None:
    """Whether a process of this machine lives; None where it is not one, or cannot be asked for."""
    pid, machine = holder.get("pid"), _machine()
    if machine is None or holder.get("machine") != machine or not isinstance(pid, int):
        return None
    try:
        return _start_of(pid) == holder.get("started")
    except (OSError, IndexError):
        return None
