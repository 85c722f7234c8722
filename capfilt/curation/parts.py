"""Cuts a table of URLs into shards: how many rows each has, and clean Parquet parts of whole shards.

In: the table and the sizes. Out: parts for img2dataset's reader, which splits each into equal shards.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from capfilt.curation.url_table import UrlTable

PART_ROWS = 50_000
"""Rows of the table that are split into shards at a time."""


@dataclass(frozen=True, slots=True)
class Part:
    """Rows of consecutive shards of one size."""

    numbers: list[int]
    """Numbers of the shards."""
    path: Path
    """Parquet file with their rows."""


def plan_shards(num_rows: int, samples_per_shard: int, num_shards: int | None) -> list[int]:
    """Rows of each shard: full ones and a rest, or `num_shards` (at most one a row) of nearly equal size."""
    if num_shards is None:
        full, rest = divmod(num_rows, samples_per_shard)
        return [samples_per_shard] * full + ([rest] if rest else [])
    num_shards = min(num_shards, num_rows)
    base, longer = divmod(num_rows, num_shards)
    return [base + 1] * longer + [base] * (num_shards - longer)


def write_parts(
    urls: UrlTable, sizes: list[int], missing: Collection[int], to_dir: Path, part_rows: int = PART_ROWS
) -> Iterator[Part]:
    """Write the table in parts of up to `part_rows`, or a shard where that is larger, each when it is asked for.

    Parts without a missing shard are passed over.
    """
    rows = _RowStream(urls.batches())
    for index, numbers in enumerate(_group_shards(sizes, part_rows)):
        num_rows = sum(sizes[number] for number in numbers)
        if set(numbers).isdisjoint(missing):
            rows.take(num_rows, None)
            continue
        path = to_dir / f"part-{index:05d}.parquet"
        with pq.ParquetWriter(path, urls.schema) as writer:
            rows.take(num_rows, writer)
        yield Part(numbers, path)


class _RowStream:
    """Batches of rows, taken in any number of rows."""

    def __init__(self, batches: Iterable[pa.RecordBatch]) -> None:
        self._batches = iter(batches)
        self._rest: pa.RecordBatch | None = None

    def take(self, num_rows: int, writer: pq.ParquetWriter | None) -> None:
        """Write the next rows, or pass over them."""
        while num_rows > 0:
            batch = self._rest if self._rest is not None else next(self._batches)
            taken = batch.slice(0, num_rows)
            self._rest = batch.slice(num_rows) if batch.num_rows > num_rows else None
            num_rows -= taken.num_rows
            if writer is not None:
                writer.write_batch(taken)


def _group_shards(sizes: list[int], part_rows: int) -> Iterator[list[int]]:
    """Numbers of consecutive shards of one size, as many as fit a part."""
    group: list[int] = []
    for number, size in enumerate(sizes):
        if group and (size != sizes[group[0]] or (len(group) + 1) * size > part_rows):
            yield group
            group = []
        group.append(number)
    if group:
        yield group
