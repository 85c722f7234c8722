"""A small run of pictures in three formats, with scores by which its captions differ, and what of it is kept."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa

from capfilt.data.manifest import read_manifest
from capfilt.data.rundir import RunDir
from capfilt.data.sealed import read_sealed, sealed_bytes
from capfilt.data.shards import read_samples
from tests.data.conftest import commit_all

NUM_SHARDS, NUM_SAMPLES = 3, 8


def make_scored_run(
    path: Path,
    num_shards: int = NUM_SHARDS,
    num_samples: int = NUM_SAMPLES,
    change: Callable[[dict[str, Any]], dict[str, Any]] = lambda row: {},
) -> RunDir:
    """Two captions of most images are kept; one image of each shard has none, and every third no web caption.

    `change` gives what a kept row has instead.
    """
    run, rng = RunDir.create(path), random.Random(7)
    commit_all(run, num_shards, num_samples)
    for shard in run.shard_names():
        table, record, _ = read_sealed(run.stage_file("manifest", shard))
        rows = table.to_pylist()
        for row in rows:
            if row["itm_score"] is not None:
                row["itm_score"] = 0.5 + rng.random() / 2
            if row["kept"]:
                row["text"] += ' "ünïcode" 🙂, a <b>\\'
                row.update(change(row))
        changed = pa.Table.from_pylist(rows, schema=table.schema)
        run.stage_file("manifest", shard).write_bytes(sealed_bytes(changed, record))
    return run


def kept_of(run: RunDir) -> dict[str, list[dict[str, Any]]]:
    """Key → its kept rows, the best first, in the run's order."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in read_manifest([run], kept_only=True).to_pylist():
        found.setdefault(row["key"], []).append(row)
    return {key: sorted(rows, key=lambda row: -(row["itm_score"] or 0)) for key, rows in found.items()}


def pictures_of(run: RunDir) -> dict[str, bytes]:
    """Key → the stored bytes."""
    return {sample.key: sample.image for shard in run.shard_names() for sample in read_samples(run, shard)}
