"""Reading the manifest across shards and runs.

In: runs. Out: Arrow tables. `caption_index` is -1 for the web caption and 0…n-1 for synthetic captions; rows
stand in the order of the keys in their shard, then by caption_index.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from capfilt.data.commit import read_stage
from capfilt.data.per_shard import of_each, records_of
from capfilt.data.retries import stage_shards
from capfilt.data.rundir import RunDir
from capfilt.data.schemas import SCHEMAS, WEB_CAPTION_INDEX
from capfilt.errors import CapfiltError, UsageError
from capfilt.settings.values import did_you_mean

__all__ = ["SCHEMAS", "WEB_CAPTION_INDEX", "checked_shards", "iterate_manifest", "read_manifest", "read_pairs"]


def iterate_manifest(
    run_dirs: Sequence[RunDir | str | Path],
    columns: Sequence[str] | None = None,
    kept_only: bool = False,
) -> Iterator[tuple[RunDir, str, pa.Table]]:
    """Yield (run, shard, rows) for one shard at a time; memory is bounded by the largest shard.

    Raises UsageError for a run without a manifest or a column it does not have, CapfiltError for a manifest
    that lacks shards or mixes selections, CorruptionError for a damaged file.
    """
    names = list(columns) if columns is not None else SCHEMAS["manifest"].names
    unknown = sorted(set(names) - set(SCHEMAS["manifest"].names))
    if unknown:
        known, nearest = ", ".join(SCHEMAS["manifest"].names), did_you_mean(unknown[0], SCHEMAS["manifest"].names)
        raise UsageError(f"The manifest has no column {', '.join(unknown)}; it has {known}.{nearest}")
    for run in (_opened(item) for item in run_dirs):
        shards, selection = checked_shards(run)
        read = partial(_read_shard, run, selection, names, kept_only=kept_only)
        for shard, table in zip(shards, of_each(run, shards, read), strict=True):
            yield run, shard, table


def read_pairs(
    run: RunDir, shard: str, selection: str, columns: Sequence[str] | None = None, *, kept_only: bool = False
) -> pa.Table:
    """Rows of one shard of a manifest that was checked. Raises CapfiltError where it is of another selection by now."""
    names = list(columns) if columns is not None else SCHEMAS["manifest"].names
    read_names = names if not kept_only or "kept" in names else [*names, "kept"]
    table, record = read_stage(run.read_file("manifest", shard), read_names)
    if record.fingerprint != selection:
        raise CapfiltError(f"The pairs of {run.path} were selected anew while they were read. Repeat the command.")
    return (table.filter(pc.field("kept")) if kept_only else table).select(names)


def _read_shard(run: RunDir, selection: str, names: Sequence[str], shard: str, *, kept_only: bool) -> pa.Table:
    return read_pairs(run, shard, selection, names, kept_only=kept_only)


def read_manifest(
    run_dirs: RunDir | str | Path | Sequence[RunDir | str | Path],
    columns: Sequence[str] | None = None,
    kept_only: bool = False,
) -> pa.Table:
    """Give the manifest of a run, or of several, as one table; errors as `iterate_manifest`."""
    run_dirs = [run_dirs] if isinstance(run_dirs, RunDir | str | Path) else run_dirs
    names = list(columns) if columns is not None else SCHEMAS["manifest"].names
    tables = [table for _, _, table in iterate_manifest(run_dirs, names, kept_only)]
    if not tables:
        return SCHEMAS["manifest"].empty_table().select(names)
    return pa.concat_tables(tables)


def checked_shards(run: RunDir) -> tuple[list[str], str]:
    """The shards of a manifest that is whole and of one selection, and the fingerprint of that.

    Errors as `iterate_manifest`.
    """
    shards = stage_shards(run)
    if not shards:
        raise UsageError(f"No shards in {run.path}/shards. Run `capfilt download TABLE {run.path}` first.")
    missing = sorted(set(shards) - set(run.committed("manifest")))
    if len(missing) == len(shards):
        of, option = "", ""
        if run.generation is not None:
            of, option = f" of the generation {run.generation}", f" --generation {run.generation}"
        raise UsageError(
            f"{run.path} has no manifest{of} yet. Run `capfilt run RECIPE {run.path}{option}` or "
            f"`capfilt filter {run.path}{option}` first."
        )
    if missing:
        raise CapfiltError(
            f"The manifest of {run.path} lacks {len(missing)} of {len(shards)} shards (first: {missing[0]}). "
            f"Repeat the command that was interrupted; after `capfilt retry`: `capfilt run RECIPE {run.path}`."
        )
    selections = {record.fingerprint for record in records_of(run, "manifest", shards)}
    if len(selections) > 1:
        raise CapfiltError(
            f"The manifest of {run.path} mixes {len(selections)} selections: one was interrupted. "
            f"Repeat it: `capfilt select {run.path} --threshold T --keep K{run.generation_option}`."
        )
    return shards, selections.pop()


def _opened(run: RunDir | str | Path) -> RunDir:
    return run if isinstance(run, RunDir) else RunDir.open(run)
