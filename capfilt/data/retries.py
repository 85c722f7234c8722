"""Rows that were tried again: which attempt counts.

In: a run. Out: the keys of the attempts that were repeated later. A row that is tried again stands in a shard of that
attempt, under a key of its own; its column `retry_of` has the key that it has in the shards of the table. The last
attempt counts. Earlier ones stay as they are: shards are never rewritten.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from capfilt.data.commit import CommitRecord, read_commit_record, read_table
from capfilt.data.rundir import RunDir

RETRY_OF = "retry_of"
"""Column of the shards of an attempt: the row's key in the shards of the table."""
RETRY = "retry"
"""Entry of their commit records: the reasons whose rows were tried, with commas."""


def is_retry(record: CommitRecord) -> bool:
    """Whether a shard is one of an attempt to try rows again."""
    return RETRY in record.extra


def planned_shards(run: RunDir) -> list[str]:
    """Names of the committed shards that the table (or the imported tars) was cut into."""
    return [shard for shard in run.shard_names() if not is_retry(_record(run, shard))]


def retry_shards(run: RunDir) -> list[str]:
    """Names of the committed shards of further attempts, in the order of the attempts."""
    return [shard for shard in run.shard_names() if is_retry(_record(run, shard))]


def superseded_keys(run: RunDir) -> set[str]:
    """Keys of the attempts that were repeated later."""
    latest: dict[str, str] = {}
    superseded: set[str] = set()
    for shard in retry_shards(run):
        for key, root in attempts_of(run, shard):
            superseded.add(latest.get(root, root))
            latest[root] = key
    return superseded


def attempts_of(run: RunDir, shard: str) -> Iterator[tuple[str, str]]:
    """(key, key in the shards of the table) of each row of a further attempt's shard."""
    rows = read_table(run.stage_file("shards", shard), columns=["key", RETRY_OF])
    yield from zip(rows["key"].to_pylist(), rows[RETRY_OF].to_pylist(), strict=True)


def superseded_reasons(run: RunDir) -> Counter[str]:
    """Reason → attempts that failed for it and were repeated later."""
    superseded, reasons = superseded_keys(run), Counter[str]()
    for shard in run.shard_names() if superseded else []:
        rows = read_table(run.stage_file("shards", shard), columns=["key", "reason"])
        pairs = zip(rows["key"].to_pylist(), rows["reason"].to_pylist(), strict=True)
        reasons.update(reason for key, reason in pairs if key in superseded)
    return reasons


def _record(run: RunDir, shard: str) -> CommitRecord:
    return read_commit_record(run.stage_file("shards", shard))
