"""A run on a file system: locks that end with their process, staging beside the run, files renamed into place.

A crash at any point leaves a stage of a shard committed or not; directories are synced, so that a power cut does too.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4

from capfilt.data.paths import AnyPath
from capfilt.data.schemas import SCHEMAS
from capfilt.data.stores import Attempt
from capfilt.data.whole_files import whole_file
from capfilt.errors import CommittedError, RunLockedError, UsageError

_LOCKS = (".lock", ".workers", ".publish")
_held_locks: dict[Path, int] = {}  # of this process, so that a command may take the lock again in its parts
_joined: dict[Path, int] = {}  # descriptors of this process by which it is known as a worker

_WORKERS_END_SECONDS = 60.0
"""How long the workers of a dead command are waited for."""


class Disk:
    """See `Store`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def prepare(self) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise UsageError(f"{self.path} is a file; a run is a directory. Name another path.")
        self.path.mkdir(parents=True, exist_ok=True)

    def write_new(self, name: str, text: str) -> None:
        file_path = self.path / name
        if not file_path.exists():
            if not file_path.parent.is_dir():
                file_path.parent.mkdir(exist_ok=True)
            with whole_file(file_path) as file:
                file.write(text)
            sync_directory(file_path.parent)

    def remove_empty(self, *, with_directory: bool) -> None:
        with self.lock():
            if not {entry.name for entry in self.path.iterdir()} <= {"run.json", *_LOCKS, ".staging"}:
                return
            shutil.rmtree(self.path / ".staging", ignore_errors=True)
            for name in ("run.json", *_LOCKS):
                (self.path / name).unlink(missing_ok=True)
            if with_directory:
                self.path.rmdir()

    @contextmanager
    def lock(self) -> Iterator[None]:
        """See `Store.lock`. Staging left by dead attempts is removed."""
        root = self.path.resolve()
        if _held_locks.get(root, 0):
            _held_locks[root] += 1
            try:
                yield
            finally:
                _held_locks[root] -= 1
            return
        try:
            descriptor = os.open(root / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise UsageError(
                f"{self.path} cannot be written to ({error.strerror}); expected a run of your own. Mend its "
                f"permissions: `chmod -R u+rwX {self.path}`."
            ) from None
        try:
            _take_lock(descriptor, self.path)
            _held_locks[root] = 1
            try:
                _wait_for_workers(root, self.path)
                remove_dead_staging(root / ".staging")
                yield
            finally:
                del _held_locks[root]
                os.ftruncate(descriptor, 0)
        finally:
            os.close(descriptor)

    def join(self) -> None:
        """Be a worker of the command that holds the run, until this process ends; where it is this one, nothing.

        Should that command die first, the next one waits until its workers are gone.
        """
        root = self.path.resolve()
        if root not in _joined and not _held_locks.get(root, 0):
            _joined[root] = os.open(root / ".workers", os.O_RDWR | os.O_CREAT, 0o666)
            fcntl.flock(_joined[root], fcntl.LOCK_SH)

    @contextmanager
    def new_staging(self) -> Iterator[Path]:
        """On the run's own file system; see `new_staging`."""
        with new_staging(self.path / ".staging") as staging:
            yield staging

    @contextmanager
    def sharing(self) -> Iterator[Callable[[Path], AnyPath]]:
        """The run's file system is theirs too."""
        yield lambda staged: staged

    def quarantine_name(self, folder: str, shard: str, seal: str) -> str:
        return f"{folder}-{shard}.parquet"

    def publish(self, attempt: Attempt) -> None:
        """Move the files in: tar and quarantine first, the commit record last, each directory synced.

        An earlier commit that the new tar or quarantine would contradict is taken back first, so that no moment
        shows one attempt's record with another's files.
        """
        final = self.path / attempt.folder / f"{attempt.shard}.parquet"
        quarantine = self.path / "quarantine" / self.quarantine_name(attempt.folder, attempt.shard, "")
        with self._publishing() if attempt.tar else nullcontext():
            if final.exists() and not attempt.replace:
                raise CommittedError(f"{final} is committed already; a committed stage is not written again.")
            _make_directory(final.parent)
            if final.exists() and (attempt.tar or attempt.quarantine or quarantine.exists()):
                os.unlink(final)
                sync_directory(final.parent)
            if attempt.tar:
                self._keep_tar_in_use(attempt, final.with_suffix(".tar"))
                _move(attempt.tar, final.with_suffix(".tar"))
            if attempt.quarantine:
                _make_directory(quarantine.parent)
                _move(attempt.quarantine, quarantine)
            elif quarantine.exists():  # left by an attempt that did not get as far as its record
                os.unlink(quarantine)
                sync_directory(quarantine.parent)
            _move(attempt.staged, final)

    @contextmanager
    def open_tar(self, shard: str, sha256: str, *, anew: bool = False) -> Iterator[BinaryIO]:
        with open(self.path / "shards" / f"{shard}.tar", "rb") as file:
            yield file

    def _keep_tar_in_use(self, attempt: Attempt, tar: Path) -> None:
        """Where a shard's record was lost and stages were made of its tar, other bytes do not replace that tar.

        What is kept already stays: the next attempt would put another one's tar in its place.
        """
        made = any(
            (folder / f"{attempt.shard}.parquet").exists()
            for folder in self.path.iterdir() if folder.name.partition("@")[0] in SCHEMAS.keys() - {"shards"}
        )  # fmt: skip
        kept = tar.with_suffix(".tar.old")
        if made and tar.exists() and not kept.exists():
            with tar.open("rb") as file:
                is_same = hashlib.file_digest(file, "sha256").hexdigest() == attempt.tar_sha256
            if not is_same:
                _move(tar, kept)

    @contextmanager
    def _publishing(self) -> Iterator[None]:
        """Hold what one process holds at a time, on any machine: one that is taken for dead may still be at work."""
        descriptor = os.open(self.path / ".publish", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


@contextmanager
def new_staging(root: Path) -> Iterator[Path]:
    """Give a private, empty directory in `root`; it is removed at the end.

    It carries a lock that ends with this process, so that `remove_dead_staging` knows it as dead.
    """
    attempt = root / f"{os.getpid()}-{uuid4().hex[:12]}"
    attempt.mkdir(parents=True)
    descriptor = os.open(attempt / ".alive", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield attempt
    finally:
        shutil.rmtree(attempt, ignore_errors=True)
        os.close(descriptor)


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable: a rename is on disk only after this."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _make_directory(path: Path) -> None:
    if not path.is_dir():
        path.mkdir(exist_ok=True)
        sync_directory(path.parent)


def _move(staged: Path, final: Path) -> None:
    os.rename(staged, final)
    sync_directory(final.parent)


def _take_lock(descriptor: int, run: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip() or "unknown"
        raise RunLockedError(
            f"{run} is in use by process {holder}; one command at a time may write to a run. "
            f"Wait for it to end, or end it: kill {holder}"
        ) from None
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{os.getpid()}\n".encode("ascii"), 0)


def _wait_for_workers(root: Path, run: Path) -> None:
    """Return when no process is left that a dead command had set to work. Raises RunLockedError where they stay."""
    try:
        descriptor = os.open(root / ".workers", os.O_RDWR)
    except FileNotFoundError:
        return
    end = time.monotonic() + _WORKERS_END_SECONDS
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() > end:
                    raise RunLockedError(
                        f"Workers of a command that has ended are still at {run}. End them (`ray stop`, or their "
                        "machines), and repeat the command."
                    ) from None
                time.sleep(0.05)
    finally:
        os.close(descriptor)


def remove_dead_staging(staging: Path) -> None:
    """Remove the attempts whose process is gone: their lock can be taken."""
    for attempt in staging.glob("*"):
        try:
            descriptor = os.open(attempt / ".alive", os.O_RDWR)
        except OSError:  # died before it could lock, or no attempt at all
            shutil.rmtree(attempt, ignore_errors=True)
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(attempt, ignore_errors=True)
        except BlockingIOError:
            pass
        finally:
            os.close(descriptor)
