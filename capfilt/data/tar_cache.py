"""Tars of object stores on this machine's disk, as many as a bound allows; what was not used longest goes first.

In: the digest of a tar and how it is fetched. Out: an open file. Processes of a machine share the folder; a file that
is open stays readable after it was removed, so none has to be told.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4

from capfilt.errors import UsageError

DIR_VARIABLE, BYTES_VARIABLE = "CAPFILT_CACHE_DIR", "CAPFILT_CACHE_BYTES"
DEFAULT_BYTES = 20 << 30
"""Some shards for each of eight processes; a shard of a thousand pictures is a tenth of a gigabyte."""

_BEGUN_SECONDS = 60.0
"""So old is a file that is being fetched before it is asked whether its process lives."""


def cache_dir() -> Path:
    """The folder for what is kept of object stores: $CAPFILT_CACHE_DIR, else capfilt in the user's cache."""
    if named := os.environ.get(DIR_VARIABLE):
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "capfilt"


def cache_bytes() -> int:
    """The bound: $CAPFILT_CACHE_BYTES, else DEFAULT_BYTES. UsageError for what is no number."""
    text = os.environ.get(BYTES_VARIABLE, str(DEFAULT_BYTES))
    if not text.isdecimal():
        raise UsageError(f"{BYTES_VARIABLE} is {text!r}; expected a number of bytes.")
    return int(text)


@contextmanager
def open_cached(name: str, fetch: Callable[[Path], bool], *, anew: bool = False) -> Iterator[BinaryIO]:
    """The file of that name, which `fetch` writes where it is not there, or `anew`; it says whether it is to be kept.

    Errors of `fetch` pass.
    """
    folder = cache_dir() / "tars"
    path = folder / name
    file = None if anew else _open(path)
    if file is None:
        max_bytes = cache_bytes()
        folder.mkdir(parents=True, exist_ok=True)
        fetched = folder / f".{name}-{uuid4().hex}"
        try:
            with open(fetched, "xb") as held:
                fcntl.flock(held, fcntl.LOCK_EX)  # tells the living from what a crash left
                is_good = fetch(fetched)
                file = open(fetched, "rb")  # noqa: SIM115 - closed below
                if is_good:
                    os.replace(fetched, path)
        finally:
            fetched.unlink(missing_ok=True)
        _make_room(folder, max_bytes)
    with file:
        yield file


def _open(path: Path) -> BinaryIO | None:
    try:
        file = open(path, "rb")  # noqa: SIM115 - the caller's
    except FileNotFoundError:
        return None
    with suppress(OSError):  # it may just have been removed
        os.utime(path)
    return file


def _make_room(folder: Path, max_bytes: int) -> None:
    """Remove what was not used longest until the rest is within the bound, and what a crash has left."""
    found: list[tuple[float, int, Path]] = []
    for path in folder.iterdir():
        with suppress(FileNotFoundError):  # another process removes too
            if path.name.startswith("."):
                _remove_if_dead(path)
            else:
                facts = path.stat()
                found.append((facts.st_mtime, facts.st_size, path))
    num_bytes = sum(size for _, size, _ in found)
    for _, size, path in sorted(found):
        if num_bytes <= max_bytes:
            return
        path.unlink(missing_ok=True)
        num_bytes -= size


def _remove_if_dead(path: Path) -> None:
    if time.time() - path.stat().st_mtime < _BEGUN_SECONDS:
        return
    with open(path, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        path.unlink(missing_ok=True)
