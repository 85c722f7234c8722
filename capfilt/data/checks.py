"""What the rows of one stage must hold against those of the stages before it; `capfilt verify` asks it.

In: the tables of one shard. Out: sentences about what does not agree, none where all is well. The order of
rows is part of the contract: keys as in the shard, then caption_index ascending, the web caption (-1) first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import groupby
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from capfilt.data.reasons import DROP_REASON_SENTENCES, REASON_SENTENCES
from capfilt.data.schemas import HUMAN, IMAGE_EXTENSIONS, STATUSES, SUCCESS, WEB_CAPTION_INDEX

Tables = Mapping[str, pa.Table]
"""Stage → rows, of one shard; at least the stages up to the one that is checked."""

_SCORE_SLACK = 1e-3  # a cosine computed in half precision may pass 1 by this much


def check_shards(rows: pa.Table, quarantine: pa.Table) -> Iterator[str]:
    """Status and reason of every row from the closed lists, agreeing with each other and the quarantine."""
    reasons = dict(zip(quarantine["key"].to_pylist(), quarantine["reason"].to_pylist(), strict=True))
    columns = [
        "key",
        "status",
        "reason",
        "width",
        "height",
        "sha256",
        "image_offset",
        "image_length",
        "image_ext",
    ]
    for row in rows.select(columns).to_pylist():
        key, facts = row["key"], [row[name] for name in columns[3:]]
        if row["status"] not in STATUSES:
            yield f"the status of {key} is {row['status']!r}; expected one of {', '.join(STATUSES)}"
        elif row["status"] != SUCCESS:
            if row["reason"] not in REASON_SENTENCES:
                yield f"{key} failed for the unknown reason {row['reason']!r}"
            if reasons.get(key) != row["reason"]:
                yield f"{key} failed for {row['reason']!r}, its quarantine says {reasons.get(key)!r}"
        elif None in facts or row["reason"] is not None or row["image_ext"] not in IMAGE_EXTENSIONS:
            yield f"{key} is a success without size, digest or place of its image, or with a reason"


def check_captions(tables: Tables) -> Iterator[str]:
    """Samples in the shard's order, each with the captions 0 to n-1."""
    captions = tables["captions"]
    yield from _check_key_order(captions, tables["shards"])
    pairs = zip(captions["key"].to_pylist(), captions["caption_index"].to_pylist(), strict=True)
    for key, group in groupby(pairs, key=lambda pair: pair[0]):
        indices = [index for _, index in group]
        if indices != list(range(len(indices))):
            yield f"the captions of {key} are numbered {indices[:12]}"
    if captions["text"].null_count:
        yield f"{captions['text'].null_count} captions are null"


def check_clip(tables: Tables) -> Iterator[str]:
    """The web caption and every synthetic caption of every sample, unchanged; scores and ranks in order."""
    clip, captions = tables["clip"], tables["captions"]
    is_web = pc.field("caption_index") == WEB_CAPTION_INDEX
    columns = ["key", "caption_index", "text"]
    if not clip.filter(~is_web).select(columns).equals(captions.select(columns)):
        yield "its synthetic captions are not those of the captions stage, in their order"
    shard_rows = tables["shards"].select(["key", "caption"]).to_pylist()
    web_texts = {row["key"]: row["caption"] or "" for row in shard_rows}
    web = clip.filter(is_web)
    web_keys = web["key"].to_pylist()
    if web_keys != list(dict.fromkeys(clip["key"].to_pylist())):
        yield "not every sample has one web caption, before its synthetic ones"
    for key, text in zip(web_keys, web["text"].to_pylist(), strict=True):
        if (text or "") != web_texts.get(key):
            yield f"the web caption of {key} is not that of the shard"
    yield from _check_sources(clip)
    yield from _check_range(clip, "clip_score", -1 - _SCORE_SLACK, 1 + _SCORE_SLACK)
    for key, group in groupby(clip.to_pylist(), key=lambda row: row["key"]):
        yield from _check_ranks(key, list(group))


def check_itm(tables: Tables) -> Iterator[str]:
    """Scores of pairs that the CLIP stage has, in its order."""
    itm, clip = tables["itm"], tables["clip"]
    order = {pair: number for number, pair in enumerate(_pairs(clip))}
    numbers = [order.get(pair, -1) for pair in _pairs(itm)]
    if -1 in numbers:
        yield f"{numbers.count(-1)} of its pairs are not in the CLIP stage"
    elif numbers != sorted(numbers):
        yield "its pairs are not in the order of the CLIP stage"
    yield from _check_range(itm, "itm_score", 0, 1)


def check_manifest(tables: Tables, shard: str) -> Iterator[str]:
    """A row for every pair of the samples that came through the ITM stage, with the scores stored there; kept
    or dropped for a reason."""
    manifest, itm = tables["manifest"], tables["itm"]
    clip = tables["clip"].filter(pc.field("key").isin(itm["key"].combine_chunks()))
    columns = ["key", "caption_index", "source", "text", "clip_score", "rank"]
    for name in columns:
        if not manifest[name].equals(clip[name]):
            yield f"its column {name} is not that of the CLIP stage"
    scores = dict(zip(_pairs(itm), itm["itm_score"].to_pylist(), strict=True))
    if [scores.get(pair) for pair in _pairs(manifest)] != manifest["itm_score"].to_pylist():
        yield "its ITM scores are not those of the ITM stage"
    yield from _check_verdicts(manifest, tables["shards"], shard)
    for row in manifest.filter(pc.field("kept") & pc.field("itm_score").is_null()).select(["key"]).to_pylist():
        yield f"{row['key']} has a caption that is kept without an ITM score"


def check_human_manifest(manifest: pa.Table, shard_rows: pa.Table, shard: str) -> Iterator[str]:
    """Human captions of every sample, numbered from 0, without scores; kept or dropped for a reason."""
    yield from _check_key_order(manifest, shard_rows)
    for key, group in groupby(manifest.to_pylist(), key=lambda row: row["key"]):
        rows = list(group)
        indices = [row["caption_index"] for row in rows]
        if indices != list(range(len(rows))) or {row["source"] for row in rows} != {HUMAN}:
            yield f"the captions of {key} are numbered {indices[:12]}, or not all of them are human"
        if any(row[name] is not None for row in rows for name in ("clip_score", "rank", "itm_score")):
            yield f"a human caption of {key} has a score"
    yield from _check_verdicts(manifest, shard_rows, shard)


def _check_verdicts(manifest: pa.Table, shard_rows: pa.Table, shard: str) -> Iterator[str]:
    """What is repeated of the shard's rows is theirs; a pair is kept, or dropped for a known reason."""
    facts = ["url", "width", "height", "sha256"]
    samples = {row.pop("key"): row for row in shard_rows.select(["key", *facts]).to_pylist()}
    for row in manifest.select(["shard", "key", *facts, "kept", "drop_reason"]).to_pylist():
        key = row["key"]
        if row["shard"] != shard or {name: row[name] for name in facts} != samples.get(key):
            yield f"shard, url, size or digest of {key} are not those of the shard"
        if row["kept"] != (row["drop_reason"] is None) or row["kept"] is None:
            yield f"{key} has a caption with kept = {row['kept']} and drop reason {row['drop_reason']!r}"
        elif not row["kept"] and row["drop_reason"] not in DROP_REASON_SENTENCES:
            yield f"{key} has a caption dropped for the unknown reason {row['drop_reason']!r}"


CHECKS: dict[str, Callable[[Tables], Iterator[str]]] = {
    "captions": check_captions,
    "clip": check_clip,
    "itm": check_itm,
}
"""Stage → its check; the manifest's needs the shard's name as well."""


def _pairs(table: pa.Table) -> list[tuple[Any, Any]]:
    return list(zip(table["key"].to_pylist(), table["caption_index"].to_pylist(), strict=True))


def _check_key_order(table: pa.Table, shard_rows: pa.Table) -> Iterator[str]:
    kept = shard_rows.filter(pc.field("status") == SUCCESS)["key"].to_pylist()
    order = {key: number for number, key in enumerate(kept)}
    numbers = [order.get(key, -1) for key, _ in groupby(table["key"].to_pylist())]
    if -1 in numbers:
        yield f"{numbers.count(-1)} of its keys are not samples of the shard"
    elif numbers != sorted(set(numbers)):
        yield "its keys are not in the order of the shard"


def _check_sources(table: pa.Table) -> Iterator[str]:
    expected = ["web" if index == WEB_CAPTION_INDEX else "synthetic" for index in table["caption_index"].to_pylist()]
    if table["source"].to_pylist() != expected:
        yield "a source is not `web` for the web caption or `synthetic` for the others"


def _check_range(table: pa.Table, column: str, low: float, high: float) -> Iterator[str]:
    outside = [value for value in table[column].to_pylist() if value is not None and not low <= value <= high]
    if outside:
        yield f"{len(outside)} values of {column} are outside {low:g} to {high:g} (first: {outside[0]})"


def _check_ranks(key: str, rows: list[dict[str, Any]]) -> Iterator[str]:
    ranked = sorted((row for row in rows if row["rank"] is not None), key=lambda row: row["rank"])
    if [row["rank"] for row in ranked] != list(range(1, len(ranked) + 1)):
        yield f"the captions of {key} are not ranked 1 to {len(ranked)}"
    scores = [row["clip_score"] for row in ranked]
    if None in scores:
        yield f"{key} has a caption with a rank and no CLIP score"
    elif scores != sorted(scores, reverse=True):
        yield f"the ranks of {key} are not in the order of its CLIP scores"
    originals = {row["caption_index"] for row in rows if row["duplicate_of"] is None}
    for row in rows:
        if row["duplicate_of"] is not None and (row["rank"] is not None or row["duplicate_of"] not in originals):
            yield f"a duplicate among the captions of {key} is ranked, or repeats a caption that is not there"
