"""Tars of object stores on this machine's disk, as many as a bound allows; what was not used longest goes first.

In: the sha256 of a tar, and its bytes where it is not there. Out: an open file. Processes of a machine share the
folder; on a local disk a file that is open stays readable after it was removed, so none has to be told.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4

from capfilt.errors import StoreError, UsageError

DIR_VARIABLE, BYTES_VARIABLE = "CAPFILT_CACHE_DIR", "CAPFILT_CACHE_BYTES"
DEFAULT_BYTES = 20 << 30
"""Some shards for each of eight processes; a shard of a thousand pictures is a tenth of a gigabyte."""

_BEGUN_SECONDS = 60.0
"""So old is a file that is being fetched before it is asked whether its process lives."""
_SHA256 = re.compile(r"[0-9a-f]{64}")


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
def open_cached(sha256: str, read: Callable[[], Iterable[bytes]], *, anew: bool = False) -> Iterator[BinaryIO]:
    """The tar of that digest; what `read` gives is kept as it where it has the digest, where it is not there or `anew`.

    Errors of `read` pass. StoreError where the folder refuses.
    """
    if not _SHA256.fullmatch(sha256):
        raise ValueError(f"{sha256!r} is no sha256")
    folder, max_bytes = cache_dir() / "tars", cache_bytes()
    file = None if anew else _open(folder / f"{sha256}.tar")
    if file is None:
        with _refusals(folder):
            folder.mkdir(parents=True, exist_ok=True)
        file = _fetch(folder, sha256, read())
        _make_room(folder, max_bytes)
    with file:
        yield file


def _fetch(folder: Path, sha256: str, pieces: Iterable[bytes]) -> BinaryIO:
    """Write a file under a name of its own, and give it the good one where it is what it should be."""
    fetched = folder / f".{sha256}-{uuid4().hex}"
    digest = hashlib.sha256()
    try:
        with _refusals(folder):
            file = open(fetched, "x+b")  # noqa: SIM115 - the caller closes it
            fcntl.flock(file, fcntl.LOCK_EX)  # tells the living from what a crash left
        try:
            for piece in pieces:
                digest.update(piece)
                with _refusals(folder):
                    file.write(piece)
            with _refusals(folder):
                file.flush()
                os.fsync(file.fileno())
                if digest.hexdigest() == sha256:
                    os.replace(fetched, folder / f"{sha256}.tar")
                fcntl.flock(file, fcntl.LOCK_UN)
                file.seek(0)
        except BaseException:
            file.close()
            raise
    finally:
        fetched.unlink(missing_ok=True)
    return file


@contextmanager
def _refusals(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StoreError(
            f"{folder}, where tars of object stores are kept, refuses: {error.strerror or error}. Make room there, "
            f"name another folder by {DIR_VARIABLE}, or lower {BYTES_VARIABLE}, and repeat the command."
        ) from error


def _open(path: Path) -> BinaryIO | None:
    with suppress(OSError):
        file = open(path, "rb")  # noqa: SIM115 - the caller closes it
        with suppress(OSError):  # it may just have been removed
            os.utime(path)
        return file
    return None


def _make_room(folder: Path, max_bytes: int) -> None:
    """Remove what was not used longest until the rest is within the bound, and what a crash has left."""
    found: list[tuple[float, int, Path]] = []
    for path in folder.iterdir():
        with suppress(OSError):  # another process removes too, or another user's it is
            if path.name.startswith("."):
                _remove_if_dead(path)
            else:
                facts = path.stat()
                found.append((facts.st_mtime, facts.st_size, path))
    num_bytes = sum(size for _, size, _ in found)
    for _, size, path in sorted(found):
        if num_bytes <= max_bytes:
            return
        with suppress(OSError):
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
