"""The pairs of a run in a file that other tools open: CSV or JSON lines.

In: a run with a manifest. Out: a row for every kept pair, or for every pair, in the manifest's order, with its columns.
Texts are as they came; in CSV those that a spreadsheet would take for a formula are made plain (`data.spreadsheets`).
"""

from __future__ import annotations

import csv
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import pyarrow as pa

from capfilt.data.manifest import iterate_manifest
from capfilt.data.rundir import RunDir
from capfilt.data.schemas import SCHEMAS
from capfilt.data.spreadsheets import to_cell
from capfilt.data.whole_files import refuse_existing, whole_file
from capfilt.errors import UsageError
from capfilt.progress import NullProgress, Progress, counted

_BATCH_ROWS = 1000


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
    run: RunDir, output: Path, *, dropped: bool = False, overwrite: bool = False, progress: Progress | None = None
) -> ExportSummary:
    """Write the kept pairs of `run`, with `dropped` the others too, in the format that the file's ending names.

    Raises UsageError for an ending that is not known, a file that is there already, or a run without a manifest.
    """
    started, progress = time.monotonic(), progress or NullProgress()
    if output.suffix.lower() not in WRITERS:
        raise UsageError(f"{output} ends in {output.suffix or 'nothing'}; expected one of {', '.join(WRITERS)}.")
    refuse_existing(output, overwrite=overwrite)
    num_pairs = num_kept = 0
    progress.start("export", len(run.shard_names()), "shards")
    with whole_file(output) as file:
        write = WRITERS[output.suffix.lower()](file)
        for _, _, table in iterate_manifest([run], kept_only=not dropped):
            for row in _rows(table):
                write(row)
                num_pairs += 1
                num_kept += row["kept"]
            progress.advance()
    progress.finish()
    return ExportSummary(output=output, num_pairs=num_pairs, num_kept=num_kept, seconds=time.monotonic() - started)


def _rows(table: pa.Table) -> Iterator[dict[str, Any]]:
    """Rows as plain values; a float32 as the shortest number that is the same float32."""
    singles = [field.name for field in table.schema if field.type == pa.float32()]
    for batch in table.to_batches(_BATCH_ROWS):
        for row in batch.to_pylist():
            for name in singles:
                if row[name] is not None:
                    row[name] = float(str(np.float32(row[name])))
            yield row


def _csv_writer(file: TextIO) -> Callable[[dict[str, Any]], object]:
    writer = csv.writer(file, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n")
    writer.writerow(SCHEMAS["manifest"].names)
    return lambda row: writer.writerow([to_cell(value) if isinstance(value, str) else value for value in row.values()])


def _json_writer(file: TextIO) -> Callable[[dict[str, Any]], object]:
    return lambda row: file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")


WRITERS: dict[str, Callable[[TextIO], Callable[[dict[str, Any]], object]]] = {
    ".csv": _csv_writer,
    ".jsonl": _json_writer,
}
"""Ending → what begins a file and gives the function that writes a row."""
