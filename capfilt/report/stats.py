"""Statistics of a run, from its Parquet files alone: no image and no model is read.

In: a run. Out: a `RunStats`, plain counts and histograms that become JSON as they are. Every figure is a sum
over shards, taken one shard at a time, so memory grows with the vocabulary alone; medians are exact, because
they come from counts of whole numbers. Stages that have not run yet have no figures.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from capfilt.data.retries import LastAttempts, expected_shards
from capfilt.data.rundir import STAGES, RunDir
from capfilt.data.schemas import SUCCESS
from capfilt.engines.base import SHARDS, Engine
from capfilt.engines.local import LocalEngine
from capfilt.errors import UsageError
from capfilt.progress import Progress
from capfilt.report.shard_stats import (
    CLIP_BINS,
    EDGE_BOUNDS_PX,
    ITM_BINS,
    THRESHOLDS,
    CaptionSums,
    DownloadSums,
    Histogram,
    PairSums,
    ShardSums,
    sum_shard,
)

NUM_TOP_WORDS = 20


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
    expected_by_stage: dict[str, int]
    """Shards there will be: of a download, of those that brought an image at a further attempt too."""
    download: DownloadStats
    diversity: DiversityStats | None
    pairs: dict[str, SourceStats]
    num_images_kept: int
    """Images with at least one kept pair."""
    quarantine: dict[str, dict[str, int]]
    """Stage → reason → rows."""


def compute_stats(run: RunDir, engine: Engine | None = None, progress: Progress | None = None) -> RunStats:
    """Sum up every committed stage of `run`.

    Raises UsageError when the run has no shards yet, CorruptionError when a file that it reads was damaged.
    """
    shards = run.shard_names()
    if not shards:
        raise UsageError(f"No shards in {run.path}/shards. Run `capfilt download TABLE {run.path}` first.")
    committed = {stage: set(run.committed(stage)) & set(shards) for stage in STAGES}
    work = _SumShards(run, LastAttempts(run), committed, len(shards))
    sums = ShardSums()
    for _, found in (engine or LocalEngine()).run(work, shards, progress):
        sums.merge(found)
    order = {"web": 0, "synthetic": 1}
    num_shards, num_annotated = expected_shards(run)
    return RunStats(
        run=str(run.path),
        generation=run.generation,
        shards_by_stage={stage: len(names) for stage, names in committed.items()},
        expected_by_stage={stage: num_shards if stage == "shards" else num_annotated for stage in STAGES},
        download=_download_stats(sums.download),
        diversity=_diversity_stats(sums.captions) if committed["captions"] else None,
        pairs={
            source: _source_stats(sums.pairs[source])
            for source in sorted(sums.pairs, key=lambda source: (order.get(source, 2), source))
        },
        num_images_kept=sums.num_images_kept,
        quarantine={stage: _by_count(sums.quarantine[stage]) for stage in STAGES if stage in sums.quarantine},
    )


@dataclass(frozen=True)
class _SumShards:
    """Sums up shards; other processes get it too."""

    run: RunDir
    last: LastAttempts
    committed: dict[str, set[str]]
    """Stage → shards."""
    total: int
    unit = SHARDS
    is_light, has_models = True, False
    title = "stats"

    def open(self) -> _SumShards:
        return self

    def __call__(self, shard: str, _progress: Progress) -> ShardSums:
        stages = [stage for stage in STAGES if shard in self.committed[stage]]
        return sum_shard(self.run, shard, stages, self.last)


def _download_stats(sums: DownloadSums) -> DownloadStats:
    return DownloadStats(
        num_rows=sums.status.total(),
        num_images=sums.status[SUCCESS],
        by_status=_by_count(sums.status),
        by_reason=_by_count(sums.reason),
        width_px=spread_of(sums.width_px),
        height_px=spread_of(sums.height_px),
        shorter_edge_px=dict(zip(_edge_names(), sums.shorter_edges.tolist(), strict=True)),
    )


def _diversity_stats(sums: CaptionSums) -> DiversityStats:
    num_images = sums.distinct.total()
    num_distinct = sum(value * times for value, times in sums.distinct.items())
    return DiversityStats(
        captions_per_image=sums.num_captions / num_images if num_images else 0.0,
        distinct_per_image=spread_of(sums.distinct),
        distinct_share=num_distinct / sums.num_captions if sums.num_captions else 0.0,
    )


def _source_stats(sums: PairSums) -> SourceStats:
    shares = (sums.num_passing / sums.num_candidates).tolist() if sums.num_candidates else ()
    return SourceStats(
        num_pairs=sums.num_pairs,
        num_kept=sums.num_kept,
        by_drop_reason=_by_count(sums.drop_reasons),
        words=spread_of(sums.lengths),
        words_histogram=dict(sorted(sums.lengths.items())),
        clip_score=sums.clip_score,
        itm_score=sums.itm_score,
        kept_by_threshold=dict(zip(map(str, THRESHOLDS), shares, strict=True)) if shares else {},
        top_words=sums.words.top(NUM_TOP_WORDS),
    )


def _edge_names() -> list[str]:
    bounds = EDGE_BOUNDS_PX
    between = [f"{low}-{high - 1}" for low, high in zip(bounds, bounds[1:], strict=False)]
    return [f"under {bounds[0]}", *between, f"{bounds[-1]} and more"]


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
