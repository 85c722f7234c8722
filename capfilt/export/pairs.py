"""The pairs of a run in a file that other tools open: CSV, JSON lines or Parquet.

In: a run with a manifest. Out: a row for every kept pair, or for every pair, in the manifest's order, with its columns.
Texts are as they came; in CSV those that a spreadsheet would take for a formula are made plain (`data.spreadsheets`).
The Parquet file has `url` and `text`, so that img2dataset downloads from it.
"""

from __future__ import annotations

import csv
import io
import json
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TextIO
from uuid import uuid4

import pyarrow as pa
import pyarrow.parquet as pq

from capfilt.data.manifest import checked_shards, read_pairs
from capfilt.data.rundir import RunDir
from capfilt.data.schemas import SCHEMAS
from capfilt.data.spreadsheets import to_cell
from capfilt.data.whole_files import refuse_existing, whole_file
from capfilt.engines.base import SHARDS, Engine
from capfilt.engines.local import LocalEngine
from capfilt.errors import UsageError
from capfilt.export.images import shortest
from capfilt.progress import NullProgress, Progress, counted

_BATCH_ROWS, _PIECE = 1000, 1 << 20


@dataclass(frozen=True, kw_only=True)
class ExportSummary:
    """What was written."""

    output: Path
    num_pairs: int
    num_kept: int
    seconds: float

    def line(self) -> str:
        """One line for people."""
        dropped = "" if self.num_kept == self.num_pairs else f" ({self.num_kept:,} of them kept)"
        return f"Wrote {counted(self.num_pairs, 'pair')}{dropped} to {self.output} in {self.seconds:.1f} s."


def export_pairs(
    run: RunDir,
    output: Path,
    *,
    file_format: str | None = None,
    dropped: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
    engine: Engine | None = None,
) -> ExportSummary:
    """Write the kept pairs of `run`, with `dropped` the others too, in a format of WRITERS; unset: the file's ending.

    `engine` has the shards written out, each to a file beside `output` until its turn comes.

    Raises UsageError for a format that is not known, a file that is there already, or a run without a manifest.
    """
    started, ending = time.monotonic(), file_format or output.suffix.lower().removeprefix(".")
    if ending not in WRITERS:
        raise UsageError(f"{output} is to be {ending or 'of no format'}; expected one of {', '.join(WRITERS)}.")
    refuse_existing(output, overwrite=overwrite)
    shards, selection = checked_shards(run)
    num_pairs, num_kept, num_written, parts = 0, 0, 0, dict[int, Path]()
    with whole_file(output) as file, TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent) as waiting:
        file.write(HEADS.get(ending, ""))
        work = _ExportShards(run, selection, ending, dropped, Path(waiting), len(shards))
        place = {shard: number for number, shard in enumerate(shards)}
        for shard, written in (engine or LocalEngine()).run(work, shards, progress):
            num_pairs += written.num_pairs
            num_kept += written.num_kept
            parts[place[shard]] = written.path
            while (path := parts.pop(num_written, None)) is not None:
                with open(path, encoding="utf-8", newline="") as part:
                    shutil.copyfileobj(part, file, _PIECE)
                path.unlink()
                num_written += 1
    return ExportSummary(output=output, num_pairs=num_pairs, num_kept=num_kept, seconds=time.monotonic() - started)


def export_parquet(
    run: RunDir, output: Path, *, dropped: bool = False, overwrite: bool = False, progress: Progress | None = None
) -> ExportSummary:
    """The same as one Parquet file, with the manifest's types; errors as `export_pairs`."""
    started, progress = time.monotonic(), progress or NullProgress()
    refuse_existing(output, overwrite=overwrite)
    shards, selection = checked_shards(run)
    progress.start("export", len(shards), SHARDS)
    num_pairs = num_kept = 0
    with whole_file(output) as file, pq.ParquetWriter(
        file.buffer, SCHEMAS["manifest"], compression="zstd", write_page_checksum=True
    ) as writer:  # fmt: skip
        for shard in shards:
            table = read_pairs(run, shard, selection, kept_only=not dropped)
            writer.write_table(table)
            num_pairs += table.num_rows
            num_kept += sum(table["kept"].to_pylist())
            progress.advance(1)
    progress.finish()
    return ExportSummary(output=output, num_pairs=num_pairs, num_kept=num_kept, seconds=time.monotonic() - started)


@dataclass(frozen=True, slots=True)
class _Written:
    """A shard's rows as they are to stand in the file."""

    path: Path
    num_pairs: int
    num_kept: int


@dataclass(frozen=True)
class _ExportShards:
    """The work of `export_pairs`."""

    run: RunDir
    selection: str
    ending: str
    dropped: bool
    folder: Path
    total: int
    unit = SHARDS
    is_light, has_models = True, False
    title = "export"

    def open(self) -> _ExportShards:
        """Nothing is loaded."""
        return self

    def __call__(self, shard: str, _progress: Progress) -> _Written:
        num_pairs = num_kept = 0
        path = self.folder / f"{shard}-{uuid4().hex}"  # a worker that is taken for dead may still write its own
        with open(path, "x", encoding="utf-8", newline="") as file:
            write = WRITERS[self.ending](file)
            for row in _rows(read_pairs(self.run, shard, self.selection, kept_only=not self.dropped)):
                write(row)
                num_pairs += 1
                num_kept += row["kept"]
        return _Written(path, num_pairs, num_kept)


def _rows(table: pa.Table) -> Iterator[dict[str, Any]]:
    """Rows as plain values; a float32 as the shortest number that is the same float32."""
    singles = [field.name for field in table.schema if field.type == pa.float32()]
    for batch in table.to_batches(_BATCH_ROWS):
        for row in batch.to_pylist():
            for name in singles:
                row[name] = shortest(row[name])
            yield row


def _csv_rows(file: TextIO) -> Any:
    return csv.writer(file, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n")


def _csv_head() -> str:
    file = io.StringIO(newline="")
    _csv_rows(file).writerow(SCHEMAS["manifest"].names)
    return file.getvalue()


def _csv_writer(file: TextIO) -> Callable[[dict[str, Any]], object]:
    writer = _csv_rows(file)
    return lambda row: writer.writerow([to_cell(value) if isinstance(value, str) else value for value in row.values()])


def _json_writer(file: TextIO) -> Callable[[dict[str, Any]], object]:
    return lambda row: file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")


WRITERS: dict[str, Callable[[TextIO], Callable[[dict[str, Any]], object]]] = {
    "csv": _csv_writer,
    "jsonl": _json_writer,
}
"""Format → what gives the function that writes a row."""

HEADS = {"csv": _csv_head()}
"""Format → what stands before the rows, if anything."""
