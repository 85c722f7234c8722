"""The statistics of a run as lines of text: ruled sections, tables and bars, at most 100 columns.

In: a `RunStats`. Out: lines. Words come from the web and are cleaned here; everything else is our own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from capfilt.data.reasons import DROP_REASON_SENTENCES, REASON_SENTENCES
from capfilt.data.rundir import STAGES
from capfilt.data.texts import clean_for_terminal
from capfilt.progress import bar, counted
from capfilt.report.stats import Histogram, RunStats, SourceStats, Spread

RULE_WIDTH = 78
BAR_WIDTH = 30
MAX_ROWS = 16


def stats_lines(stats: RunStats, *, plain: bool = False) -> Iterator[str]:
    """The whole view, section after section; `plain` keeps to ASCII."""
    yield from _run_lines(stats, plain)
    yield from _download_lines(stats, plain)
    if stats.pairs:
        yield from _pair_lines(stats, plain)
        yield from _caption_lines(stats, plain)
        yield from _score_lines(stats, plain)
        yield from _threshold_lines(stats, plain)
        yield from _word_lines(stats, plain)
    elif stats.diversity:
        yield from _caption_lines(stats, plain)
    yield from _quarantine_lines(stats, plain)


def rule(title: str, *, plain: bool = False) -> str:
    """A section's heading: the title, then a line to the right edge."""
    return f"{title} ".ljust(RULE_WIDTH, "-" if plain else "─")


def table_lines(rows: Iterable[tuple[str, int]], total: int, *, plain: bool) -> Iterator[str]:
    """Name, count, share and bar of each row."""
    listed = list(rows)
    width = max((len(name) for name, _ in listed), default=0)
    for name, number in listed:
        share = number / total if total else 0.0
        yield f"  {name:<{width}}  {number:>11,}  {share:6.1%}  {_drawn(share, BAR_WIDTH, plain)}".rstrip()


def _drawn(share: float, width: int, plain: bool) -> str:
    """A bar without its empty cells."""
    return bar(share, width, plain=plain).rstrip(" ·.")


def _run_lines(stats: RunStats, plain: bool) -> Iterator[str]:
    generation = f", generation {stats.generation}" if stats.generation else ""
    yield rule(f"Run {clean_for_terminal(stats.run)}{generation}", plain=plain)
    for stage in STAGES:
        done, expected = stats.shards_by_stage[stage], stats.expected_by_stage[stage]
        state = "" if done == expected else "  (not complete)" if done else "  (not begun)"
        yield f"  {stage:<9} {done:>6,} of {counted(expected, 'shard')}{state}"


def _download_lines(stats: RunStats, plain: bool) -> Iterator[str]:
    found = stats.download
    yield ""
    yield rule("Download", plain=plain)
    yield from table_lines([("rows", found.num_rows), ("images", found.num_images)], found.num_rows, plain=plain)
    if found.by_reason:
        yield ""
        yield "  rows without an image, by reason"
        for name, number in found.by_reason.items():
            sentence = REASON_SENTENCES.get(name, "")
            yield f"  {name:<20} {number:>9,}  {number / found.num_rows:6.1%}  {sentence}"
    if found.width_px and found.height_px:
        yield ""
        yield f"  width {_spread(found.width_px, 'px')};  height {_spread(found.height_px, 'px')}"
        edges = [(name, number) for name, number in found.shorter_edge_px.items() if number]
        yield "  shorter edge in pixels"
        yield from table_lines(edges, found.num_images, plain=plain)


def _spread(spread: Spread, unit: str) -> str:
    return f"{spread.least:,} to {spread.most:,} {unit}, median {spread.median:,.0f}"


def _pair_lines(stats: RunStats, plain: bool) -> Iterator[str]:
    yield ""
    yield rule("Pairs", plain=plain)
    yield f"  {'source':<10} {'pairs':>10} {'kept':>10} {'share':>7}   dropped"
    for source, found in stats.pairs.items():
        share = found.num_kept / found.num_pairs if found.num_pairs else 0.0
        dropped = ", ".join(f"{name} {number:,}" for name, number in found.by_drop_reason.items())
        yield f"  {source:<10} {found.num_pairs:>10,} {found.num_kept:>10,} {share:>7.1%}   {dropped}"
    images = stats.download.num_images
    share = stats.num_images_kept / images if images else 0.0
    yield f"  {stats.num_images_kept:,} of {images:,} images ({share:.1%}) have at least one kept pair"
    named = sorted({name for found in stats.pairs.values() for name in found.by_drop_reason})
    for name in named:
        yield f"    {name:<10} {DROP_REASON_SENTENCES.get(name, '')}"


def _caption_lines(stats: RunStats, plain: bool) -> Iterator[str]:
    yield ""
    yield rule("Captions", plain=plain)
    for source, found in stats.pairs.items():
        if found.words:
            yield f"  {source:<10} {_spread(found.words, 'words')}, mean {found.words.mean:.1f}"
    different = stats.diversity
    if different and different.distinct_per_image:
        yield (
            f"  synthetic  {different.captions_per_image:.1f} captions an image, "
            f"median {different.distinct_per_image.median:.0f} distinct, "
            f"{different.distinct_share:.1%} distinct in all"
        )


def _score_lines(stats: RunStats, plain: bool) -> Iterator[str]:
    for title, pick in (("CLIP score", _clip), ("ITM score", _itm)):
        histograms = {source: pick(found) for source, found in stats.pairs.items() if sum(pick(found).counts)}
        if histograms:
            yield ""
            yield rule(title, plain=plain)
            yield from _histogram_lines(histograms, plain)


def _clip(found: SourceStats) -> Histogram:
    return found.clip_score


def _itm(found: SourceStats) -> Histogram:
    return found.itm_score


def _histogram_lines(histograms: Mapping[str, Histogram], plain: bool) -> Iterator[str]:
    """The histograms side by side, from the first to the last bin that has anything, in MAX_ROWS at most."""
    bounds = next(iter(histograms.values())).bounds
    filled = [i for i in range(len(bounds) - 1) if any(h.counts[i] for h in histograms.values())]
    step = -(-(filled[-1] + 1 - filled[0]) // MAX_ROWS)
    starts = range(filled[0], filled[-1] + 1, step)
    merged = {source: [sum(h.counts[i : i + step]) for i in starts] for source, h in histograms.items()}
    yield " " * 16 + "".join(f"{source:<{BAR_WIDTH + 8}}" for source in histograms).rstrip()
    for row, start in enumerate(starts):
        cells = []
        for counts in merged.values():
            drawn = _drawn(counts[row] / max(1, *counts), BAR_WIDTH - 6, plain)
            cells.append(f"{counts[row]:>9,} {drawn:<{BAR_WIDTH - 2}}")
        end = bounds[min(start + step, len(bounds) - 1)]
        yield f"  {bounds[start]:>5.2f} to{end:>5.2f}  {''.join(cells)}".rstrip()


def _threshold_lines(stats: RunStats, plain: bool) -> Iterator[str]:
    curves = {source: found.kept_by_threshold for source, found in stats.pairs.items() if found.kept_by_threshold}
    if not curves:
        return
    yield ""
    yield rule("Kept rate against the ITM threshold, of the pairs that nothing else drops", plain=plain)
    yield "  threshold   " + "".join(f"{source:<{BAR_WIDTH + 8}}" for source in curves).rstrip()
    for threshold in next(iter(curves.values())):
        cells = []
        for curve in curves.values():
            drawn = _drawn(curve[threshold], BAR_WIDTH - 6, plain)
            cells.append(f"{curve[threshold]:>6.1%} {drawn:<{BAR_WIDTH + 1}}")
        yield f"  {float(threshold):>9.2f}   {''.join(cells)}".rstrip()


def _word_lines(stats: RunStats, plain: bool) -> Iterator[str]:
    for source, found in stats.pairs.items():
        if not found.top_words:
            continue
        yield ""
        yield rule(f"Top words of the kept {source} captions", plain=plain)
        words = [f"{clean_for_terminal(word, 24)} {number:,}" for word, number in found.top_words.items()]
        yield from _wrapped(words)


def _wrapped(items: Iterable[str]) -> Iterator[str]:
    line = ""
    for item in items:
        if line and len(line) + len(item) + 3 > RULE_WIDTH:
            yield "  " + line.rstrip()
            line = ""
        line += f"{item}   "
    if line:
        yield "  " + line.rstrip()


def _quarantine_lines(stats: RunStats, plain: bool) -> Iterator[str]:
    later = {stage: reasons for stage, reasons in stats.quarantine.items() if stage != "shards"}
    if not later:
        return
    yield ""
    yield rule("Quarantine after the download", plain=plain)
    for stage, reasons in later.items():
        for name, number in reasons.items():
            yield f"  {stage:<9} {name:<18} {number:>9,}  {REASON_SENTENCES.get(name, '')}"
