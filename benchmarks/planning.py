"""What it takes to plan work on a million shards: seconds and memory before the first shard is handed out.

    python -m benchmarks.planning [--shards 1000000] [--folder build/bench-planning]

In: nothing. The run is made once and stays for the next time: every tenth shard has a commit record of 10,000 images,
four rows and no tar; the others are further names of such a file, as planning reads the records of a part alone. Out: a
line for each number of shards, a tenth of them first. An engine that ends where the first shard would be handed out
stands for the workers; peaks are of the process's resident memory.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from capfilt.data.commit import read_stage
from capfilt.data.rundir import RunDir
from capfilt.data.sealed import sealed_bytes
from tests.curation.small_runs import make_run

ROWS = 10_000
GOAL_SECONDS, GOAL_MB = 60.0, 1000.0
PIECE = 10_000
OWN_RECORD_EVERY = 10


class PlannedError(Exception):
    """The first shard would be handed out now."""


class StopsAtTheFirst:
    """An engine that works on nothing."""

    def run(self, work: Any, shards: Sequence[str], progress: Any = None) -> Iterator[Any]:
        """Ends there."""
        print(f"{len(shards):,} shards, {work.total:,} images planned", flush=True)
        raise PlannedError


def make(path: Path, num_shards: int) -> None:
    """The run, by as many processes as there are cores."""
    if (path / "made").exists():
        return
    shutil.rmtree(path, ignore_errors=True)
    run = make_run(path, num_shards=1, num_samples=4)
    (path / "shards" / "00000.tar").unlink()
    table, record = read_stage(run.stage_file("shards", "00000"))
    extra = record.extra | {"num_shards": num_shards, "source_rows": num_shards * ROWS}
    record = replace(record, rows_in=ROWS, rows_kept=ROWS, extra=extra)
    (path / "shards" / "00000.parquet").write_bytes(sealed_bytes(table, asdict(record)))
    pieces = [(path, range(start, min(start + PIECE, num_shards))) for start in range(1, num_shards, PIECE)]
    with multiprocessing.get_context("spawn").Pool() as pool:
        pool.starmap(_make_piece, pieces, chunksize=1)
    (path / "made").touch()


def _make_piece(path: Path, numbers: range) -> None:
    run = RunDir.open(path)
    table, record = read_stage(run.stage_file("shards", "00000"))
    for number in numbers:
        file = path / "shards" / f"{number:05d}.parquet"
        if number % OWN_RECORD_EVERY and number != numbers[0]:
            os.link(path / "shards" / f"{numbers[0]:05d}.parquet", file)
        else:
            file.write_bytes(sealed_bytes(table, asdict(replace(record, shard=file.stem))))


def plan(path: Path) -> None:
    """Plan captions, ranks and filter of shards that are there, as `capfilt run` does."""
    from capfilt.curation.annotate import annotate
    from capfilt.settings import CaptionSettings, FilterSettings, RankSettings

    stages = ("captions", "clip", "itm", "manifest")
    began = time.perf_counter()
    try:
        annotate(
            RunDir.open(path), stages, CaptionSettings(), RankSettings(), FilterSettings(), engine=StopsAtTheFirst()
        )
    except PlannedError:
        seconds = time.perf_counter() - began
        lines = Path("/proc/self/status").read_text().splitlines()
        peak = next(int(line.split()[1]) / 1000 for line in lines if line.startswith("VmHWM"))
        print(
            f"{seconds:6.1f} s {peak:6,.0f} MB   (goal {GOAL_SECONDS:g} s, {GOAL_MB:,.0f} MB for a million)", flush=True
        )


def main() -> None:
    """Make the runs where they are not there, then plan each in a process of its own."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shards", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path, default=Path("build/bench-planning"))
    parser.add_argument("--plan", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.plan:
        plan(asked.plan)
        return
    for num_shards in (asked.shards // 10, asked.shards):
        path = asked.folder / str(num_shards)
        make(path, num_shards)
        subprocess.run([sys.executable, "-m", "benchmarks.planning", "--plan", path], env=os.environ, check=True)


if __name__ == "__main__":
    main()
