"""Small questions to every shard of a run: in turn on a disk, many at a time on an object store, which is slower."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from capfilt.data.commit import CommitRecord, read_commit_record
from capfilt.data.paths import is_local
from capfilt.data.rundir import RunDir
from capfilt.engines.local import in_order

_T = TypeVar("_T")
AT_A_TIME = 32


def of_each(run: RunDir, shards: Iterable[str], ask: Callable[[str], _T]) -> Iterator[_T]:
    """The answers, in order. The first error ends it."""
    if is_local(run.path):
        yield from map(ask, shards)
        return
    pool = ThreadPoolExecutor(AT_A_TIME, thread_name_prefix="per-shard")
    for _, answer in in_order(lambda shard: pool.submit(ask, shard), pool, 2 * AT_A_TIME, shards):
        yield answer


def records_of(run: RunDir, stage: str, shards: Iterable[str]) -> Iterator[CommitRecord]:
    """The commit records of a stage, in order."""
    yield from of_each(run, shards, lambda shard: read_commit_record(run.read_file(stage, shard)))
