"""The statistics of a run as lines of text: ruled sections, tables and bars, at most 100 columns.

In: a `RunStats`. Out: lines. Words come from the web and are cleaned here; everything else is our own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from capfilt.data.reasons import DROP_REASON_SENTENCES, REASON_SENTENCES
from capfilt.data.texts import clean_for_terminal
from capfilt.progress import bar, counted, format_bytes
from capfilt.report.histogram import Histogram, Spread
from capfilt.report.stats import RunStats, SourceStats

SHOWN_THRESHOLDS = ("0.0", "0.1", "0.2", "0.3", "0.4", "0.5", "0.6", "0.7", "0.8", "0.9", "0.95", "0.99")
"""Thresholds of the table, beside the chosen one, which is marked."""
RULE_WIDTH = 78
BAR_WIDTH = 30
MAX_ROWS = 16


def stats_lines(stats: RunStats, sections: Sequence[str] = (), *, plain: bool = False) -> Iterator[str]:
    """Sections by their names in SECTIONS, all unless some are asked for; `plain` keeps to ASCII."""
    is_first = True
    for name, lines_of in SECTIONS.items():
        if not sections or name in sections:
            for line in lines_of(stats, plain):
                if line or not is_first:
                    yield line
                is_first = False


def rule(title: str, *, plain: bool = False) -> str:
    """A section's heading: the title, then a line to the right edge."""
    return f"{title} ".ljust(RULE_WIDTH, "-" if plain else "─")


def table_lines(rows: Iterable[tuple[str, int]], total: int, *, plain: bool) -> Iterator[str]:
    """Name, count, share and bar of each row."""
    listed = [(clean_for_terminal(name, 40), number) for name, number in rows]
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
    for stage in stats.shards_by_stage:
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
            yield f"  {clean_for_terminal(name, 40):<20} {number:>9,}  {number / found.num_rows:6.1%}  {sentence}"
    if found.width_px and found.height_px:
        yield ""
        yield f"  width {_spread(found.width_px, 'px')};  height {_spread(found.height_px, 'px')}"
        edges = [(name, number) for name, number in found.shorter_edge_px.items() if number]
        yield "  shorter edge in pixels"
        yield from table_lines(edges, found.num_images, plain=plain)
        yield "  width to height"
        shapes = [(name, number) for name, number in found.aspect.items() if number]
        yield from table_lines(shapes, found.num_images, plain=plain)
        yield "  format"
        yield from table_lines(found.by_format.items(), found.num_images, plain=plain)


def _spread(spread: Spread, unit: str) -> str:
    return f"{spread.least:,} to {spread.most:,} {unit}, median {spread.median:,.0f}"


def _host_lines(stats: RunStats, plain: bool) -> Iterator[str]:
    if not stats.download.worst_hosts:
        return
    yield ""
    yield rule(f"Hosts with most failures, of {stats.download.num_hosts:,}", plain=plain)
    for one in stats.download.worst_hosts:
        listed = list(one.by_reason.items())[:3]
        reasons = ", ".join(f"{clean_for_terminal(name, 40)} {number:,}" for name, number in listed)
        host = clean_for_terminal(one.host, 30)
        counts = f"{one.num_failed:>8,} of {one.num_rows:>8,}  {one.num_failed / one.num_rows:6.1%}"
        yield f"  {host:<30} {counts}  {reasons}"


def _shard_lines(stats: RunStats, plain: bool) -> Iterator[str]:
    found = stats.shards
    if found.images is None or found.tar_bytes is None:
        return
    yield ""
    yield rule("Shards", plain=plain)
    yield f"  images {_spread(found.images, 'a shard')}, mean {found.images.mean:,.1f}"
    least, most, median = (format_bytes(getattr(found.tar_bytes, name)) for name in ("least", "most", "median"))
    yield f"  size {least} to {most}, median {median}; {format_bytes(found.tar_bytes.mean * found.num_shards)} in all"
    if found.outliers:
        yield f"  {counted(found.num_outliers, 'shard')} with under half or over twice the median of either:"
        for one in found.outliers:
            yield f"  {clean_for_terminal(one.shard):<12} {one.num_images:>9,} images  {format_bytes(one.num_bytes):>8}"


def _pair_lines(stats: RunStats, plain: bool) -> Iterator[str]:
    if not stats.has_manifest:
        return
    yield ""
    yield rule("Pairs", plain=plain)
    yield f"  {'source':<10} {'pairs':>10} {'kept':>10} {'share':>7}   dropped"
    for source, found in stats.pairs.items():
        share = found.num_kept / found.num_pairs if found.num_pairs else 0.0
        reasons = found.by_drop_reason.items()
        dropped = ", ".join(f"{clean_for_terminal(name, 40)} {number:,}" for name, number in reasons)
        yield f"  {source:<10} {found.num_pairs:>10,} {found.num_kept:>10,} {share:>7.1%}   {dropped}"
    images = stats.num_images_judged
    share = stats.num_images_kept / images if images else 0.0
    yield f"  {stats.num_images_kept:,} of {images:,} images ({share:.1%}) have at least one kept pair"
    named = sorted({name for found in stats.pairs.values() for name in found.by_drop_reason})
    for name in named:
        yield f"    {name:<10} {DROP_REASON_SENTENCES.get(name, '')}"


def _caption_lines(stats: RunStats, plain: bool) -> Iterator[str]:
    if not stats.pairs and not stats.diversity:
        return
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
        if different.of_sample:
            yield (
                f"  synthetic  distinct-1 {different.of_sample.distinct_1:.3f}, distinct-2 "
                f"{different.of_sample.distinct_2:.3f}, self-BLEU {different.of_sample.self_bleu:.3f} "
                f"(of {different.of_sample.num_images:,} images)"
            )
    top = stats.top_caption
    if top.num_images:
        yield (
            f"  CLIP likes a synthetic caption best in {top.num_synthetic:,} of {top.num_images:,} images "
            f"({top.num_synthetic / top.num_images:.1%})"
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
    rates = {float(name): [curve[name] for curve in curves.values()] for name in SHOWN_THRESHOLDS}
    if stats.threshold is not None:
        rates[stats.threshold] = [stats.pairs[source].kept_at or 0.0 for source in curves]
    for threshold, own in sorted(rates.items()):
        cells = "".join(f"{rate:>6.1%} {_drawn(rate, BAR_WIDTH - 6, plain):<{BAR_WIDTH + 1}}" for rate in own)
        mark = ">" if threshold == stats.threshold else " "
        shown = f"{threshold:.2f}" if round(threshold, 2) == threshold else f"{threshold:g}"
        yield f" {mark}{shown:>9}   {cells}".rstrip()


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


def _time_lines(stats: RunStats, plain: bool) -> Iterator[str]:
    if not stats.times:
        return
    yield ""
    yield rule("Time of models and downloads, of all workers together", plain=plain)
    for stage, found in stats.times.items():
        unit = "rows" if stage == "shards" else "images"
        yield f"  {stage:<9} {found.num:>11,} {unit:<6} {found.seconds:>11,.1f} s  {found.per_second:>9,.1f} a second"


def _quarantine_lines(stats: RunStats, plain: bool) -> Iterator[str]:
    later = {stage: reasons for stage, reasons in stats.quarantine.items() if stage != "shards"}
    if not later:
        return
    yield ""
    yield rule("Quarantine after the download", plain=plain)
    for stage, reasons in later.items():
        for name, number in reasons.items():
            yield f"  {stage:<9} {name:<18} {number:>9,}  {REASON_SENTENCES.get(name, '')}"


SECTIONS: dict[str, Callable[[RunStats, bool], Iterator[str]]] = {
    "run": _run_lines, "shards": _shard_lines, "download": _download_lines, "hosts": _host_lines, "pairs": _pair_lines,
    "captions": _caption_lines, "scores": _score_lines, "threshold": _threshold_lines, "words": _word_lines,
    "quarantine": _quarantine_lines, "time": _time_lines,
}  # fmt: skip
"""Name → lines; a section that has nothing to say gives none."""
