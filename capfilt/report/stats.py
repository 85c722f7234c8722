"""Statistics of a run, from its Parquet files alone: no image and no model is read.

In: a run. Out: a `RunStats`, plain counts and histograms that become JSON as they are. Every figure is a sum
over shards, taken one shard at a time, so memory grows with the vocabulary alone; medians are exact, because
they come from counts of whole numbers. Stages that have not run yet have no figures.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from capfilt.data.commit import read_quarantine, read_table
from capfilt.data.retries import LastAttempts
from capfilt.data.rundir import STAGES, RunDir
from capfilt.data.schemas import SUCCESS
from capfilt.errors import UsageError

THRESHOLDS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
"""ITM thresholds at which the kept rate is stated."""
NUM_TOP_WORDS = 20
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
        return cls([round(float(b), 6) for b in np.linspace(low, high, bins + 1)], [0] * bins)

    def add(self, values: np.ndarray) -> None:
        """Count `values`; those outside the bounds count in the first or last bin."""
        clipped = np.clip(values, self.bounds[0], self.bounds[-1])
        self.counts = [int(n) for n in np.histogram(clipped, self.bounds)[0] + np.asarray(self.counts)]


@dataclass
class Spread:
    """Whole numbers summed up: how many, least, median, mean, most."""

    num: int
    least: int
    median: float
    mean: float
    most: int


@dataclass
class DownloadStats:
    """What became of the rows of the URL table (or of the imported samples), in the last attempt of each."""

    num_rows: int = 0
    num_images: int = 0
    by_status: dict[str, int] = field(default_factory=dict)
    by_reason: dict[str, int] = field(default_factory=dict)
    width_px: Spread | None = None
    height_px: Spread | None = None
    shorter_edge_px: dict[str, int] = field(default_factory=dict)


@dataclass
class SourceStats:
    """Pairs of one source, web or synthetic, in the manifest."""

    num_pairs: int = 0
    num_kept: int = 0
    by_drop_reason: dict[str, int] = field(default_factory=dict)
    words: Spread | None = None
    words_histogram: dict[int, int] = field(default_factory=dict)
    clip_score: Histogram = field(default_factory=lambda: Histogram.even(-1, 1, CLIP_BINS))
    itm_score: Histogram = field(default_factory=lambda: Histogram.even(0, 1, ITM_BINS))
    kept_by_threshold: dict[str, float] = field(default_factory=dict)
    """ITM threshold → share kept of the pairs that nothing but the threshold drops."""
    top_words: dict[str, int] = field(default_factory=dict)
    """Most frequent words of the kept captions → captions that have them."""


@dataclass
class DiversityStats:
    """How much the synthetic captions of an image differ."""

    captions_per_image: float = 0.0
    distinct_per_image: Spread | None = None
    distinct_share: float = 0.0
    """Distinct captions over all captions, image by image."""


@dataclass
class RunStats:
    """Everything `capfilt stats` shows."""

    run: str
    generation: str | None
    shards_by_stage: dict[str, int]
    download: DownloadStats
    diversity: DiversityStats | None
    pairs: dict[str, SourceStats]
    num_images_kept: int
    """Images with at least one kept pair."""
    quarantine: dict[str, dict[str, int]]
    """Stage → reason → rows."""


def compute_stats(run: RunDir) -> RunStats:
    """Sum up every committed stage of `run`.

    Raises UsageError when the run has no shards yet, CorruptionError when a file is not what was committed.
    """
    shards = run.shard_names()
    if not shards:
        raise UsageError(f"No shards in {run.path}/shards. Run `capfilt download TABLE {run.path}` first.")
    last = LastAttempts(run)
    committed = {stage: [s for s in run.committed(stage) if s in set(shards)] for stage in STAGES}
    pairs, num_images_kept = _pair_stats(run, committed["manifest"])
    return RunStats(
        run=str(run.path),
        generation=run.generation,
        shards_by_stage={stage: len(names) for stage, names in committed.items()},
        download=_download_stats(run, shards, last),
        diversity=_diversity_stats(run, committed["captions"]) if committed["captions"] else None,
        pairs=pairs,
        num_images_kept=num_images_kept,
        quarantine=_quarantine_stats(run, committed, last),
    )


def _download_stats(run: RunDir, shards: Iterable[str], last: LastAttempts) -> DownloadStats:
    stats = DownloadStats()
    status, reason, widths, heights = Counter(), Counter(), Counter(), Counter()
    edges = np.zeros(len(EDGE_BOUNDS_PX) + 1, dtype=np.int64)
    for shard in shards:
        table = read_table(run.read_file("shards", shard), columns=["key", "status", "reason", "width", "height"])
        table = last.of(shard, table)
        status.update(_counts(table["status"]))
        reason.update(_counts(table["reason"]))
        images = table.filter(pc.field("status") == SUCCESS)
        widths.update(_counts(images["width"]))
        heights.update(_counts(images["height"]))
        shorter = pc.min_element_wise(images["width"], images["height"]).to_numpy()
        edges += np.bincount(np.digitize(shorter, EDGE_BOUNDS_PX), minlength=len(edges))
    stats.num_rows, stats.num_images = sum(status.values()), status[SUCCESS]
    stats.by_status, stats.by_reason = _by_count(status), _by_count(reason)
    stats.width_px, stats.height_px = spread_of(widths), spread_of(heights)
    stats.shorter_edge_px = dict(zip(_edge_names(), (int(n) for n in edges), strict=True))
    return stats


def _edge_names() -> list[str]:
    bounds = EDGE_BOUNDS_PX
    between = [f"{low}-{high - 1}" for low, high in zip(bounds, bounds[1:], strict=False)]
    return [f"under {bounds[0]}", *between, f"{bounds[-1]} and more"]


def _diversity_stats(run: RunDir, shards: Iterable[str]) -> DiversityStats:
    num_captions = 0
    distinct: Counter[int] = Counter()
    for shard in shards:
        table = read_table(run.read_file("captions", shard), columns=["key", "text"])
        num_captions += table.num_rows
        unique = table.group_by("key").aggregate([("text", "count_distinct")])
        distinct.update(_counts(unique["text_count_distinct"]))
    num_images = sum(distinct.values())
    total_distinct = sum(value * times for value, times in distinct.items())
    return DiversityStats(
        captions_per_image=num_captions / num_images if num_images else 0.0,
        distinct_per_image=spread_of(distinct),
        distinct_share=total_distinct / num_captions if num_captions else 0.0,
    )


@dataclass
class _Sums:
    """Running sums of one source while the shards pass by."""

    stats: SourceStats = field(default_factory=SourceStats)
    reasons: Counter[str] = field(default_factory=Counter)
    lengths: Counter[int] = field(default_factory=Counter)
    words: Counter[str] = field(default_factory=Counter)
    passing: np.ndarray = field(default_factory=lambda: np.zeros(len(THRESHOLDS), dtype=np.int64))
    num_candidates: int = 0

    def add(self, rows: pa.Table) -> None:
        self.stats.num_pairs += rows.num_rows
        self.stats.num_kept += pc.sum(rows["kept"]).as_py() or 0
        self.reasons.update(_counts(rows["drop_reason"]))
        words = _words(rows["text"])
        self.lengths.update(_counts(pc.list_value_length(words)))
        kept_words = pc.filter(words, rows["kept"])
        for word_list in kept_words.to_pylist():
            self.words.update(set(word_list))
        self.stats.clip_score.add(pc.drop_null(rows["clip_score"]).to_numpy())
        self.stats.itm_score.add(pc.drop_null(rows["itm_score"]).to_numpy())
        only_threshold = pc.or_(pc.is_null(rows["drop_reason"]), pc.equal(rows["drop_reason"], "low_itm"))
        scores = pc.drop_null(pc.filter(rows["itm_score"], pc.fill_null(only_threshold, True))).to_numpy()
        self.passing += np.array([(scores >= threshold).sum() for threshold in THRESHOLDS])
        self.num_candidates += len(scores)

    def close(self) -> SourceStats:
        stats = self.stats
        stats.by_drop_reason = _by_count(self.reasons)
        stats.words = spread_of(self.lengths)
        stats.words_histogram = dict(sorted(self.lengths.items()))
        stats.top_words = dict(sorted(self.words.items(), key=lambda item: (-item[1], item[0]))[:NUM_TOP_WORDS])
        if self.num_candidates:
            shares = self.passing / self.num_candidates
            stats.kept_by_threshold = {
                str(threshold): float(share) for threshold, share in zip(THRESHOLDS, shares, strict=True)
            }
        return stats


def _pair_stats(run: RunDir, shards: Iterable[str]) -> tuple[dict[str, SourceStats], int]:
    columns = ["key", "source", "text", "clip_score", "itm_score", "kept", "drop_reason"]
    sums: dict[str, _Sums] = {}
    num_images_kept = 0
    for shard in shards:
        table = read_table(run.read_file("manifest", shard), columns=columns)
        for source in pc.unique(table["source"]).to_pylist():
            sums.setdefault(source, _Sums()).add(table.filter(pc.field("source") == source))
        num_images_kept += pc.count_distinct(table.filter(pc.field("kept"))["key"]).as_py()
    order = {"web": 0, "synthetic": 1}
    return {s: sums[s].close() for s in sorted(sums, key=lambda s: (order.get(s, 2), s))}, num_images_kept


def _words(texts: pa.ChunkedArray) -> pa.ChunkedArray:
    """Lower-cased words of each text: letters, digits and apostrophes; the rest separates."""
    plain = pc.replace_substring_regex(pc.utf8_lower(texts), r"[^\p{L}\p{N}']+", " ")
    trimmed = pc.utf8_trim_whitespace(plain)
    words = pc.utf8_split_whitespace(trimmed)
    # An empty text splits into one empty word.
    return pc.if_else(pc.equal(trimmed, ""), pa.scalar([], type=words.type), words)


def _quarantine_stats(
    run: RunDir, committed: Mapping[str, Iterable[str]], last: LastAttempts
) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {}
    for stage, shards in committed.items():
        reasons: Counter[str] = Counter()
        for shard in shards:
            rows = read_quarantine(run, stage, shard)
            reasons.update(_counts((last.of(shard, rows) if stage == "shards" else rows)["reason"]))
        if reasons:
            found[stage] = _by_count(reasons)
    return found


def _counts(column: pa.ChunkedArray) -> dict:
    """Value → times, nulls left out."""
    return {item["values"]: item["counts"] for item in pc.value_counts(pc.drop_null(column)).to_pylist()}


def _by_count(counter: Mapping[str, int]) -> dict[str, int]:
    return dict(sorted(counter.items(), key=lambda item: (-item[1], item[0])))


def spread_of(counter: Mapping[int, int]) -> Spread | None:
    """Exact figures of whole numbers given as value → times; None of nothing."""
    if not counter:
        return None
    values = np.array(sorted(counter))
    times = np.array([counter[int(value)] for value in values])
    before = np.cumsum(times)
    num = int(before[-1])
    low, high = (values[np.searchsorted(before, rank + 1)] for rank in ((num - 1) // 2, num // 2))
    return Spread(num, int(values[0]), float(low + high) / 2, float((values * times).sum() / num), int(values[-1]))
