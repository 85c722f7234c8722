"""The formats of a URL table, each with a look (columns and number of rows) and a way to read its rows.

In: one local, uncompressed file. Out: record batches of the wanted columns as they stand there, and for rows
that cannot be parsed the columns `TableFormat.REASON` and `TableFormat.DETAIL`. Add a format: one class and
one entry in `FORMATS`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv as pa_csv

from capfilt.curation.marked_utf8 import MarkedUtf8, unmark
from capfilt.data.bounded_parquet import BoundedParquet
from capfilt.data.texts import first_line
from capfilt.errors import UsageError

BATCH_ROWS = 8192
MIXED = pa.struct([])
"""Stands for the type of a JSON column whose values are nested or of several types."""

_BLOCK_BYTES = 16 << 20  # longest row of a CSV file


@dataclass(frozen=True, slots=True)
class Look:
    """What a file has: its columns with their types, and its rows, unreadable ones included."""

    columns: dict[str, pa.DataType]
    num_rows: int


class TableFormat:
    """What a format does."""

    REASON = "__reason"
    DETAIL = "__detail"
    has_columns = True
    """False where a row is an address and nothing else."""

    def look(self, file: Path, name: str) -> Look:
        """Columns and number of rows of `file`; errors speak of it as `name`."""
        raise NotImplementedError

    def batches(self, file: Path, texts: Sequence[str], extra: Iterable[str]) -> Iterator[pa.RecordBatch]:
        """Rows with the columns `texts` (wanted as text; a row is bad where one is not) and `extra`."""
        raise NotImplementedError


class Parquet(TableFormat):
    """Parquet files, read row group by row group."""

    def look(self, file: Path, name: str) -> Look:
        try:
            with BoundedParquet(file) as parquet:
                return Look(_once(parquet.schema), parquet.metadata.num_rows)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise _unreadable(name, "Parquet", error) from None

    def batches(self, file: Path, texts: Sequence[str], extra: Iterable[str]) -> Iterator[pa.RecordBatch]:
        try:
            with BoundedParquet(file) as parquet:
                yield from parquet.batches(BATCH_ROWS, [*texts, *extra])
        except (pa.ArrowException, OSError, ValueError) as error:
            raise _unreadable(str(file), "Parquet", error) from None


class Delimited(TableFormat):
    """CSV and TSV with a header; every value is text, line breaks inside quotes belong to the value."""

    def __init__(self, delimiter: str) -> None:
        self._delimiter = delimiter

    def look(self, file: Path, name: str) -> Look:
        try:
            columns = _once(self._open(file, None, []).schema)
            bad: list[str] = []
            counted = next(iter(columns), None)
            rows = sum(batch.num_rows for batch in self._open(file, [counted] if counted else [], bad))
        except (pa.ArrowException, OSError) as error:
            raise _unreadable(name, "CSV" if self._delimiter == "," else "TSV", error) from None
        return Look(dict.fromkeys(columns, pa.string()), rows + len(bad))

    def batches(self, file: Path, texts: Sequence[str], extra: Iterable[str]) -> Iterator[pa.RecordBatch]:
        bad: list[str] = []
        columns = [*texts, *extra]
        try:
            yield from map(unmark, self._open(file, columns, bad))
        except (pa.ArrowException, OSError) as error:
            raise _unreadable(str(file), "CSV" if self._delimiter == "," else "TSV", error) from None
        for start in range(0, len(bad), BATCH_ROWS):
            yield _bad_rows(bad[start : start + BATCH_ROWS])

    def _open(self, file: Path, columns: list[str] | None, bad: list[str]) -> pa_csv.CSVStreamingReader:
        def skip(row: pa_csv.InvalidRow) -> str:
            bad.append(f"{row.actual_columns} fields where the header has {row.expected_columns}")
            return "skip"

        convert = pa_csv.ConvertOptions()
        if columns is not None:
            # as bytes: a value that is not UTF-8 then spoils its row and not the table
            convert = pa_csv.ConvertOptions(
                include_columns=columns,
                column_types=dict.fromkeys(columns, pa.binary()),
                strings_can_be_null=False,
            )
        return pa_csv.open_csv(
            pa.PythonFile(MarkedUtf8(file), mode="r"),
            read_options=pa_csv.ReadOptions(block_size=_BLOCK_BYTES, use_threads=False),
            parse_options=pa_csv.ParseOptions(
                delimiter=self._delimiter, newlines_in_values=True, invalid_row_handler=skip
            ),
            convert_options=convert,
        )


class Json(TableFormat):
    """Objects, one a line (`lines`) or in one array; a column's type is that of its values."""

    def __init__(self, lines: bool) -> None:
        self._lines = lines

    def look(self, file: Path, name: str) -> Look:
        kinds: dict[str, set[type]] = {}
        num_rows = 0
        for row in self._objects(file, name):
            num_rows += 1
            if isinstance(row, dict):
                for column, value in row.items():
                    kinds.setdefault(column, set()).add(_kind(value))
        return Look({column: _column_type(found) for column, found in kinds.items()}, num_rows)

    def batches(self, file: Path, texts: Sequence[str], extra: Iterable[str]) -> Iterator[pa.RecordBatch]:
        types = self.look(file, str(file)).columns
        schema = pa.schema([(name, types.get(name, pa.null())) for name in extra])
        rows = self._objects(file, str(file))
        while chunk := list(islice(rows, BATCH_ROWS)):
            yield _json_batch(chunk, texts, schema)

    def _objects(self, file: Path, name: str) -> Iterator[Any]:
        """Parsed rows; a string that says what is wrong in place of one that cannot be parsed."""
        if not self._lines:
            yield from _whole_json(file, name)
            return
        with open(file, "rb") as source:
            for number, line in enumerate(source, 1):
                if line.strip(b" \t\r\n\xef\xbb\xbf"):
                    yield _parse_line(line, number)


class Txt(TableFormat):
    """One address a line, no captions; empty lines are no rows."""

    has_columns = False

    def look(self, file: Path, name: str) -> Look:
        return Look({"url": pa.string()}, sum(1 for _ in self._lines(file)))

    def batches(self, file: Path, texts: Sequence[str], extra: Iterable[str]) -> Iterator[pa.RecordBatch]:
        lines = self._lines(file)
        while chunk := list(islice(lines, BATCH_ROWS)):
            yield pa.RecordBatch.from_arrays([pa.array(chunk, pa.binary())], names=["url"])

    def _lines(self, file: Path) -> Iterator[bytes]:
        with open(file, "rb") as source:
            for line in source:
                if text := line.removeprefix(b"\xef\xbb\xbf").strip():
                    yield text


FORMATS: dict[str, TableFormat] = {
    "parquet": Parquet(),
    "csv": Delimited(","),
    "tsv": Delimited("\t"),
    "jsonl": Json(lines=True),
    "json": Json(lines=False),
    "txt": Txt(),
}
"""Ending → format, as img2dataset has them."""


# --- parts --------------------------------------------------------------------------------------------------


def _once(schema: pa.Schema) -> dict[str, pa.DataType]:
    """Name → type of the columns whose name occurs once; others cannot be told apart."""
    return {field.name: field.type for field in schema if schema.names.count(field.name) == 1}


def _unreadable(name: str, format_name: str, error: Exception) -> UsageError:
    return UsageError(
        f"{name} cannot be read as {format_name}: {first_line(error)}. Expected a table of URLs and captions."
    )


def _bad_rows(details: list[str]) -> pa.RecordBatch:
    reasons = pa.array(["bad_row"] * len(details), pa.string())
    return pa.RecordBatch.from_arrays(
        [reasons, pa.array(details, pa.string())], names=[TableFormat.REASON, TableFormat.DETAIL]
    )


def _parse_line(line: bytes, number: int) -> Any:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return f"line {number} is not JSON"
    return row if isinstance(row, dict) else f"line {number} is not a JSON object"


def _whole_json(file: Path, name: str) -> Iterator[Any]:
    try:
        content = json.loads(file.read_bytes())
    except (ValueError, RecursionError, OSError) as error:
        raise _unreadable(name, "JSON (objects one a line: name the file .jsonl)", error) from None
    if isinstance(content, dict) and content and all(isinstance(column, list) for column in content.values()):
        content = [dict(zip(content, row, strict=False)) for row in zip(*content.values(), strict=False)]
    if not isinstance(content, list):
        raise UsageError(f"{name} holds one JSON {type(content).__name__}; expected an array of objects.")
    for number, row in enumerate(content, 1):
        yield row if isinstance(row, dict) else f"row {number} is not a JSON object"


def _kind(value: Any) -> type:
    """The type of a value as a column sees it; `list` for everything that is not plain."""
    if isinstance(value, str | bool | float | None):
        return type(value)
    return int if isinstance(value, int) and -(2**63) <= value < 2**63 else list


def _column_type(found: set[type]) -> pa.DataType:
    found = found - {type(None)}
    if found == {int, float}:
        return pa.float64()
    plain = {bool: pa.bool_(), int: pa.int64(), float: pa.float64(), str: pa.string()}
    if len(found) == 1:
        return plain.get(next(iter(found)), MIXED)
    # of a text column with some odd values the odd rows are refused, not the table
    return pa.null() if not found else pa.string() if str in found else MIXED


def _json_batch(rows: list[Any], texts: Sequence[str], extra: pa.Schema) -> pa.RecordBatch:
    values: dict[str, list[str | None]] = {name: [] for name in texts}
    reasons: list[str | None] = []
    details: list[str | None] = []
    for row in rows:
        problem = row if isinstance(row, str) else None
        for name in texts:
            value = row.get(name) if isinstance(row, dict) else None
            if not isinstance(value, str | None) or (value is not None and not _is_unicode(value)):
                problem = f"the column {name} holds no text"
                value = None
            values[name].append(value)
        reasons.append("bad_row" if problem else None)
        details.append(problem)
    columns = [pa.array(column, pa.string()) for column in values.values()]
    carried = [_extra_column(rows, field) for field in extra]
    fixed = [pa.array(reasons, pa.string()), pa.array(details, pa.string())]
    names = [*texts, *extra.names, TableFormat.REASON, TableFormat.DETAIL]
    return pa.RecordBatch.from_arrays([*columns, *carried, *fixed], names=names)


def _extra_column(rows: list[Any], field: pa.Field) -> pa.Array:
    values = [row.get(field.name) if isinstance(row, dict) else None for row in rows]
    if pa.types.is_string(field.type):
        values = [value if isinstance(value, str) and _is_unicode(value) else None for value in values]
    elif pa.types.is_float64(field.type):
        values = [None if value is None else float(value) for value in values]
    return pa.array(values, field.type)


def _is_unicode(text: str) -> bool:
    """False for lone surrogates, which JSON can spell and UTF-8 cannot."""
    return text.isascii() or not any("\ud800" <= char <= "\udfff" for char in text)
