"""Reading committed shards, strictly: only what the commit record vouches for comes out.

In: a run and the name of a committed shard. Out: samples in order, one in memory at a time. The tars hold
KEY.jpg|png|webp, KEY.txt (web caption) and KEY.json for each sample and open in plain webdataset.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.compute as pc

from capfilt.data.commit import read_commit_record, read_table
from capfilt.data.paths import AnyPath, is_local
from capfilt.data.rundir import RunDir
from capfilt.data.samples import Sample
from capfilt.data.schemas import SUCCESS
from capfilt.data.tars import TarMember, damaged_tar, is_valid_key, read_member, write_tar
from capfilt.errors import UsageError

__all__ = ["TarMember", "is_valid_key", "read_located", "read_sample", "read_samples", "sample_rows", "write_tar"]

_COLUMNS = ["key", "url", "caption", "width", "height", "sha256", "image_offset", "image_length", "image_ext"]
_PIECE = 1 << 20


def read_samples(run: RunDir, shard: str, keys: Collection[str] | None = None) -> Iterator[Sample]:
    """Yield the samples of a committed shard in order, only those of `keys` where given.

    Every image is checked against its row before it is yielded, and the whole tar against its digest at the
    end: damage anywhere in it raises CorruptionError by then, so commit nothing before the iteration ends.
    """
    record = read_commit_record(run.stage_file("shards", shard))
    path = run.tar_path(shard)
    whole = hashlib.sha256()
    with _open_tar(run, shard, record.extra["tar_sha256"]) as file:
        size, expected_size = os.fstat(file.fileno()).st_size, record.extra["tar_bytes"]
        if size != expected_size:
            raise damaged_tar(path, size, f"the file has {size:,} bytes, {expected_size:,} were committed")
        hashed = 0
        for row in _successful_rows(run, shard).to_pylist():
            end = row["image_offset"] + row["image_length"]
            if keys is None or row["key"] in keys:
                yield _checked_sample(file, run, shard, row)
            file.seek(hashed)
            while hashed < end:
                piece = file.read(min(_PIECE, end - hashed))
                if not piece:
                    raise damaged_tar(path, hashed, "the file became shorter while it was read")
                whole.update(piece)
                hashed += len(piece)
        while piece := file.read(_PIECE):
            whole.update(piece)
    if whole.hexdigest() != record.extra["tar_sha256"]:
        raise damaged_tar(path, 0, "its digest is not the one committed")


def read_sample(run: RunDir, shard: str, key: str) -> Sample:
    """Give one sample of a shard. Raises UsageError for an unknown key, CorruptionError for damage."""
    rows = _successful_rows(run, shard)
    rows = rows.filter(pc.field("key") == key).to_pylist()
    if not rows:
        raise UsageError(f"Shard {shard} of {run.path} has no sample with the key {key!r}.")
    return read_located(run, shard, rows[0])


def sample_rows(run: RunDir, shard: str) -> list[dict[str, Any]]:
    """The rows of a shard's samples in order, for `read_located`."""
    return _successful_rows(run, shard).to_pylist()


def read_located(run: RunDir, shard: str, row: dict[str, Any]) -> Sample:
    """Give the sample of a row of `sample_rows`, read and checked now. Raises CorruptionError for damage."""
    sha256 = "" if is_local(run.path) else _tar_sha256(run.stage_file("shards", shard))
    with _open_tar(run, shard, sha256) as file:
        return _checked_sample(file, run, shard, row)


@lru_cache(maxsize=1024)
def _tar_sha256(record: AnyPath) -> str:
    """As the record says; kept, as samples are read one by one and shards never change."""
    return str(read_commit_record(record).extra["tar_sha256"])


@contextmanager
def _open_tar(run: RunDir, shard: str, sha256: str) -> Iterator[BinaryIO]:
    """CorruptionError where it is gone. On a disk the digest may be left out."""
    with ExitStack() as stack:
        try:
            file = stack.enter_context(run.open_tar(shard, sha256))
        except FileNotFoundError:
            raise damaged_tar(run.tar_path(shard), 0, "the file is gone") from None
        yield file


def _successful_rows(run: RunDir, shard: str) -> pa.Table:
    table = read_table(run.stage_file("shards", shard), columns=[*_COLUMNS, "status"])
    return table.filter(pc.field("status") == SUCCESS).select(_COLUMNS)


def _checked_sample(file: Any, run: RunDir, shard: str, row: dict[str, Any]) -> Sample:
    path = run.tar_path(shard)
    name = f"{row['key']}.{row['image_ext']}"
    image = read_member(file, path, name, row["image_offset"], row["image_length"])
    if hashlib.sha256(image).hexdigest() != row["sha256"]:
        raise damaged_tar(path, row["image_offset"], f"{name} does not have the digest committed")
    return Sample(
        key=row["key"],
        image=image,
        web_caption=row["caption"] or "",
        url=row["url"] or "",
        width=row["width"],
        height=row["height"],
        sha256=row["sha256"],
    )
