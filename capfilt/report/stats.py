"""Statistics of a run, from its Parquet files alone: no image and no model is read.

In: a run. Out: a `RunStats`, plain counts and histograms that become JSON as they are. Every figure is a sum
over shards, taken one shard at a time, so memory grows with the vocabulary and the number of hosts alone; medians are
exact, because they come from counts of whole numbers. How much captions differ is measured on a sample of the images.
Stages that have not run yet have no figures.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from capfilt.data.retries import LastAttempts, expected_shards, retry_shards
from capfilt.data.rundir import STAGES, RunDir
from capfilt.data.schemas import SUCCESS
from capfilt.data.timings import read_timings
from capfilt.engines.base import SHARDS, Engine
from capfilt.engines.local import LocalEngine
from capfilt.errors import UsageError
from capfilt.progress import Progress
from capfilt.report.diversity import Diversity, diversity_of
from capfilt.report.download_sums import ASPECT_NAMES, EDGE_BOUNDS_PX, DownloadSums
from capfilt.report.histogram import Histogram, Spread, by_count, spread_of
from capfilt.report.pair_sums import CLIP_BINS, ITM_BINS, THRESHOLDS, CaptionSums, PairSums
from capfilt.report.shard_stats import Asked, ShardSize, ShardSums, sum_shard

NUM_TOP_WORDS, NUM_WORST_HOSTS, NUM_OUTLIERS = 20, 20, 20
NUM_SAMPLED_IMAGES = 300
"""Images whose captions are compared; at least one of each shard."""
LONGEST_WORDS = 60
"""From which on captions of any number of words are shown together."""
MOST_OF_MEDIAN, LEAST_OF_MEDIAN = 2.0, 0.5
"""A shard with more or fewer images, or bytes, than that many medians stands out."""


@dataclass
class ShardsStats:
    """Sizes of the shards; those of further attempts, small by nature, apart."""

    num_shards: int = 0
    images: Spread | None = None
    tar_bytes: Spread | None = None
    outliers: list[ShardSize] = field(default_factory=list)
    """Shards far from the median, the farthest first."""
    num_outliers: int = 0


@dataclass
class HostStats:
    """Rows of one host."""

    host: str
    num_rows: int
    num_failed: int
    by_reason: dict[str, int]


@dataclass
class DownloadStats:
    """What became of the rows of the URL table (or of the imported samples), in the last attempt of each."""

    num_rows: int = 0
    num_images: int = 0
    by_status: dict[str, int] = field(default_factory=dict)
    by_reason: dict[str, int] = field(default_factory=dict)
    num_hosts: int = 0
    worst_hosts: list[HostStats] = field(default_factory=list)
    """Hosts with most failures."""
    by_format: dict[str, int] = field(default_factory=dict)
    width_px: Spread | None = None
    height_px: Spread | None = None
    shorter_edge_px: dict[str, int] = field(default_factory=dict)
    aspect: dict[str, int] = field(default_factory=dict)
    """Width over height → images."""


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
    kept_at: float | None = None
    """The share of them that the chosen threshold keeps."""
    num_words: int = 0
    """Different words of the kept captions."""
    top_words: dict[str, int] = field(default_factory=dict)
    """Most frequent words of the kept captions → captions that have them."""

    def lengths(self, longest: int) -> list[int]:
        """Captions of 0, 1, … words; the last number is of `longest` words and more."""
        counts = [self.words_histogram.get(number, 0) for number in range(longest + 1)]
        counts[-1] += sum(times for number, times in self.words_histogram.items() if number > longest)
        return counts


@dataclass
class DiversityStats:
    """How much the synthetic captions of an image differ."""

    captions_per_image: float = 0.0
    distinct_per_image: Spread | None = None
    distinct_share: float = 0.0
    """Distinct captions over all captions, image by image."""
    of_sample: Diversity | None = None
    """Distinct-n and self-BLEU, of a sample of the images."""


@dataclass
class TopCaptionStats:
    """Which caption of an image CLIP likes best."""

    num_images: int = 0
    """Images whose web caption and a synthetic one have scores."""
    num_synthetic: int = 0
    """Of them, those where a synthetic one is the best."""


@dataclass
class TimeStats:
    """How long a stage took, as far as commands wrote it down."""

    num: int
    """Images, or rows of the URL table."""
    seconds: float
    """That its model, or its servers, worked on them, in all workers together."""
    per_second: float


@dataclass
class RunStats:
    """Everything `capfilt stats` shows; a folder of tars that is no run has the stage `shards` alone."""

    run: str
    generation: str | None
    shards_by_stage: dict[str, int]
    expected_by_stage: dict[str, int]
    """Shards there will be: of a download, of those that brought an image at a further attempt too."""
    shards: ShardsStats
    download: DownloadStats
    diversity: DiversityStats | None
    pairs: dict[str, SourceStats]
    num_images_judged: int
    """Images of the manifests there are."""
    num_images_kept: int
    """Images with at least one kept pair."""
    top_caption: TopCaptionStats
    selections: list[dict[str, Any]]
    """Threshold, captions kept, and so on, of the manifest; several where it is not of one choice."""
    quarantine: dict[str, dict[str, int]]
    """Stage → reason → rows."""
    times: dict[str, TimeStats] = field(default_factory=dict)
    """By stage."""

    @property
    def threshold(self) -> float | None:
        """Of the choice, where it is one."""
        found = {one["threshold"] for one in self.selections if isinstance(one.get("threshold"), int | float)}
        return float(found.pop()) if len(found) == 1 else None

    @property
    def has_manifest(self) -> bool:
        """Whether pairs were chosen; the pairs of a folder of tars are what there is."""
        return bool(self.shards_by_stage.get("manifest"))


def compute_stats(run: RunDir, engine: Engine | None = None, progress: Progress | None = None) -> RunStats:
    """Sum up every committed stage of `run`.

    Raises UsageError when the run has no shards yet, CorruptionError when a file that it reads was damaged.
    """
    shards = run.shard_names()
    if not shards:
        raise UsageError(f"No shards in {run.path}/shards. Run `capfilt download TABLE {run.path}` first.")
    committed = {stage: set(run.committed(stage)) & set(shards) for stage in STAGES}
    asked = Asked(run, LastAttempts(run), -(-NUM_SAMPLED_IMAGES // len(shards)))
    work = _SumShards(asked, committed, len(shards))
    sums = ShardSums()
    for _, found in (engine or LocalEngine()).run(work, shards, progress):
        sums.merge(found)
    again = set(retry_shards(run))
    num_shards, num_annotated = expected_shards(run)
    sums.sizes = [one for one in sums.sizes if one.shard not in again]
    found = stats_of(sums, name=str(run.path), num_shards=num_shards)
    found.generation = run.generation
    found.times = _times(run)
    # people's captions make a manifest without the stages between
    stages = [stage for stage in STAGES if committed[stage] or not committed["manifest"]]
    found.shards_by_stage = {stage: len(committed[stage]) for stage in stages}
    found.expected_by_stage = {stage: num_shards if stage == "shards" else num_annotated for stage in stages}
    return found


def _times(run: RunDir) -> dict[str, TimeStats]:
    """Sums of what the commands noted, in the order of the stages."""
    nums, seconds = Counter[str](), defaultdict[str, float](float)
    for timing in read_timings(run):
        for stage, (num, own) in timing.stages.items():
            nums[stage] += num
            seconds[stage] += own
    return {
        stage: TimeStats(nums[stage], seconds[stage], nums[stage] / seconds[stage])
        for stage in STAGES if seconds[stage] > 0
    }  # fmt: skip


def stats_of(sums: ShardSums, *, name: str, num_shards: int) -> RunStats:
    """The figures of summed up shards, as those of a folder that has nothing but shards."""
    order = {"web": 0, "synthetic": 1}
    return RunStats(
        run=name,
        generation=None,
        shards_by_stage={"shards": num_shards},
        expected_by_stage={"shards": num_shards},
        shards=_shards_stats(sums.sizes),
        download=_download_stats(sums.download),
        diversity=_diversity_stats(sums.captions) if sums.captions.num_captions else None,
        pairs={
            source: _source_stats(sums.pairs[source])
            for source in sorted(sums.pairs, key=lambda source: (order.get(source, 2), source))
        },
        num_images_judged=sums.images.num_images,
        num_images_kept=sums.images.num_kept,
        top_caption=TopCaptionStats(sums.images.num_compared, sums.images.num_synthetic_first),
        selections=sums.selections,
        quarantine={stage: by_count(sums.quarantine[stage]) for stage in STAGES if stage in sums.quarantine},
    )


@dataclass(frozen=True)
class _SumShards:
    """Sums up shards; other processes get it too."""

    asked: Asked
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
        return sum_shard(self.asked, shard, stages)


def _shards_stats(sizes: Sequence[ShardSize]) -> ShardsStats:
    images, tar_bytes = (
        spread_of(Counter(getattr(one, name) for one in sizes)) for name in ("num_images", "num_bytes")
    )
    if images is None or tar_bytes is None:
        return ShardsStats()

    def distance(one: ShardSize) -> float:
        """The larger of its two ratios to the median, upside down where it is below one.

        With one more on both sides: of shards of a few images none stands out for one or two.
        """
        ratios = [(one.num_images + 1) / (images.median + 1), (one.num_bytes + 1) / (tar_bytes.median + 1)]
        return max(max(ratio / MOST_OF_MEDIAN, LEAST_OF_MEDIAN / ratio) for ratio in ratios)

    outliers = sorted((one for one in sizes if distance(one) > 1), key=lambda one: (-distance(one), one.shard))
    return ShardsStats(len(sizes), images, tar_bytes, outliers[:NUM_OUTLIERS], len(outliers))


def _download_stats(sums: DownloadSums) -> DownloadStats:
    return DownloadStats(
        num_rows=sums.status.total(),
        num_images=sums.status[SUCCESS],
        by_status=by_count(sums.status),
        by_reason=by_count(sums.reason),
        num_hosts=sums.hosts.num_hosts(),
        worst_hosts=[
            HostStats(host, num_rows, sum(reasons.values()), reasons)
            for host, num_rows, reasons in sums.hosts.worst(NUM_WORST_HOSTS)
        ],
        by_format=by_count(sums.formats),
        width_px=spread_of(sums.width_px),
        height_px=spread_of(sums.height_px),
        shorter_edge_px=dict(zip(_edge_names(), sums.shorter_edges.tolist(), strict=True)),
        aspect=dict(zip(ASPECT_NAMES, sums.aspects.tolist(), strict=True)),
    )


def _diversity_stats(sums: CaptionSums) -> DiversityStats:
    num_images = sums.distinct.total()
    num_distinct = sum(value * times for value, times in sums.distinct.items())
    return DiversityStats(
        captions_per_image=sums.num_captions / num_images if num_images else 0.0,
        distinct_per_image=spread_of(sums.distinct),
        distinct_share=num_distinct / sums.num_captions if sums.num_captions else 0.0,
        of_sample=diversity_of(sums.sample),
    )


def _source_stats(sums: PairSums) -> SourceStats:
    shares = (sums.num_passing / sums.num_candidates).tolist() if sums.num_candidates else ()
    return SourceStats(
        num_pairs=sums.num_pairs,
        num_kept=sums.num_kept,
        by_drop_reason=by_count(sums.drop_reasons),
        words=spread_of(sums.lengths),
        words_histogram=dict(sorted(sums.lengths.items())),
        clip_score=sums.clip_score,
        itm_score=sums.itm_score,
        kept_by_threshold=dict(zip(map(str, THRESHOLDS), shares, strict=True)) if shares else {},
        kept_at=sums.num_chosen / sums.num_candidates if sums.num_candidates else None,
        num_words=sums.words.num_words(),
        top_words=sums.words.top(NUM_TOP_WORDS),
    )


def _edge_names() -> list[str]:
    bounds = EDGE_BOUNDS_PX
    between = [f"{low}-{high - 1}" for low, high in zip(bounds, bounds[1:], strict=False)]
    return [f"under {bounds[0]}", *between, f"{bounds[-1]} and more"]
