"""A run on an object store: as on a disk, but for what such a store lacks: locks, renaming, files beside each other.

What stands in for them, with nothing asked of the store but that a put is seen at once and whole, and that a put can be
told to replace nothing (S3: If-None-Match, Google: ifGenerationMatch):

- A lock is a lease (`leases`). A put that may replace something is cancelled when the lease ends; one that replaces
  nothing may take longer.
- Staging is on this machine's disk, in the cache directory.
- A stage of a shard is one put of its commit record. Its quarantine, which the record names by its seal, is put before
  under a name that has that seal (RUN/quarantine/captions-00000-SEAL.parquet): no record is seen with another's.
- A shard is a tar and its record. An attempt puts its record under RUN/.pending/00000-TARDIGEST.parquet, then the tar
  under its name, which replaces nothing: this decides which of several attempts counts. Then the record gets its name.
  Whoever finds a tar without one gives it the pending record of that tar, or removes the tar where there is none.

What a put sends is checked by the store (the client sends a checksum with it); what is read, against seals and digests.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from capfilt.data.disk import new_staging, remove_dead_staging
from capfilt.data.leases import Lease, join_lock, put_new, take_lock, wait_for_end_of_all
from capfilt.data.paths import (
    MAX_FILE_BYTES,
    AnyPath,
    answered,
    exists,
    folders_in,
    names_in,
    put,
    read_bytes,
    read_pieces,
    remove,
    tag_of,
)
from capfilt.data.stores import Attempt
from capfilt.data.tar_cache import cache_dir, open_cached
from capfilt.errors import CommittedError, UsageError

if TYPE_CHECKING:
    from upath import UPath

_LOCK, _WORKERS, _PENDING, _SHARED = ".lock", ".workers", ".pending", ".shared"
_SEAL_DIGITS = 16
_held: dict[str, Lease] = {}  # of this process, so that a command may take the lock again in its parts
_joined: dict[str, Lease] = {}


class ObjectStore:
    """See `Store`."""

    def __init__(self, path: UPath) -> None:
        self.path = path

    def prepare(self) -> None:
        """Prefixes need not be made; a bucket is the user's affair."""

    def write_new(self, name: str, text: str) -> None:
        put_new(self.path / name, text.encode())

    def remove_empty(self, *, with_directory: bool) -> None:
        with self.lock():
            if names_in(self.path) <= {"run.json"} and folders_in(self.path) <= {_LOCK, _WORKERS}:
                remove(self.path / "run.json")

    @contextmanager
    def lock(self) -> Iterator[None]:
        """See `Store.lock`. What dead attempts left is settled, on this machine's disk too."""
        root = str(self.path)
        if root in _held:
            yield
            return
        lease = _held[root] = take_lock(self.path / _LOCK)
        try:
            _require_exclusive_puts(lease)
            wait_for_end_of_all(self.path / _WORKERS)
            remove_dead_staging(self._make_staging_dir())
            self._settle_all()
            _remove_all(self.path / _SHARED)
            yield
            _remove_all(self.path / _WORKERS)  # they have ended; one that has not comes back
        finally:
            del _held[root]
            lease.release()

    def join(self) -> None:
        root = str(self.path)
        if root not in _joined and root not in _held:
            _joined[root] = join_lock(self.path / _LOCK, self.path / _WORKERS)

    @contextmanager
    def new_staging(self) -> Iterator[Path]:
        with new_staging(self._make_staging_dir()) as staging:
            yield staging

    @contextmanager
    def sharing(self) -> Iterator[Callable[[Path], AnyPath]]:
        """The staged file is moved to the store."""
        folder = self.path / _SHARED

        def share(staged: Path) -> AnyPath:
            put(folder / staged.name, staged, mode="overwrite")
            staged.unlink()
            return folder / staged.name

        try:
            yield share
        finally:
            _remove_all(folder)

    def quarantine_name(self, folder: str, shard: str, seal: str) -> str:
        return f"{folder}-{shard}-{seal[:_SEAL_DIGITS]}.parquet"

    def publish(self, attempt: Attempt) -> None:
        """Put quarantine, tar and record, in that order; see above."""
        final = self.path / attempt.folder / f"{attempt.shard}.parquet"
        quarantine = self.quarantine_name(attempt.folder, attempt.shard, attempt.quarantine_seal)
        record = attempt.staged.read_bytes()
        if attempt.quarantine:
            self._put(self.path / "quarantine" / quarantine, attempt.quarantine.read_bytes())
        if attempt.tar:
            self._publish_tar(attempt, attempt.tar, record)
        elif attempt.replace:
            self._replace(final, record)
        elif not put_new(final, record, self._seconds_left()):
            raise CommittedError(f"{final} is committed already; a committed stage is not written again.")
        self._remove_other_quarantines(attempt, quarantine)

    @contextmanager
    def open_tar(self, shard: str, sha256: str, *, anew: bool = False) -> Iterator[BinaryIO]:
        """From the cache, where it is put when it is read first; what is not what was committed is not kept there."""
        tar = self.path / "shards" / f"{shard}.tar"
        with open_cached(sha256, lambda: read_pieces(tar), anew=anew) as file:
            yield file

    def _make_staging_dir(self) -> Path:
        """Of this run alone: who holds it knows that what is dead there stays dead."""
        folder = cache_dir() / "staging" / hashlib.sha256(str(self.path).encode()).hexdigest()[:16]
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _seconds_left(self) -> float | None:
        """For how long this process may publish; RunLockedError where it may not. None where it has no lease."""
        root = str(self.path)
        lease = _held.get(root) or _joined.get(root)
        return None if lease is None else lease.seconds_left()

    def _put(self, path: UPath, content: bytes) -> None:
        """Put an object that may be there, as long as nobody takes this process for dead."""
        put(path, content, mode="overwrite", seconds=self._seconds_left())

    def _replace(self, record: UPath, content: bytes) -> None:
        """Put a record in the place of the one that is there now. CommittedError where another one came first."""
        tag = tag_of(record)
        seconds = self._seconds_left()
        if tag is None:
            is_put = put_new(record, content, seconds)
        else:
            try:
                put(record, content, mode="overwrite", seconds=seconds, in_place_of=tag)
                is_put = True
            except FileExistsError:
                is_put = read_bytes(record, MAX_FILE_BYTES) == content  # the answer to a put that was repeated was lost
        if not is_put:
            raise CommittedError(f"{record} was committed by another process meanwhile. Repeat the command.")

    def _publish_tar(self, attempt: Attempt, tar: Path, content: bytes) -> None:
        pending = self.path / _PENDING / f"{attempt.shard}-{attempt.tar_sha256}.parquet"
        final = self.path / "shards" / f"{attempt.shard}.tar"
        record = final.with_suffix(".parquet")
        self._put(pending, content)
        while not self._put_tar(final, tar):
            self._settle(attempt.shard)  # gives the tar that is there its record, or removes it
            if exists(record):
                remove(pending)
                if read_bytes(record, MAX_FILE_BYTES) == content:  # it is this attempt's, or one that is equal to it
                    return
                raise CommittedError(f"{final} is committed already, by another attempt.")
        if not put_new(record, content, self._seconds_left()) and _sha256_of(final) == attempt.tar_sha256:
            self._put(record, content)  # what is there is of a tar that was removed in between
        remove(pending)

    def _put_tar(self, final: UPath, tar: Path) -> bool:
        """Put a tar where there is none: however long it takes, only one counts. False where there is one."""
        self._seconds_left()
        try:
            put(final, tar, mode="create")
        except FileExistsError:
            return False
        return True

    def _settle_all(self) -> None:
        """Finish, or take back, what attempts that are dead now had begun to publish."""
        for name in sorted(names_in(self.path / _PENDING)):
            shard = name.partition("-")[0]
            if exists(self.path / "shards" / f"{shard}.tar"):
                self._settle(shard)
            remove(self.path / _PENDING / name)

    def _settle(self, shard: str) -> None:
        """Give a tar without a record that of the attempt which put it; remove it where no attempt did."""
        tar = self.path / "shards" / f"{shard}.tar"
        record = tar.with_suffix(".parquet")
        if exists(record):
            return
        try:
            content = read_bytes(self.path / _PENDING / f"{shard}-{_sha256_of(tar)}.parquet", MAX_FILE_BYTES)
        except FileNotFoundError:
            self._seconds_left()
            if not exists(record):  # a pending record goes after its record has come
                remove(tar)
            return
        put_new(record, content, self._seconds_left())

    def _remove_other_quarantines(self, attempt: Attempt, own: str) -> None:
        """Those of earlier commits of this stage of the shard, and of attempts that came to nothing."""
        folder = self.path / "quarantine"
        beginning = f"{attempt.folder}-{attempt.shard}-"
        of_them = re.compile(rf"{re.escape(beginning)}[0-9a-f]{{{_SEAL_DIGITS}}}\.parquet")
        with answered(folder):
            found = list(folder.fs.find(folder.path, prefix=beginning))
        for name in (str(path).rpartition("/")[2] for path in found):
            if of_them.fullmatch(name) and name != own:
                remove(folder / name)


def _remove_all(folder: UPath) -> None:
    for name in names_in(folder):
        remove(folder / name)


def _require_exclusive_puts(lease: Lease) -> None:
    """UsageError for a store that takes a put which was to replace nothing for a plain one."""
    try:
        put(lease.path, b"{}", mode="create")
    except FileExistsError:
        return
    raise UsageError(
        f"{lease.path} was replaced by a put that was to replace nothing (If-None-Match): a run cannot be kept whole "
        "on this store. Take another one, or a newer version of its server, of s3fs and of aiobotocore."
    )


def _sha256_of(path: UPath) -> str:
    digest = hashlib.sha256()
    for piece in read_pieces(path):
        digest.update(piece)
    return digest.hexdigest()
