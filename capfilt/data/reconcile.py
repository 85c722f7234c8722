"""What the rows of a stage must hold: asked before every commit, and again of what lies on the disk.

In: tables of one shard. Out: nothing, or ValueError with what does not agree. No run directory is known here.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from capfilt.data.paths import AnyPath
from capfilt.data.schemas import SCHEMAS, SUCCESS
from capfilt.data.tars import TarMember, index_members


def count_kept(stage: str, table: pa.Table) -> int:
    """Count what a stage hands on: its successful rows for the shards, its distinct keys for the others."""
    if stage == "shards":
        return table.filter(pc.field("status") == SUCCESS).num_rows
    return table.group_by("key", use_threads=False).aggregate([]).num_rows


def check_counts(rows_in: int, kept: int, rejected: int, quarantined: int) -> None:
    """Rows in = kept + rejected + quarantined."""
    accounted = kept + rejected + quarantined
    if rows_in != accounted:
        raise ValueError(
            f"{rows_in} rows in, but {kept} kept + {rejected} rejected + {quarantined} quarantined = {accounted}"
        )


def check_rows(stage: str, table: pa.Table, quarantined: Collection[str]) -> None:
    """The columns of the contract; scores finite; keys unique; kept and quarantined keys disjoint.

    The shards may carry further columns behind those of the contract.
    """
    schema = SCHEMAS[stage]
    has_more = stage == "shards" and len(table.schema) > len(schema)
    found = pa.schema(list(table.schema)[: len(schema)]) if has_more else table.schema
    if not found.equals(schema, check_metadata=False):
        raise ValueError(f"the columns are [{_columns(found)}]; expected [{_columns(schema)}]")
    unit = ["key"] if stage == "shards" else ["key", "caption_index"]
    if table["key"].null_count or table.group_by(unit, use_threads=False).aggregate([]).num_rows != table.num_rows:
        raise ValueError(f"a {' and '.join(unit)} stands twice, or a row has no key")
    for field in schema:
        values = table[field.name].drop_null() if pa.types.is_floating(field.type) else None
        if values is not None and not np.isfinite(values.to_numpy()).all():
            raise ValueError(f"{field.name} has values that are not finite")
    if stage == "shards":
        kept = set(table.filter(pc.field("status") == SUCCESS)["key"].to_pylist())
        failed = set(table["key"].to_pylist()) - kept
        if failed != set(quarantined):
            raise ValueError("the rows without success are not those in quarantine")
    else:
        kept = set(table["key"].to_pylist())
    if len(set(quarantined)) != len(quarantined):
        raise ValueError("a key is in quarantine twice")
    if both := kept & set(quarantined):
        raise ValueError(f"{len(both)} keys are both kept and in quarantine (first: {min(both)})")


def check_tar(file: BinaryIO, tar: AnyPath, table: pa.Table, *, contents: bool = True) -> int:
    """Every member plain and of a row, every image where its row says; with `contents`, with its digest too.

    `file` is the open tar, which is `tar` to people. Gives the number of members. Raises ValueError where tar and rows
    differ, CorruptionError where the file is no tar of ours.
    """
    members = {member.name: member for member in index_members(file, tar)}
    num_members = len(members)
    columns = ["key", "image_offset", "image_length", "image_ext", "sha256"]
    previous_end = 0
    for row in table.filter(pc.field("status") == SUCCESS).select(columns).to_pylist():
        name = f"{row['key']}.{row['image_ext']}"
        place = TarMember(name, row["image_offset"], row["image_length"])
        if (found := members.pop(name, None)) != place:
            raise ValueError(f"the row of {row['key']} says {place}, the tar has {found}")
        if place.offset < previous_end:
            raise ValueError(f"{name} stands before its predecessor; rows and members have one order")
        previous_end = place.offset + place.length
        if contents:
            file.seek(place.offset, os.SEEK_SET)
            if hashlib.sha256(file.read(place.length)).hexdigest() != row["sha256"]:
                raise ValueError(f"the sha256 of {row['key']}'s row is not that of {name} in the tar")
        for ending in ("txt", "json"):
            if members.pop(f"{row['key']}.{ending}", None) is None:
                raise ValueError(f"the tar has no {row['key']}.{ending}")
    if members:
        raise ValueError(f"the tar has members without a row: {', '.join(list(members)[:5])}")
    return num_members


def _columns(schema: pa.Schema) -> str:
    return ", ".join(f"{field.name}: {field.type}" for field in schema)
