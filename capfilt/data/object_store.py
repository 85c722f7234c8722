"""A run on an object store: as on a disk, but for what such a store lacks: locks, renaming, files beside each other.

What stands in for them, with nothing asked of the store but that a put is seen at once and whole, and that a put can be
told to replace nothing (S3: If-None-Match, Google: ifGenerationMatch):

- A lock is a lease (`leases`). It keeps commands apart; what is committed does not depend on it.
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
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO
from uuid import uuid4

from capfilt.data.disk import new_staging, remove_dead_staging
from capfilt.data.leases import Lease, take_lease, wait_for_end_of_all
from capfilt.data.paths import MAX_FILE_BYTES, answered, exists, folders_in, names_in, read_bytes, remove
from capfilt.data.stores import Attempt
from capfilt.data.tar_cache import cache_dir, open_cached
from capfilt.errors import CommittedError

if TYPE_CHECKING:
    from upath import UPath

_LOCK, _WORKERS, _PENDING = ".lock", ".workers", ".pending"
_SEAL_LETTERS = 16
_PIECE_BYTES = 8 << 20
_held: dict[str, tuple[Lease, int]] = {}  # of this process, so that a command may take the lock again in its parts
_joined: dict[str, Lease] = {}


class ObjectStore:
    """See `Store`."""

    def __init__(self, path: UPath) -> None:
        self.path = path

    def prepare(self) -> None:
        """Prefixes need not be made; a bucket is the user's affair."""

    def write_new(self, name: str, text: str) -> None:
        _put_new(self.path / name, text.encode())

    def remove_empty(self, *, with_directory: bool) -> None:
        with self.lock():
            if names_in(self.path) <= {"run.json"} and folders_in(self.path) <= {_LOCK, _WORKERS}:
                remove(self.path / "run.json")

    @contextmanager
    def lock(self) -> Iterator[None]:
        """See `Store.lock`. What dead attempts left is settled, on this machine's disk too."""
        root = str(self.path)
        if root in _held:
            lease, times = _held[root]
            _held[root] = lease, times + 1
            try:
                yield
            finally:
                _held[root] = lease, times
            return
        lease = take_lease(self.path / _LOCK)
        _held[root] = lease, 1
        try:
            wait_for_end_of_all(self.path / _WORKERS)
            remove_dead_staging(self._staging_dir())
            self._settle_all()
            yield
            for name in names_in(self.path / _WORKERS):  # they have ended; one that has not comes back
                remove(self.path / _WORKERS / name)
        finally:
            del _held[root]
            lease.release(is_free=True)

    def join(self) -> None:
        root = str(self.path)
        if root not in _joined and root not in _held:
            _joined[root] = Lease(self.path / _WORKERS / f"worker-{uuid4().hex}")

    @contextmanager
    def new_staging(self) -> Iterator[Path]:
        with new_staging(self._staging_dir()) as staging:
            yield staging

    def quarantine_name(self, folder: str, shard: str, seal: str) -> str:
        return f"{folder}-{shard}-{seal[:_SEAL_LETTERS]}.parquet"

    def publish(self, attempt: Attempt) -> None:
        """Put quarantine, tar and record, in that order; see above."""
        self._require_lease()
        final = self.path / attempt.folder / f"{attempt.shard}.parquet"
        quarantine = self.quarantine_name(attempt.folder, attempt.shard, attempt.quarantine_seal)
        if attempt.quarantine:
            _put(self.path / "quarantine" / quarantine, attempt.quarantine)
            self._require_lease()
        if attempt.tar:
            self._publish_tar(attempt, attempt.tar)
        elif attempt.replace:
            _put(final, attempt.staged)
        elif not _put_new(final, attempt.staged):
            raise CommittedError(f"{final} is committed already; a committed stage is not written again.")
        self._remove_other_quarantines(attempt, quarantine)

    @contextmanager
    def open_tar(self, shard: str, sha256: str, *, anew: bool = False) -> Iterator[BinaryIO]:
        """From the cache, where it is put when it is read first; what is not what was committed is not kept there."""
        tar = self.path / "shards" / f"{shard}.tar"

        def fetch(to: Path) -> bool:
            with answered(tar):
                tar.fs.get_file(tar.path, str(to))
            with open(to, "rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest() == sha256

        with open_cached(f"{sha256}.tar", fetch, anew=anew) as file:
            yield file

    def _staging_dir(self) -> Path:
        """Of this run alone: who holds it knows that what is dead there stays dead."""
        folder = cache_dir() / "staging" / hashlib.sha256(str(self.path).encode()).hexdigest()[:16]
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _require_lease(self) -> None:
        root = str(self.path)
        if lease := _held[root][0] if root in _held else _joined.get(root):
            lease.require()

    def _publish_tar(self, attempt: Attempt, tar: Path) -> None:
        pending = self.path / _PENDING / f"{attempt.shard}-{attempt.tar_sha256}.parquet"
        _put(pending, attempt.staged)
        final = self.path / "shards" / f"{attempt.shard}.tar"
        while not _put_new(final, tar):
            self._settle(attempt.shard)  # gives the tar that is there its record, or removes it
            if exists(final.with_suffix(".parquet")):
                remove(pending)
                raise CommittedError(f"{final} is committed already, by another attempt.")
        _put_new(final.with_suffix(".parquet"), attempt.staged)
        remove(pending)

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
        pending = self.path / _PENDING / f"{shard}-{_sha256_of(tar)}.parquet"
        try:
            content = read_bytes(pending, MAX_FILE_BYTES)
        except FileNotFoundError:
            if not exists(record):  # a pending record goes after its record has come
                remove(tar)
            return
        _put_new(record, content)

    def _remove_other_quarantines(self, attempt: Attempt, own: str) -> None:
        """Those of earlier commits of this stage of the shard, and of attempts that came to nothing."""
        folder = self.path / "quarantine"
        beginning = self.quarantine_name(attempt.folder, attempt.shard, "").removesuffix(".parquet")
        with answered(folder):
            found = list(folder.fs.find(folder.path, prefix=beginning))
        for name in (str(path).rpartition("/")[2] for path in found):
            if name.startswith(beginning) and name != own:
                remove(folder / name)


def _put(path: UPath, content: Path | bytes, mode: str = "overwrite") -> None:
    with answered(path):
        if isinstance(content, bytes):
            path.fs.pipe_file(path.path, content, mode=mode)
        else:
            path.fs.put_file(str(content), path.path, mode=mode)


def _put_new(path: UPath, content: Path | bytes) -> bool:
    """Put an object that is not there yet; False where it is."""
    try:
        _put(path, content, "create")
    except FileExistsError:
        return False
    return True


def _sha256_of(path: UPath) -> str:
    digest = hashlib.sha256()
    with answered(path), path.fs.open(path.path, "rb", block_size=_PIECE_BYTES) as file:
        while piece := file.read(_PIECE_BYTES):
            digest.update(piece if isinstance(piece, bytes) else piece.encode())
    return digest.hexdigest()
