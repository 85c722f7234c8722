"""Takes shards that a user already has into a run: read strictly, checked picture by picture, packed anew.

In: tars as img2dataset or webdataset wrote them (local paths with braces and globs). Out: one committed shard
of the run for each tar, numbered in the order given; a number that was freed is given first. A sample is a
group of neighbouring members that share a key:
    KEY.jpg|jpeg|png|webp|gif|bmp|tif|tiff|avif   one image, told by its content
    KEY.txt, else `caption` or `captions[0]` of KEY.json   the web caption
    KEY.json                                      also `url` and the original size; kept whole in ours
Other members of a sample stay behind. What cannot be used goes to quarantine, a tar that is damaged midway
gives what stands before the damage. Keys are kept where they can be and are new to the run, and otherwise
made from the old key and a digest: a pure function of the tars and their order.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa

from capfilt.curation.import_samples import FoundSample, check_sample, group_members
from capfilt.curation.tar_patterns import expand_patterns
from capfilt.data.commit import (
    CommitRecord,
    commit_stage,
    file_sha256,
    read_commit_record,
    read_table,
    stage_state,
)
from capfilt.data.foreign_tars import read_foreign_tar
from capfilt.data.reasons import Quarantined, shorten_counts
from capfilt.data.rundir import RunDir
from capfilt.data.schemas import SCHEMAS, SUCCESS
from capfilt.data.tars import is_valid_key, write_tar
from capfilt.errors import CapfiltError, UsageError
from capfilt.progress import NullProgress, Progress
from capfilt.settings import DownloadSettings

STAGE_VERSION = 1
"""Raised when the same tars would give other shards."""

_MB = 1 << 20
_FAILED = "failed_to_resize"  # img2dataset's status of a picture that arrived and could not be used
_MAKER = "import"
_CHUNK_SAMPLES, _CHUNK_BYTES = 64, 64 << 20  # read ahead of the decoding; bounds the memory


@dataclass(frozen=True, kw_only=True)
class ImportSummary:
    """What an import did."""

    num_tars: int
    """Tars that were named."""
    num_new_tars: int
    """Tars that this command imported."""
    num_samples: int
    """Samples of these that are in the run's shards now."""
    failures: dict[str, int]
    """Reason code → samples of these in quarantine, the most frequent first."""
    seconds: float

    def line(self) -> str:
        """One line for people."""
        if not self.num_new_tars:
            return f"Nothing to import: {self.num_tars:,} tars are there already."
        worst = shorten_counts(self.failures)
        failed = f"; in quarantine: {worst}" if worst else ""
        return (
            f"Imported {self.num_samples:,} samples from {self.num_new_tars:,} of {self.num_tars:,} tars "
            f"in {self.seconds:.1f} s{failed}."
        )


def import_shards(
    patterns: Sequence[str],
    run: RunDir,
    settings: DownloadSettings | None = None,
    progress: Progress | None = None,
) -> ImportSummary:
    """Import every tar that `patterns` name and that is not in `run` yet; the limits are those of a download.

    Raises:
        UsageError: a pattern names nothing, a tar was changed since its import, or the run holds downloaded
            shards.
        FingerprintMismatchError: a tar was imported with other limits.
        RunLockedError: another command works on the run.
        CapfiltError: the disk refuses.
    """
    started = time.monotonic()
    paths = expand_patterns(patterns)
    with run.lock():
        work = _Import(run, settings or DownloadSettings(), progress or NullProgress())
        work.import_all(paths)
    return ImportSummary(
        num_tars=len(paths),
        num_new_tars=len(work.new_records),
        num_samples=sum(record.rows_kept for record in work.new_records),
        failures=dict(work.failures.most_common()),
        seconds=time.monotonic() - started,
    )


class _Import:
    """The loop over the tars, and what it has to remember: the keys of the run and the tars already there."""

    def __init__(self, run: RunDir, settings: DownloadSettings, progress: Progress) -> None:
        self._run, self._settings, self._progress = run, settings, progress
        self.new_records: list[CommitRecord] = []
        self.failures: Counter[str] = Counter()
        self._fields = {
            "maker": _MAKER,
            "stage_version": STAGE_VERSION,
            "max_pixels": settings.max_pixels,
            "max_aspect_ratio": settings.max_aspect_ratio,
            "max_caption_bytes": settings.max_caption_bytes,
        }
        self._by_digest: dict[str, str] = {}
        self._by_file: dict[str, str] = {}
        self._by_place: dict[str, str] = {}
        self._bytes_done = 0
        self._keys: set[bytes] = set()
        for shard in run.shard_names():
            record = read_commit_record(run.stage_file("shards", shard))
            if record.fields.get("maker") != _MAKER:
                raise UsageError(
                    f"{run.path} holds downloaded shards, and imported ones are not mixed with them. "
                    "Name another run directory."
                )
            self._remember(record)
            rows = read_table(run.stage_file("shards", shard), columns=["key"])
            self._keys.update(_key_digest(key) for key in rows["key"].to_pylist())

    def import_all(self, paths: Sequence[Path]) -> None:
        num_bytes = sum(path.stat().st_size for path in paths)
        self._progress.start("import", max(_megabytes(num_bytes), 1), "MB")
        with ThreadPoolExecutor(self._settings.num_processes, thread_name_prefix="decode") as threads:
            for path in paths:
                shard = self._shard_of(path)
                if shard is not None:
                    digest = read_commit_record(self._run.stage_file("shards", shard)).input_digest
                    stage_state(self._run, "shards", shard, self._fields, digest)  # raises for other limits
                    self._show(path.stat().st_size, already=True)
                    continue
                try:
                    self._import_tar(path, threads)
                except OSError as error:
                    raise CapfiltError(
                        f"{path} could not be imported: {error.strerror or error}. Nothing of it counts; "
                        "mend the disk or make room and repeat the command, it goes on with this tar."
                    ) from error
        self._progress.finish()

    def _shard_of(self, path: Path) -> str | None:
        """Name of the shard that this file, not changed since, became; None when it is new."""
        shard = self._by_file.get(_file_identity(path))
        if shard is not None or _place(path) not in self._by_place:
            return shard
        shard = self._by_place[_place(path)]
        if self._by_digest.get(file_sha256(path)) != shard:
            raise UsageError(
                f"{path} is no longer what was imported as shard {shard}; taking it in again would double "
                "its samples. Import into a new run directory, or rename the file to have both."
            )
        return shard

    def _import_tar(self, path: Path, threads: ThreadPoolExecutor) -> None:
        shard = self._free_name()
        identity = _file_identity(path)
        rows: list[dict[str, Any]] = []
        quarantine: list[Quarantined] = []
        with self._run.new_staging() as staging, open(path, "rb") as file:
            stream = _DigestedStream(file, self._show)
            tar = staging / "shard.tar"
            samples = self._checked(group_members(read_foreign_tar(stream)), shard, threads)
            members = write_tar(tar, _packed(samples, rows, quarantine))
            digest = stream.hexdigest()
            if digest in self._by_digest:  # the same tar under another name
                stage_state(self._run, "shards", self._by_digest[digest], self._fields, digest)
                return
            offsets = {member.name: member.offset for member in members}
            for row in rows:
                row["image_offset"] = offsets.get(f"{row['key']}.{row.get('image_ext')}")
            record = commit_stage(
                self._run, "shards", shard, pa.Table.from_pylist(rows, schema=SCHEMAS["shards"]),
                fields=self._fields, input_digest=digest, rows_in=len(rows), quarantine=quarantine, tar=tar,
                extra={"source_name": path.name, "source_place": _place(path), "source_identity": identity},
            )  # fmt: skip
        self._remember(record)
        self._keys.update(_key_digest(row["key"]) for row in rows)
        self.new_records.append(record)
        self.failures.update(row.reason for row in quarantine)

    def _free_name(self) -> str:
        """The lowest number that is free: a shard that was damaged and removed comes back under its own."""
        taken = {int(name) for name in self._run.shard_names()}
        return f"{min(set(range(len(taken) + 1)) - taken):05d}"

    def _checked(
        self, samples: Iterable[FoundSample], shard: str, threads: ThreadPoolExecutor
    ) -> Iterator[FoundSample]:
        """Give samples their keys, and check and decode them, a chunk at a time and in order."""
        in_tar: set[str] = set()
        taken: set[str] = set()
        for chunk in _chunked(samples):
            for sample in chunk:
                if sample.original_key in in_tar and sample.original_key:
                    sample.refuse("duplicate_key", "its key stood earlier in this tar")
                in_tar.add(sample.original_key)
                sample.key = self._new_key(sample.original_key, shard, taken)
                taken.add(sample.key)
            yield from threads.map(lambda sample: check_sample(sample, self._settings), chunk)

    def _show(self, num_bytes: int, already: bool = False) -> None:
        """Report bytes read, in megabytes begun."""
        before = _megabytes(self._bytes_done)
        self._bytes_done += num_bytes
        self._progress.advance(
            _megabytes(self._bytes_done) - before,
            already=already,
            samples=sum(record.rows_kept for record in self.new_records),
            quarantined=self.failures.total(),
        )

    def _new_key(self, original: str, shard: str, taken: set[str]) -> str:
        """The old key where it can be used and is new to the run; else what is left of it and a digest."""
        if is_valid_key(original) and original not in taken and _key_digest(original) not in self._keys:
            return original
        stem = re.sub(r"[^A-Za-z0-9_-]+", "_", original)[:60].strip("_") or "sample"
        for attempt in range(len(taken) + 2):
            digest = hashlib.sha256(f"{shard}/{attempt}/{original}".encode("utf-8", "surrogateescape")).hexdigest()
            key = f"{stem}~{digest[:12]}"
            if key not in taken and _key_digest(key) not in self._keys:
                return key
        raise AssertionError("more digests were tried than there are keys")

    def _remember(self, record: CommitRecord) -> None:
        self._by_digest[record.input_digest] = record.shard
        self._by_file[str(record.extra.get("source_identity"))] = record.shard
        self._by_place[str(record.extra.get("source_place"))] = record.shard


class _DigestedStream:
    """A stream that digests what is read from it and tells how much that is."""

    def __init__(self, file: BinaryIO, report: Callable[[int], None]) -> None:
        self._file = file
        self._report = report
        self._digest = hashlib.sha256()

    def read(self, size: int = -1, /) -> bytes:
        """Read up to `size` bytes."""
        piece = self._file.read(size)
        self._digest.update(piece)
        self._report(len(piece))
        return piece

    def hexdigest(self) -> str:
        """Digest of the whole file; the part that was not read is read now."""
        while self.read(_MB):
            pass
        return self._digest.hexdigest()


def _chunked(samples: Iterable[FoundSample]) -> Iterator[list[FoundSample]]:
    chunk: list[FoundSample] = []
    num_bytes = 0
    for sample in samples:
        chunk.append(sample)
        num_bytes += sum(map(len, sample.members.values()))
        if len(chunk) >= _CHUNK_SAMPLES or num_bytes >= _CHUNK_BYTES:
            yield chunk
            chunk, num_bytes = [], 0
    if chunk:
        yield chunk


def _packed(
    samples: Iterable[FoundSample], rows: list[dict[str, Any]], quarantine: list[Quarantined]
) -> Iterator[tuple[str, bytes]]:
    """Yield the members of our shard; note the row of every sample on the way."""
    for sample in samples:
        row = {"key": sample.key, "caption": sample.caption, "status": SUCCESS, **sample.values}
        if sample.reason is not None:
            row |= {"status": _FAILED, "reason": sample.reason, "error_message": sample.detail}
            quarantine.append(
                Quarantined(
                    key=sample.key,
                    reason=sample.reason,
                    detail=f"{sample.original_key}: {sample.detail}" if sample.original_key else sample.detail,
                    sha256=hashlib.sha256(sample.refused).hexdigest() if sample.refused else None,
                    num_bytes=len(sample.refused) or None,
                )
            )
        else:
            metadata = {name: row.get(name) for name in ("key", "caption", "url", *list(sample.values)[1:6])}
            metadata |= {"original_key": sample.original_key, "original": sample.metadata}
            yield f"{sample.key}.{row['image_ext']}", sample.image
            yield f"{sample.key}.txt", sample.caption.encode()
            yield f"{sample.key}.json", json.dumps(metadata, allow_nan=False).encode()
        rows.append(row)


def _megabytes(num_bytes: int) -> int:
    return -(-num_bytes // _MB)


def _key_digest(key: str) -> bytes:
    """Ten bytes stand for a key, so that the keys of a large run fit in memory."""
    return hashlib.blake2b(key.encode(), digest_size=10).digest()


def _place(path: Path) -> str:
    """Stands for the path; what the user's folders are called stays out of the shards."""
    return hashlib.sha256(str(path.resolve()).encode("utf-8", "surrogateescape")).hexdigest()


def _file_identity(path: Path) -> str:
    """Stands for a file that has not changed, so that a repeated import need not read it again."""
    stat = path.stat()
    return hashlib.sha256(f"{_place(path)}/{stat.st_size}/{stat.st_mtime_ns}".encode()).hexdigest()
