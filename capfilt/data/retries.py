"""Rows that were tried again: which attempt counts.

In: a run. Out: the rows that were not tried again, or those that were. A row that is tried again stands in a shard of
that attempt, under a key of its own; its column `retry_of` has the key that it has in the shards of the table. The last
attempt counts. Earlier ones stay as they are: shards are never rewritten.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.compute as pc

from capfilt.data.commit import CommitRecord, read_commit_record, read_table
from capfilt.data.rundir import RunDir

RETRY_OF = "retry_of"
"""Column of the shards of an attempt: the row's key in the shards of the table."""
RETRY = "retry"
"""Entry of their commit records: the reasons whose rows were tried, with commas."""

_PREFIX_LENGTH = 5
"""Letters of a key that are those of its shard's name too."""


def is_retry(record: CommitRecord) -> bool:
    """Whether a shard is one of an attempt to try rows again."""
    return RETRY in record.extra


def planned_shards(run: RunDir) -> list[str]:
    """Names of the committed shards that the table (or the imported tars) was cut into."""
    return _split(run)[0]


def retry_shards(run: RunDir) -> list[str]:
    """Names of the committed shards of further attempts, in the order of the attempts."""
    return _split(run)[1]


def stage_shards(run: RunDir) -> list[str]:
    """Names of the committed shards that the other stages are made of: of an attempt, those that brought an image."""
    planned, retried = _split(run)
    return [*planned, *(shard for shard in retried if needs_stages(_record(run, shard)))]


def expected_shards(run: RunDir) -> tuple[int, int]:
    """How many shards the run will have, as far as its records say, and how many the other stages are made of."""
    planned, retried = _split(run)
    told = int(_record(run, planned[0]).extra.get("num_shards", 0)) if planned else 0
    num_planned = max(len(planned), told)
    return num_planned + len(retried), num_planned + sum(needs_stages(_record(run, shard)) for shard in retried)


def _split(run: RunDir) -> tuple[list[str], list[str]]:
    """(planned shards, shards of further attempts). Few records are read, however many planned shards there are.

    An attempt's shards are numbered behind those of the table, which is whole by then; the table's know their number,
    an import's, which has no attempts, do not.
    """
    names = run.shard_names()
    if not names:
        return [], []
    first = _record(run, names[0])
    # where the table's shards were all removed, nothing is known of their number
    num_planned = 0 if is_retry(first) else first.extra.get("num_shards", len(names))
    behind = [name for name in names if int(name) >= num_planned]
    retried = [name for name in behind if is_retry(_record(run, name))]
    others = set(retried)
    return [name for name in names if name not in others], retried


def needs_stages(record: CommitRecord) -> bool:
    """Whether the other stages are made of a shard."""
    return record.rows_kept > 0 or not is_retry(record)


class LastAttempts:
    """Tells a run's rows from those that were tried again later."""

    def __init__(self, run: RunDir) -> None:
        latest: dict[str, str] = {}
        self._superseded: dict[str, list[str]] = defaultdict(list)
        for shard in retry_shards(run):
            for key, root in attempts_of(run, shard):
                before = latest.get(root, root)
                self._superseded[before[:_PREFIX_LENGTH]].append(before)
                latest[root] = key

    def of(self, shard: str, rows: pa.Table) -> pa.Table:
        """The rows of a shard (with their `key`) that were not tried again."""
        return rows.filter(pc.invert(self._were_repeated(shard, rows))) if self._superseded else rows

    def others(self, shard: str, rows: pa.Table) -> pa.Table:
        """The rows of a shard (with their `key`) that were tried again."""
        return rows.filter(self._were_repeated(shard, rows))

    def _were_repeated(self, shard: str, rows: pa.Table) -> pa.ChunkedArray:
        keys = self._superseded.get(shard[:_PREFIX_LENGTH], [])
        return pc.is_in(rows["key"], pa.array(keys, pa.string()))


def retried_keys(run: RunDir) -> set[str]:
    """Keys, in the shards of the table, of the rows that were tried again."""
    return {root for shard in retry_shards(run) for _, root in attempts_of(run, shard)}


def attempts_of(run: RunDir, shard: str) -> Iterator[tuple[str, str]]:
    """(key, key in the shards of the table) of each row of a further attempt's shard."""
    rows = read_table(run.stage_file("shards", shard), columns=["key", RETRY_OF])
    yield from zip(rows["key"].to_pylist(), rows[RETRY_OF].to_pylist(), strict=True)


def superseded_reasons(run: RunDir) -> Counter[str]:
    """Reason → attempts that failed for it and were repeated later."""
    reasons = Counter[str]()
    if retry_shards(run):
        last = LastAttempts(run)
        for shard in run.shard_names():
            rows = read_table(run.stage_file("shards", shard), columns=["key", "reason"])
            reasons.update(last.others(shard, rows)["reason"].to_pylist())
    return reasons


def _record(run: RunDir, shard: str) -> CommitRecord:
    return read_commit_record(run.stage_file("shards", shard))
