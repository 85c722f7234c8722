"""What one shard contributes to the statistics of a run: sums that are added up in any order.

In: a run and the name of a shard. Out: a `ShardSums`. Stages that the shard does not have yet contribute nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from capfilt.data.commit import CommitRecord, read_commit_record, read_quarantine, read_stage, read_table
from capfilt.data.retries import LastAttempts
from capfilt.data.rundir import RunDir
from capfilt.data.schemas import SUCCESS
from capfilt.data.sealed import read_record
from capfilt.report.words import WordCounts, count_words, distinct, plain_texts

THRESHOLDS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
"""ITM thresholds at which the kept rate is stated."""
EDGE_BOUNDS_PX = (32, 64, 128, 256, 384, 512, 768, 1024)
"""Bounds of the histogram of shorter edges."""
CLIP_BINS, ITM_BINS = 100, 20


@dataclass
class Histogram:
    """Counts between bounds: `counts[i]` values lie in [bounds[i], bounds[i + 1]); the last bin has both."""

    bounds: list[float]
    counts: list[int]

    @classmethod
    def even(cls, low: float, high: float, bins: int) -> Histogram:
        """Bins of equal width, empty."""
        return cls(list(_even_bounds(low, high, bins)), [0] * bins)

    def add(self, values: np.ndarray) -> None:
        """Count `values`; those outside the bounds count in the first or last bin."""
        bins = np.searchsorted(np.array(self.bounds[1:-1]), values, side="right")
        self._add_counts(np.bincount(bins, minlength=len(self.counts)))

    def merge(self, other: Histogram) -> None:
        """Add the counts of another one with the same bounds."""
        self._add_counts(np.asarray(other.counts))

    def _add_counts(self, counts: np.ndarray) -> None:
        self.counts = (np.asarray(self.counts) + counts).tolist()


@cache
def _even_bounds(low: float, high: float, bins: int) -> tuple[float, ...]:
    return tuple(round(float(bound), 6) for bound in np.linspace(low, high, bins + 1))


@dataclass
class DownloadSums:
    """Rows of the URL table, in the last attempt of each."""

    status: Counter[str] = field(default_factory=Counter)
    reason: Counter[str] = field(default_factory=Counter)
    width_px: Counter[int] = field(default_factory=Counter)
    height_px: Counter[int] = field(default_factory=Counter)
    shorter_edges: np.ndarray = field(default_factory=lambda: np.zeros(len(EDGE_BOUNDS_PX) + 1, np.int64))

    def add(self, rows: pa.Table) -> None:
        """Count rows of a shard."""
        self.status.update(counts_of(rows["status"]))
        self.reason.update(counts_of(rows["reason"]))
        images = rows.filter(pc.equal(rows["status"], SUCCESS))
        self.width_px.update(counts_of(images["width"]))
        self.height_px.update(counts_of(images["height"]))
        shorter = pc.min_element_wise(images["width"], images["height"]).to_numpy()
        self.shorter_edges += np.bincount(np.digitize(shorter, EDGE_BOUNDS_PX), minlength=len(self.shorter_edges))

    def merge(self, other: DownloadSums) -> None:
        """Add another shard's."""
        for name in ("status", "reason", "width_px", "height_px"):
            getattr(self, name).update(getattr(other, name))
        self.shorter_edges += other.shorter_edges


@dataclass
class CaptionSums:
    """Synthetic captions as they were written."""

    num_captions: int = 0
    distinct: Counter[int] = field(default_factory=Counter)
    """Different captions of an image → images."""

    def add(self, rows: pa.Table) -> None:
        """Count the captions of a shard."""
        self.num_captions += rows.num_rows
        image, text = (rows[name].combine_chunks().dictionary_encode() for name in ("key", "text"))
        pairs = image.indices.to_numpy().astype(np.int64) * max(len(text.dictionary), 1) + text.indices.to_numpy()
        different = np.bincount(distinct(pairs) // max(len(text.dictionary), 1))
        times = np.bincount(different)
        self.distinct.update({int(number): int(times[number]) for number in times.nonzero()[0]})

    def merge(self, other: CaptionSums) -> None:
        """Add another shard's."""
        self.num_captions += other.num_captions
        self.distinct.update(other.distinct)


@dataclass
class PairSums:
    """Pairs of one source in the manifest."""

    num_pairs: int = 0
    num_kept: int = 0
    drop_reasons: Counter[str] = field(default_factory=Counter)
    lengths: Counter[int] = field(default_factory=Counter)
    """Words of a caption → captions."""
    words: WordCounts = field(default_factory=WordCounts)
    """Of the kept captions."""
    clip_score: Histogram = field(default_factory=lambda: Histogram.even(-1, 1, CLIP_BINS))
    itm_score: Histogram = field(default_factory=lambda: Histogram.even(0, 1, ITM_BINS))
    num_candidates: int = 0
    """Pairs that nothing but the threshold drops."""
    num_passing: np.ndarray = field(default_factory=lambda: np.zeros(len(THRESHOLDS), np.int64))
    """Of them, those that each of THRESHOLDS keeps."""

    def add(self, rows: pa.Table) -> None:
        """Count rows of a manifest that have this source."""
        self.num_pairs += rows.num_rows
        self.num_kept += pc.sum(rows["kept"]).as_py() or 0
        self.drop_reasons.update(counts_of(rows["drop_reason"]))
        plain = plain_texts(rows["text"])
        lengths = np.bincount(count_words(plain))
        self.lengths.update({int(words): int(lengths[words]) for words in lengths.nonzero()[0]})
        self.words.add(plain.filter(rows["kept"].combine_chunks()))
        self.clip_score.add(pc.drop_null(rows["clip_score"]).to_numpy())
        self.itm_score.add(pc.drop_null(rows["itm_score"]).to_numpy())
        only_threshold = pc.or_(pc.is_null(rows["drop_reason"]), pc.equal(rows["drop_reason"], "low_itm"))
        scores = pc.drop_null(pc.filter(rows["itm_score"], pc.fill_null(only_threshold, True))).to_numpy()
        self.num_passing += np.array([(scores >= threshold).sum() for threshold in THRESHOLDS])
        self.num_candidates += len(scores)

    def merge(self, other: PairSums) -> None:
        """Add another shard's."""
        self.num_pairs += other.num_pairs
        self.num_kept += other.num_kept
        self.drop_reasons.update(other.drop_reasons)
        self.lengths.update(other.lengths)
        self.words.merge(other.words)
        self.clip_score.merge(other.clip_score)
        self.itm_score.merge(other.itm_score)
        self.num_passing += other.num_passing
        self.num_candidates += other.num_candidates


@dataclass
class ShardSums:
    """All of it."""

    download: DownloadSums = field(default_factory=DownloadSums)
    captions: CaptionSums = field(default_factory=CaptionSums)
    pairs: dict[str, PairSums] = field(default_factory=dict)
    """By source."""
    num_images_kept: int = 0
    quarantine: dict[str, Counter[str]] = field(default_factory=dict)
    """Stage → reason → rows."""

    def merge(self, other: ShardSums) -> None:
        """Add another shard's."""
        self.download.merge(other.download)
        self.captions.merge(other.captions)
        self.num_images_kept += other.num_images_kept
        for source, sums in other.pairs.items():
            self.pairs.setdefault(source, PairSums()).merge(sums)
        for stage, reasons in other.quarantine.items():
            self.quarantine.setdefault(stage, Counter()).update(reasons)


def sum_shard(run: RunDir, shard: str, stages: Collection[str], last: LastAttempts) -> ShardSums:
    """Sum up the given stages of a shard, which are committed. Raises CorruptionError for damage in what is read."""
    sums = ShardSums()
    for stage in stages:
        record = _ADD[stage](run, shard, sums, last, stages)
        rows = read_quarantine(run, stage, shard, record)
        if rows.num_rows:
            reasons = (last.of(shard, rows) if stage == "shards" else rows)["reason"]
            sums.quarantine[stage] = Counter(counts_of(reasons))
    return sums


def counts_of(column: pa.ChunkedArray) -> dict[Any, int]:
    """Value → times, nulls left out."""
    return {item["values"]: item["counts"] for item in pc.value_counts(pc.drop_null(column)).to_pylist()}


def _add_download(run: RunDir, shard: str, sums: ShardSums, last: LastAttempts, _stages: Any) -> CommitRecord:
    columns = ["key", "status", "reason", "width", "height"]
    table, record = read_stage(run.read_file("shards", shard), columns)
    sums.download.add(last.of(shard, table))
    return record


def _add_captions(
    run: RunDir, shard: str, sums: ShardSums, _last: LastAttempts, stages: Collection[str]
) -> CommitRecord:
    path = run.read_file("captions", shard)
    if "manifest" in stages:  # which has their texts too
        return read_commit_record(path)
    table, record = read_stage(path, ["key", "text"])
    sums.captions.add(table)
    return record


def _add_pairs(run: RunDir, shard: str, sums: ShardSums, _last: LastAttempts, stages: Collection[str]) -> CommitRecord:
    columns = ["key", "source", "text", "clip_score", "itm_score", "kept", "drop_reason"]
    table, record = read_stage(run.read_file("manifest", shard), columns)
    sources = {
        source: table.filter(pc.equal(table["source"], source)) for source in pc.unique(table["source"]).to_pylist()
    }
    for source, rows in sources.items():
        sums.pairs.setdefault(source, PairSums()).add(rows)
    sums.num_images_kept += pc.count_distinct(table["key"].filter(table["kept"])).as_py()
    if "captions" in stages:
        is_whole = "synthetic" in sources and {"clip", "itm"} <= set(stages) and _holds_captions(run, shard)
        written = sources["synthetic"] if is_whole else read_table(run.read_file("captions", shard), ["key", "text"])
        sums.captions.add(written)
    return record


def _holds_captions(run: RunDir, shard: str) -> bool:
    """Whether the manifest was made from the captions that are there now, of every image: one file less to read."""
    records = [read_record(run.read_file(stage, shard))[:2] for stage in ("captions", "clip", "itm", "manifest")]
    chain = all(record["input_digest"] == seal for (_, seal), (record, _) in pairwise(records))
    return chain and records[-1][0]["rows_kept"] == records[0][0]["rows_kept"]


def _add_nothing(*_: Any) -> None:
    """Their rows are counted in the manifest."""


_ADD: Mapping[str, Any] = {
    "shards": _add_download, "captions": _add_captions, "clip": _add_nothing, "itm": _add_nothing,
    "manifest": _add_pairs,
}  # fmt: skip
