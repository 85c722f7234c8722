"""What changed from one run to another: yields, how far distributions moved, which pairs both keep.

In: two runs (or two generations of one). Out: a `Comparison`. Kept pairs are compared shard by shard, in the shards
that both have; a pair is the same where key, URL, source and text are. Distances:

    scores, words   how far a value must be moved on average to turn one distribution into the other (Wasserstein's
                    first), in units of the score, or words
    names           the share of rows that must get another name (total variation), 0 to 1
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
import pyarrow as pa

from capfilt.data.commit import read_table
from capfilt.data.rundir import RunDir
from capfilt.data.texts import clean_for_terminal
from capfilt.engines.base import SHARDS, Engine
from capfilt.engines.local import LocalEngine
from capfilt.progress import Progress
from capfilt.report.histogram import Histogram
from capfilt.report.stats import RunStats, compute_stats
from capfilt.report.stats_view import rule


@dataclass(frozen=True)
class Figure:
    """A figure of both runs; shares are between 0 and 1."""

    name: str
    first: float
    second: float
    is_share: bool


@dataclass(frozen=True)
class Distance:
    """How far a distribution moved."""

    name: str
    value: float
    unit: str
    """Of the value: score, words, or share."""


@dataclass
class KeptSets:
    """Kept pairs and images of the shards that both runs have."""

    num_shards: int = 0
    pairs_of_both: int = 0
    pairs_of_first: int = 0
    """Kept by the first run alone."""
    pairs_of_second: int = 0
    images_of_both: int = 0
    images_of_first: int = 0
    images_of_second: int = 0

    def merge(self, other: KeptSets) -> None:
        """Add other shards'."""
        for entry in fields(self):
            setattr(self, entry.name, getattr(self, entry.name) + getattr(other, entry.name))


@dataclass(frozen=True)
class Comparison:
    """Everything `capfilt stats --compare` shows."""

    first: RunStats
    second: RunStats
    figures: list[Figure]
    distances: list[Distance]
    kept: KeptSets | None
    """None where a run has no manifest, or no shard is in both."""
    num_other_shards: int
    """Shards with a manifest in one of the runs alone."""


def compare_runs(
    first: RunDir, second: RunDir, engine: Engine | None = None, progress: Progress | None = None
) -> Comparison:
    """Compare two runs. Errors as `compute_stats`, of either."""
    one, other = (compute_stats(run, engine, progress) for run in (first, second))
    shards = [set(run.committed("manifest")) for run in (first, second)]
    common = sorted(shards[0] & shards[1])
    kept = KeptSets() if common else None
    for _, found in (engine or LocalEngine()).run(_CompareShards(first, second, len(common)), common, progress):
        assert kept is not None
        kept.merge(found)
    return Comparison(
        one, other, list(_figures(one, other)), list(_distances(one, other)), kept, len(shards[0] ^ shards[1])
    )


@dataclass(frozen=True)
class _CompareShards:
    """Compares what a shard's manifests keep; other processes get it too."""

    first: RunDir
    second: RunDir
    total: int
    unit = SHARDS
    is_light, has_models = True, False
    title = "compare"

    def open(self) -> _CompareShards:
        return self

    def __call__(self, shard: str, _progress: Progress) -> KeptSets:
        first, second = (_kept_pairs(run, shard) for run in (self.first, self.second))
        images = [{pair[:2] for pair in pairs} for pairs in (first, second)]
        return KeptSets(
            1, len(first & second), len(first - second), len(second - first),
            len(images[0] & images[1]), len(images[0] - images[1]), len(images[1] - images[0]),
        )  # fmt: skip


def _kept_pairs(run: RunDir, shard: str) -> set[tuple[str, ...]]:
    names = ["key", "url", "source", "text"]
    table: pa.Table = read_table(run.read_file("manifest", shard), [*names, "kept"])
    kept = table.filter(table["kept"])
    return set(zip(*(kept[name].to_pylist() for name in names), strict=True))


def _figures(first: RunStats, second: RunStats) -> Iterator[Figure]:
    def figure(name: str, values: Sequence[float], *, is_share: bool = False) -> Figure:
        return Figure(name, values[0], values[1], is_share)

    both = (first, second)
    yield figure("URLs", [one.download.num_rows for one in both])
    yield figure("images", [one.download.num_images for one in both])
    yield figure("yield", [_share(one.download.num_images, one.download.num_rows) for one in both], is_share=True)
    for source in _sources(first, second):
        pairs = [one.pairs.get(source) for one in both]
        yield figure(f"{source} pairs", [one.num_pairs if one else 0 for one in pairs])
        yield figure(f"{source} kept", [one.num_kept if one else 0 for one in pairs])
        rates = [_share(one.num_kept, one.num_pairs) for one in pairs if one]
        if len(rates) == len(both):
            yield figure(f"{source} kept rate", rates, is_share=True)
    if all(one.pairs for one in both):
        yield figure("images kept", [one.num_images_kept for one in both])
    tops = [one.top_caption for one in both]
    if all(one.num_images for one in tops):
        shares = [_share(one.num_synthetic, one.num_images) for one in tops]
        yield figure("best caption synthetic", shares, is_share=True)
    samples = [one.diversity.of_sample for one in both if one.diversity and one.diversity.of_sample]
    if len(samples) == len(both):
        for name in ("distinct_1", "distinct_2", "self_bleu"):
            yield figure(name.replace("_", "-"), [getattr(one, name) for one in samples], is_share=True)


def _distances(first: RunStats, second: RunStats) -> Iterator[Distance]:
    for source in (name for name in first.pairs if name in second.pairs):
        one, other = first.pairs[source], second.pairs[source]
        for name in ("clip_score", "itm_score"):
            histograms: list[Histogram] = [getattr(pairs, name) for pairs in (one, other)]
            if all(sum(histogram.counts) for histogram in histograms):
                width = histograms[0].bounds[1] - histograms[0].bounds[0]
                value = moved(*(histogram.counts for histogram in histograms)) * width
                yield Distance(f"{source} {name.replace('_', ' ')}", value, "score")
        if one.words_histogram and other.words_histogram:
            longest = max(*one.words_histogram, *other.words_histogram)
            counts = [[pairs.words_histogram.get(n, 0) for n in range(longest + 1)] for pairs in (one, other)]
            yield Distance(f"{source} caption length", moved(*counts), "words")
        yield from _renaming(f"{source} drop reasons", one.by_drop_reason, other.by_drop_reason)
    for name, pick in (
        ("failures by reason", "by_reason"), ("formats", "by_format"), ("shorter edges", "shorter_edge_px"),
        ("shapes", "aspect"),
    ):  # fmt: skip
        yield from _renaming(name, getattr(first.download, pick), getattr(second.download, pick))


def _renaming(name: str, first: Mapping[str, int], second: Mapping[str, int]) -> Iterator[Distance]:
    """The distance, unless one of them alone has nothing to be compared."""
    if any(first.values()) == any(second.values()):
        yield Distance(name, renamed(first, second), "share")


def moved(first: Sequence[int], second: Sequence[int]) -> float:
    """Mean distance in bins from one histogram to another with the same bins; neither is empty."""
    shares = [np.cumsum(counts) / np.sum(counts) for counts in (first, second)]
    return float(np.abs(shares[0] - shares[1]).sum())


def renamed(first: Mapping[str, int], second: Mapping[str, int]) -> float:
    """Share of one that must get other names to be as the other; 0 where both are empty, 1 where one is."""
    totals = [sum(counts.values()) for counts in (first, second)]
    if not all(totals):
        return float(any(totals))
    names = {*first, *second}
    return sum(abs(first.get(name, 0) / totals[0] - second.get(name, 0) / totals[1]) for name in names) / 2


def comparison_lines(found: Comparison, *, plain: bool = False) -> Iterator[str]:
    """The comparison as lines of text, at most 80 columns where names are short."""
    names = [_name_of(stats) for stats in (found.first, found.second)]
    yield rule("From one run to the other", plain=plain)
    for letter, name in zip("AB", names, strict=True):
        yield f"  {letter}  {name}"
    yield ""
    yield f"  {'':<24} {'A':>14} {'B':>14} {'change':>14}"
    for one in found.figures:
        if one.is_share:
            cells = f"{one.first:>14.1%} {one.second:>14.1%} {(one.second - one.first) * 100:>+7.1f} points"
        else:
            cells = f"{one.first:>14,.0f} {one.second:>14,.0f} {one.second - one.first:>+14,.0f}"
        yield f"  {one.name:<24} {cells}"
    yield ""
    yield rule("How far distributions moved", plain=plain)
    for distance in found.distances:
        value = f"{distance.value:>14.1%}" if distance.unit == "share" else f"{distance.value:>14.3f}"
        unit = "with another name" if distance.unit == "share" else f"{distance.unit} on average"
        yield f"  {clean_for_terminal(distance.name):<24} {value} {unit}"
    yield ""
    yield rule("What is kept", plain=plain)
    if found.kept is None:
        yield "  No shard has a manifest in both runs."
        return
    kept = found.kept
    yield f"  {'':<24} {'both':>14} {'A alone':>14} {'B alone':>14}"
    for name in ("pairs", "images"):
        counts = [getattr(kept, f"{name}_of_{which}") for which in ("both", "first", "second")]
        yield f"  {name:<24} " + " ".join(f"{number:>14,}" for number in counts)
    if found.num_other_shards:
        yield f"  {found.num_other_shards:,} shards with a manifest are in one of them alone and were left out."
    if not kept.images_of_both:
        yield "  They share no image: key and URL of none agree. Runs of other tables cannot be compared so."


def _name_of(stats: RunStats) -> str:
    generation = f", generation {stats.generation}" if stats.generation else ""
    return clean_for_terminal(stats.run) + clean_for_terminal(generation)


def _sources(first: RunStats, second: RunStats) -> list[str]:
    """Of either, where both have pairs."""
    return list(first.pairs | second.pairs) if first.pairs and second.pairs else []


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0
