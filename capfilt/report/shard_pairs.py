"""The rows and pairs of one shard as far as its stages have come, to be looked at.

In: a run, a shard, the stages it has. Out: its rows, and its pairs with the manifest's columns: of the manifest where
there is one, else of what is there (web captions, captions, CLIP scores, ITM scores), the rest null.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from capfilt.data.commit import read_quarantine, read_stage, read_table
from capfilt.data.retries import LastAttempts
from capfilt.data.rundir import RunDir
from capfilt.data.schemas import SCHEMAS, SUCCESS, WEB_CAPTION_INDEX

NO_ROW = "no_row"
"""Status of what a manifest tells of and its shard does not: damage, which `verify` names."""

_LATER_STAGES = ("captions", "clip", "itm")


class ShardPairs:
    """One shard's rows, in the last attempt of each, and its pairs."""

    def __init__(
        self, rows: pa.Table, pairs: pa.Table, threshold: float | None, set_aside: dict[str, tuple[str, str]]
    ) -> None:
        self.rows, self.pairs, self.threshold = rows, pairs, threshold
        self.set_aside = set_aside
        """Key → (reason, what was found), of the samples that a later stage could not work on."""
        self._place_of = {key: number for number, key in enumerate(rows["key"].to_pylist())}

    def mark(self, holds: np.ndarray) -> None:
        """Give the pairs a column `matches`."""
        self.pairs = self.pairs.append_column("matches", pa.array(holds))

    def row(self, key: str) -> dict[str, Any]:
        """A row of the shard; one of nothing but its status NO_ROW where pairs have a key that the shard has not."""
        if key not in self._place_of:
            return dict.fromkeys(self.rows.column_names) | {"key": key, "status": NO_ROW}
        return self.rows.slice(self._place_of[key], 1).to_pylist()[0]

    def captions(self, key: str) -> list[dict[str, Any]]:
        """The pairs of a sample, by their caption's number."""
        order, bounds, numbers = self._by_key
        number = numbers.get(key)
        if number is None:
            return []
        return self.pairs.take(order[bounds[number] : bounds[number + 1]]).sort_by("caption_index").to_pylist()

    @cached_property
    def _by_key(self) -> tuple[np.ndarray, np.ndarray, dict[str, int]]:
        """The pairs' places sorted by key, where each key begins there, and which key that is."""
        encoded = self.pairs["key"].combine_chunks().dictionary_encode()
        codes = encoded.indices.to_numpy()
        order = np.argsort(codes, kind="stable")
        bounds = np.searchsorted(codes[order], np.arange(len(encoded.dictionary) + 1))
        return order, bounds, {key: number for number, key in enumerate(encoded.dictionary.to_pylist())}


def read_shard_pairs(run: RunDir, shard: str, stages: Collection[str], last: LastAttempts) -> ShardPairs:
    """Read what a shard has of these stages. Raises CorruptionError for damage in it."""
    rows = last.of(shard, read_table(run.stage_file("shards", shard), columns=SCHEMAS["shards"].names))
    threshold = None
    if "manifest" in stages:
        pairs, record = read_stage(run.read_file("manifest", shard), SCHEMAS["manifest"].names)
        found = record.fields.get("threshold")
        threshold = float(found) if isinstance(found, int | float) else None
    else:
        images = rows.filter(pc.field("status") == SUCCESS)
        pairs = _unjudged_pairs(run, shard, stages, images)
    return ShardPairs(rows, pairs, threshold, _set_aside(run, shard, stages))


def _unjudged_pairs(run: RunDir, shard: str, stages: Collection[str], images: pa.Table) -> pa.Table:
    """What a manifest will be made of; verdicts are null."""
    if "clip" in stages:
        names = ["key", "caption_index", "source", "text", "clip_score", "rank"]
        pairs = read_table(run.read_file("clip", shard), columns=names)
    else:
        pairs = _captions(images["key"], pc.fill_null(images["caption"], ""), "web", WEB_CAPTION_INDEX)
        if "captions" in stages:
            written = read_table(run.read_file("captions", shard), columns=["key", "caption_index", "text"])
            more = _captions(written["key"], written["text"], "synthetic", written["caption_index"])
            pairs = pa.concat_tables([pairs, more])
    if "itm" in stages:
        scores = read_table(run.read_file("itm", shard), columns=["key", "caption_index", "itm_score"])
        pairs = pairs.join(scores, ["key", "caption_index"], join_type="left outer")
    place = pc.index_in(pairs["key"], images["key"].combine_chunks())
    columns = {name: pairs[name] for name in pairs.column_names}
    columns |= {name: images[name].take(place) for name in ("url", "width", "height", "sha256")}
    columns["shard"] = pa.array([shard] * pairs.num_rows, pa.string())
    for field in SCHEMAS["manifest"]:
        columns.setdefault(field.name, pa.nulls(pairs.num_rows, field.type))
    table = pa.table({name: columns[name] for name in SCHEMAS["manifest"].names}, schema=SCHEMAS["manifest"])
    order = pc.sort_indices(
        pa.table({"place": place, "index": columns["caption_index"]}),
        sort_keys=[("place", "ascending"), ("index", "ascending")],
    )
    return table.take(order)


def _captions(keys: Any, texts: Any, source: str, index: Any) -> pa.Table:
    number = pa.array([index] * len(keys), pa.int32()) if isinstance(index, int) else index
    sources = pa.array([source] * len(keys), pa.string())
    return pa.table({"key": keys, "caption_index": number, "source": sources, "text": texts})


def _set_aside(run: RunDir, shard: str, stages: Collection[str]) -> dict[str, tuple[str, str]]:
    found: dict[str, tuple[str, str]] = {}
    for stage in _LATER_STAGES:
        if stage in stages:
            _, record = read_stage(run.read_file(stage, shard), ["key"])
            for row in read_quarantine(run, stage, shard, record).to_pylist():
                found.setdefault(row["key"], (row["reason"], row["detail"] or ""))
    return found
