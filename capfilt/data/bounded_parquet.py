"""Parquet read in pieces whose size in memory is known before they are made.

In: a file. Out: its rows. A file of a few kilobytes may stand for a terabyte: a billion rows that all point at one
long text of a dictionary. Texts are therefore read as their dictionary and their places in it, which are as small as
the file says, and only then spelled out, few rows at a time.

What the footer says of a column's chunks is not asked for: pyarrow's Python ends the process where it is damaged there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

BATCH_BYTES = 64 << 20
"""Texts of a batch that is spelled out, but for a row that is larger by itself."""
MAX_ROW_BYTES = 256 << 20


class OversizedError(ValueError):
    """A part of a file is larger than is read."""


class BoundedParquet:
    """An open Parquet file; use it in a `with` statement.

    Errors of opening and reading are pyarrow's; an OSError without a number, which is how it finds some damage, is made
    a ValueError.
    """

    def __init__(self, source: Path | pa.NativeFile, **options: Any) -> None:
        """`options` are those of `pq.ParquetFile`."""
        with _damage_as_value_error():
            with pq.ParquetFile(source, **options) as plain:
                self.schema, self.metadata = plain.schema_arrow, plain.metadata
            texts = [field.name for field in self.schema if _is_text(field.type)]
            self._file = pq.ParquetFile(source, read_dictionary=texts, metadata=self.metadata, **options)

    def __enter__(self) -> BoundedParquet:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def batches(self, batch_rows: int, columns: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:
        """All rows, of the file's own types. OversizedError for a row that is larger than is read, and for a nested
        column, whose size is not known before it is made.
        """
        names = self.schema.names if columns is None else list(columns)
        schema = pa.schema([self.schema.field(name) for name in names]).remove_metadata()
        _refuse_nested(schema)
        batches = self._file.iter_batches(batch_rows, columns=names, use_threads=False)
        while True:
            with _damage_as_value_error():
                if (batch := next(batches, None)) is None:
                    return
            for piece in _pieces(batch):
                yield _spelled_out(piece, schema)

    def read(self, max_bytes: int, columns: Sequence[str] | None = None) -> pa.Table:
        """All rows as one table. OversizedError where they take more than `max_bytes`."""
        names = self.schema.names if columns is None else list(columns)
        batches: list[pa.RecordBatch] = []
        left = max_bytes
        for batch in self.batches(1 << 16, names):
            left -= batch.nbytes
            if left < 0:
                raise OversizedError(f"its rows take more than {max_bytes:,} bytes")
            batches.append(batch)
        schema = pa.schema([self.schema.field(name) for name in names]).remove_metadata()
        return pa.Table.from_batches(batches, schema)


def _refuse_nested(schema: pa.Schema) -> None:
    if nested := [field.name for field in schema if pa.types.is_nested(field.type)]:
        raise OversizedError(f"the column {nested[0]} is nested; plain values are expected")


@contextmanager
def _damage_as_value_error() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise ValueError(str(error)) from None
        raise


def _is_text(kind: pa.DataType) -> bool:
    types = pa.types
    tests = (types.is_string, types.is_large_string, types.is_string_view)
    return any(test(kind) for test in (*tests, types.is_binary, types.is_large_binary, types.is_binary_view))


def _pieces(batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
    """A batch cut so that the texts of each piece are no more than BATCH_BYTES when they are spelled out."""
    sizes = np.zeros(batch.num_rows, np.int64)
    for column in batch.columns:
        if pa.types.is_dictionary(column.type) and _is_text(column.type.value_type) and len(column.dictionary):
            lengths = pc.fill_null(pc.binary_length(column.dictionary), 0).to_numpy(zero_copy_only=False)
            places = pc.fill_null(column.indices, -1).to_numpy(zero_copy_only=False)
            if batch.num_rows and not -1 <= places.min() <= places.max() < len(lengths):
                raise ValueError("a column points at texts that its dictionary does not have")
            sizes += np.where(places < 0, 0, lengths[places])
    if batch.num_rows and (largest := int(sizes.max())) > MAX_ROW_BYTES:
        raise OversizedError(f"a row has {largest:,} bytes of text, at most {MAX_ROW_BYTES:,}")
    start = 0
    while start < batch.num_rows:
        within = int(np.searchsorted(sizes[start:].cumsum(), BATCH_BYTES, side="right"))
        yield batch.slice(start, max(1, within))
        start += max(1, within)


def _spelled_out(batch: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    columns: list[pa.Array] = []
    for field in schema:
        column = batch.column(field.name)
        was_read_as_dictionary = pa.types.is_dictionary(column.type) and not pa.types.is_dictionary(field.type)
        columns.append(column.dictionary_decode().cast(field.type) if was_read_as_dictionary else column)
    return pa.RecordBatch.from_arrays(columns, schema=schema)
