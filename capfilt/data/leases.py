"""Who works on a run of an object store: leases, which are kept by saying again and again that one is alive.

In: a prefix of an object store. Out: a `Lease` that is held until it is released, is lost, or its process ends.

    RUN/.lock/00000007   the command that holds the run, or held it last; the highest number counts
    RUN/.workers/ID      a process that works for it elsewhere

Number N + 1 is made by a put that replaces nothing, so of several who see N free, or dead, one gets it. Only who made
an object writes it again. A holder whose object has not changed for LEASE_SECONDS, by the clock of who watches it, is
dead; a holder that could not write for as long knows that it may be taken for dead, and publishes nothing more. A
process of the same machine (boot, process namespace) is asked for directly.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from capfilt.data.paths import answered, names_in, remove
from capfilt.errors import CapfiltError, RunLockedError

if TYPE_CHECKING:
    from upath import UPath

LEASE_SECONDS = 30.0
BEAT_SECONDS = 5.0

FREE = "free"


class Lease:
    """One object that says that this process is alive."""

    def __init__(self, path: UPath) -> None:
        """Raises FileExistsError where the object is there."""
        self._path = path
        self._facts = {"id": uuid4().hex, **_this_process()}
        self._beats, self._lost_to = 0, ""
        self._ended = threading.Event()
        self._valid_until = time.monotonic() + LEASE_SECONDS
        self._write("create")
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)
        self._thread.start()

    def require(self) -> None:
        """Raise RunLockedError where others may take this process for dead by now."""
        if self._lost_to or time.monotonic() > self._valid_until:
            by = self._lost_to or f"nobody yet, but the store was not reached for {LEASE_SECONDS:.0f} s"
            raise RunLockedError(
                f"This process no longer holds {self._path.parent.parent}: held by {by}. What it has not published "
                "by now does not count. Repeat the command; it goes on from what is committed."
            )

    def release(self, *, is_free: bool) -> None:
        """Stop; the object stays, as free, or goes."""
        self._ended.set()
        self._thread.join()
        with suppress(CapfiltError):  # then it expires
            if is_free and not self._lost_to:
                self._facts[FREE] = True
                self._write("overwrite")
            else:
                remove(self._path)

    def _keep(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            began = time.monotonic()
            with suppress(CapfiltError):  # tried again until it is too late
                if later := _later_than(self._path):
                    self._lost_to = f"a later command ({later})"
                    return
                self._write("overwrite")
                self._valid_until = began + LEASE_SECONDS

    def _write(self, mode: str) -> None:
        self._beats += 1
        content = json.dumps(self._facts | {"beats": self._beats}).encode()
        with answered(self._path):
            self._path.fs.pipe_file(self._path.path, content, mode=mode)


def take_lease(folder: UPath) -> Lease:
    """The next lease of a folder. RunLockedError where it is held; waits where the holder may be dead."""
    while True:
        name = max(names_in(folder), default="")
        if name:
            _wait_until_dead(folder / name, folder.parent)
        try:
            lease = Lease(folder / f"{int(name or 0) + 1:08d}")
        except FileExistsError:
            continue  # another was faster
        for former in names_in(folder):
            if name and former <= name:
                remove(folder / former)
        return lease


def wait_for_end_of_all(folder: UPath) -> None:
    """Return when no lease of a folder is alive. Those that are gone are removed."""
    for name in sorted(names_in(folder)):
        _wait_until_dead(folder / name, folder.parent, patient=True)
        remove(folder / name)


def _wait_until_dead(path: UPath, run: UPath, *, patient: bool = False) -> None:
    """Return when the holder of an object has ended. RunLockedError where it lives, or for the patient, lives on."""
    end = time.monotonic() + 2 * LEASE_SECONDS
    holder = _read(path)
    beats = holder and holder.get("beats")
    expires = time.monotonic() + LEASE_SECONDS
    while holder is not None and not holder.get(FREE) and not _is_dead_here(holder):
        if time.monotonic() > expires:
            return
        if holder.get("beats") != beats:
            if not patient or time.monotonic() > end:
                raise _locked(run, holder)
            beats, expires = holder.get("beats"), time.monotonic() + LEASE_SECONDS
        if _lives_here(holder) and not patient:
            raise _locked(run, holder)
        time.sleep(min(1.0, BEAT_SECONDS / 4))
        holder = _read(path)


def _locked(run: UPath, holder: dict[str, Any]) -> RunLockedError:
    return RunLockedError(
        f"{run} is in use by process {holder.get('pid')} of {holder.get('host')}; one command at a time may write to a "
        f"run. Wait for it to end, or end it there: kill {holder.get('pid')}"
    )


def _read(path: UPath) -> dict[str, Any] | None:
    try:
        with answered(path):
            found = json.loads(path.fs.cat_file(path.path))
    except FileNotFoundError:
        return None
    return found if isinstance(found, dict) else {}


def _later_than(path: UPath) -> str:
    """The highest name in the folder of a numbered lease where it is another, higher one."""
    if not path.name.isdecimal():
        return ""
    highest = max(names_in(path.parent), default="")
    return highest if highest > path.name else ""


def _this_process() -> dict[str, Any]:
    facts: dict[str, Any] = {"host": socket.gethostname(), "pid": os.getpid()}
    return facts | {"machine": _machine(), "started": _start_of(os.getpid())}


def _machine() -> str | None:
    """Equal for processes that can ask for each other by number; None where that is not known."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def _start_of(pid: object) -> str | None:
    """When a process of this machine began, in its kernel's ticks; None where none runs."""
    try:
        with open(f"/proc/{int(str(pid))}/stat", encoding="utf-8", errors="replace") as file:
            facts = file.read().rpartition(")")[2].split()
        return None if facts[0] in "ZX" else facts[19]
    except (OSError, ValueError, IndexError):
        return None


def _is_here(holder: dict[str, Any]) -> bool:
    return holder.get("machine") is not None and holder.get("machine") == _machine()


def _is_dead_here(holder: dict[str, Any]) -> bool:
    return _is_here(holder) and _start_of(holder.get("pid")) != holder.get("started")


def _lives_here(holder: dict[str, Any]) -> bool:
    return _is_here(holder) and not _is_dead_here(holder)
