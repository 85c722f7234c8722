"""The statistics of a run on one screen: sections of a few lines, in two columns where there is room.

In: a `RunStats`. Out: a renderable of rich, which wraps, colours and leaves colours out as the terminal asks. Words,
hosts and names come from the web and are cleaned here; `stats_view` has every section in full.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator
from itertools import islice

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from capfilt.data.texts import clean_for_terminal
from capfilt.progress import bar, counted, format_bytes, format_rate, format_seconds
from capfilt.report.histogram import Spread
from capfilt.report.sparks import fitted, mark_at, resampled, sparks
from capfilt.report.stats import LONGEST_WORDS, RunStats

TWO_COLUMNS = 116
"""Columns of the terminal from which on the sections stand side by side."""
_MARGIN, _LABEL = 2, 15
_LONGEST_SPARKS = 44
_PICTURE_COLUMNS = 132
_SOURCE_STYLES = {"web": "cyan", "synthetic": "magenta"}
_DIM, _GOOD, _BAD = "dim", "green", "yellow"

Section = tuple[str, list[Text]]


def dashboard(stats: RunStats, width: int, *, plain: bool = False) -> RenderableType:
    """The screen, for a terminal of `width` columns; `plain` keeps to ASCII."""
    is_wide = width >= TWO_COLUMNS
    room = (width // 2 - 2 if is_wide else width) - _MARGIN
    draw = _Drawer(stats, max(room, 20), plain=plain)
    left = [
        ("Run", draw.run()), ("Shards", draw.shards()), ("Download", draw.download()), ("Images", draw.images()),
        ("Time", draw.times()),
    ]  # fmt: skip
    right = [("Captions", draw.captions()), ("Scores", draw.scores()), ("Pairs", draw.pairs())]
    if not is_wide:
        return Group(*_drawn([*left, *right]))
    grid = Table.grid(padding=(0, 2), expand=False)
    grid.add_column(width=room + _MARGIN)
    grid.add_column(width=room + _MARGIN)
    grid.add_row(Group(*_drawn(left)), Group(*_drawn(right)))
    return grid


def dashboard_lines(stats: RunStats, width: int, *, plain: bool = False) -> list[str]:
    """The same as lines of text without colours."""
    console = Console(width=width, file=io.StringIO(), color_system=None, markup=False, emoji=False, highlight=False)
    with console.capture() as capture:
        console.print(dashboard(stats, width, plain=plain))
    return [line.rstrip() for line in capture.get().splitlines()]


def dashboard_svg(stats: RunStats) -> str:
    """The same as a picture of a terminal, SVG that loads nothing: it names fonts that readers have."""
    console = Console(
        width=_PICTURE_COLUMNS, file=io.StringIO(), record=True, force_terminal=True, color_system="truecolor",
        markup=False, emoji=False, highlight=False,
    )  # fmt: skip
    console.print(dashboard(stats, _PICTURE_COLUMNS))
    drawn = console.export_svg(title=f"capfilt stats {clean_for_terminal(stats.run)}", unique_id="capfilt")
    return re.sub(r"@font-face\s*\{[^}]*\}", "", drawn)


def _drawn(sections: Iterable[Section]) -> Iterator[RenderableType]:
    for title, lines in sections:
        if lines:
            yield Text(title, style="bold")
            for line in lines:
                yield Padding(line, (0, 0, 0, _MARGIN), expand=False)


class _Drawer:
    """The lines of each section; none where there is nothing to say yet."""

    def __init__(self, stats: RunStats, room: int, *, plain: bool) -> None:
        self._stats, self._plain = stats, plain
        self._width = min(_LONGEST_SPARKS, max(10, room - _LABEL - 26))

    def run(self) -> list[Text]:
        """Name, and how many shards each stage has."""
        stats = self._stats
        name = Text(clean_for_terminal(stats.run, 200))
        if stats.generation:
            name.append(f", generation {clean_for_terminal(stats.generation)}", _DIM)
        stages = Text()
        for stage in stats.shards_by_stage:
            done, expected = stats.shards_by_stage[stage], stats.expected_by_stage[stage]
            stages.append(f"{stage} ", _DIM)
            stages.append(f"{done:,}/{expected:,}   ", _GOOD if done == expected else _BAD)
        return [name, stages]

    def shards(self) -> list[Text]:
        """How large they are, and which stand out."""
        found = self._stats.shards
        if found.images is None or found.tar_bytes is None:
            return []
        total = found.tar_bytes.mean * found.num_shards
        lines = [
            Text(
                f"{counted(found.num_shards, 'shard')}, {format_bytes(total)}; images {_range(found.images)}; "
                f"size {_byte_range(found.tar_bytes)}"
            )
        ]
        if found.outliers:
            named = ", ".join(
                f"{clean_for_terminal(one.shard)} ({one.num_images:,}, {format_bytes(one.num_bytes)})"
                for one in found.outliers[:4]
            )
            lines.append(Text(f"{found.num_outliers:,} far from the median: {named}", _BAD))
        return lines

    def download(self) -> list[Text]:
        """Yield, reasons and hosts of failures."""
        found = self._stats.download
        share = found.num_images / found.num_rows if found.num_rows else 0.0
        kind = "rows" if found.num_hosts else "samples"
        lines = [
            Text.assemble(
                f"{found.num_images:,} of {found.num_rows:,} {kind} ", (f"{share:.1%} ", "bold"),
                (bar(share, 20, plain=self._plain), _GOOD),
            )
        ]  # fmt: skip
        if found.by_reason:
            lines.append(Text(_most(found.by_reason, 5), _BAD))
        if found.worst_hosts:
            named = ", ".join(
                f"{clean_for_terminal(one.host, 40)} {one.num_failed:,} of {one.num_rows:,}"
                for one in found.worst_hosts[:3]
            )
            lines.append(Text(f"{counted(found.num_hosts, 'host')}; most failures: {named}", _DIM))
        return lines

    def images(self) -> list[Text]:
        """Formats, sizes and shapes."""
        found = self._stats.download
        if found.width_px is None or found.height_px is None:
            return []
        return [
            Text(
                f"{_most(found.by_format, 3, found.num_images)}; width {_range(found.width_px)}, "
                f"height {_range(found.height_px)} px"
            ),
            self._named_bars("shorter edge", found.shorter_edge_px, "px"),
            self._named_bars("width:height", found.aspect, ""),
        ]

    def captions(self) -> list[Text]:
        """Lengths, words, how much the captions of an image differ."""
        stats = self._stats
        lines = []
        for source, pairs in stats.pairs.items():
            if pairs.words is not None:
                counts = pairs.lengths(min(max(pairs.words_histogram), LONGEST_WORDS))
                said = f"words {_range(pairs.words)}; {pairs.num_words:,} different"
                lines.append(self._sparks(source, counts, said, _SOURCE_STYLES.get(source, "")))
        found = stats.diversity
        if found and found.distinct_per_image:
            line = f"of {found.captions_per_image:.1f} an image {found.distinct_per_image.mean:.1f} differ"
            if found.of_sample:
                sample = found.of_sample
                line += (
                    f"; distinct-1 {sample.distinct_1:.2f}, distinct-2 {sample.distinct_2:.2f}, "
                    f"self-BLEU {sample.self_bleu:.2f}"
                )
            lines.append(Text(line))
        top = stats.top_caption
        if top.num_images:
            share = top.num_synthetic / top.num_images
            lines.append(Text(f"CLIP likes a synthetic caption best in {share:.1%} of {top.num_images:,} images"))
        return lines

    def scores(self) -> list[Text]:
        """Both scores; those of all sources on one axis."""
        lines = []
        for name in ("CLIP", "ITM"):
            found = {
                source: pairs.clip_score if name == "CLIP" else pairs.itm_score
                for source, pairs in self._stats.pairs.items()
            }  # fmt: skip
            together = [sum(counts) for counts in zip(*(one.counts for one in found.values()), strict=True)]
            step, first, _ = fitted(together, self._width)
            for source, histogram in found.items():
                if (median := histogram.median()) is not None:
                    filled = [number for number, times in enumerate(histogram.counts) if times]
                    last = filled[-1]
                    counts = [sum(histogram.counts[at : at + step]) for at in range(first, last + 1, step)]
                    low, high = histogram.bounds[filled[0]], histogram.bounds[last + 1]
                    said = f"{low:.2f} to {high:.2f}, median {median:.2f}"
                    cells = sparks(counts, plain=self._plain)
                    lines.append(_labelled(f"{name} {source[:9]}", cells, said, _SOURCE_STYLES.get(source, "")))
        return lines

    def pairs(self) -> list[Text]:
        """What is kept and why the rest is not, and the kept rate against the threshold."""
        stats = self._stats
        lines = []
        for source, pairs in stats.pairs.items() if stats.has_manifest else ():
            share = pairs.num_kept / pairs.num_pairs if pairs.num_pairs else 0.0
            lines.append(
                Text.assemble(
                    (f"{source:<{_LABEL}}", _SOURCE_STYLES.get(source, "")),
                    f"{pairs.num_kept:,} of {pairs.num_pairs:,} kept ", (f"{share:.1%}  ", "bold"),
                    (_most(pairs.by_drop_reason, 4), _DIM),
                )
            )  # fmt: skip
        if not lines:
            return []
        images = stats.num_images_judged
        share = stats.num_images_kept / images if images else 0.0
        lines.append(Text(f"{stats.num_images_kept:,} of {images:,} images ({share:.1%}) have a kept pair"))
        return [*lines, *self._curves()]

    def times(self) -> list[Text]:
        """How long the stages took, and how fast they were."""
        return [
            Text.assemble(
                f"{stage:<{_LABEL}}{found.num:,} {'rows' if stage == 'shards' else 'images'} "
                f"in {format_seconds(found.seconds)}  ", (f"{format_rate(found.per_second)} a second", "bold"),
            )
            for stage, found in self._stats.times.items()
        ]  # fmt: skip

    def _curves(self) -> list[Text]:
        curves = {
            source: list(pairs.kept_by_threshold.values())
            for source, pairs in self._stats.pairs.items() if pairs.kept_by_threshold
        }  # fmt: skip
        lines = []
        for source, curve in curves.items():
            cells = sparks(resampled(curve, self._width), 1.0, plain=self._plain)
            lines.append(_labelled(source, cells, "", _SOURCE_STYLES.get(source, "")))
        threshold = self._stats.threshold
        if lines and threshold is not None:
            kept = [self._stats.pairs[source].kept_at for source in curves]
            rates = ", ".join("" if rate is None else f"{rate:.1%}" for rate in kept)
            marked = mark_at(threshold, self._width, f"{threshold:g} ({rates})", plain=self._plain)
            lines.append(Text(" " * _LABEL + marked, "bold"))
        title = Text("kept rate at ITM thresholds 0 to 1, of pairs that nothing else drops", _DIM)
        return [title, *lines] if lines else []

    def _sparks(self, label: str, counts: list[int], said: str, style: str) -> Text:
        return _labelled(label, sparks(fitted(counts, self._width)[2], plain=self._plain), said, style)

    def _named_bars(self, label: str, counts: dict[str, int], unit: str) -> Text:
        filled = [number for number, times in enumerate(counts.values()) if times]
        names, times = list(counts), list(counts.values())
        if not filled:
            return _labelled(label, "", "", "")
        first, last = filled[0], filled[-1]
        cells = "".join(2 * cell for cell in sparks(times[first : last + 1], plain=self._plain))
        ends = names[first] if first == last else f"{names[first]} {'...' if self._plain else '…'} {names[last]}"
        return _labelled(label, cells, f"{ends} {unit}".rstrip(), "blue")


def _labelled(label: str, cells: str, said: str, style: str) -> Text:
    return Text.assemble((f"{label:<{_LABEL}}", style), (f"{cells} ", style), (said, _DIM))


def _most(counts: dict[str, int], num: int, total: int | None = None) -> str:
    """The first names with counts (or shares of `total`), and how many others there are."""
    named = [
        f"{clean_for_terminal(name, 40)} {times / total:.0%}" if total else f"{clean_for_terminal(name, 40)} {times:,}"
        for name, times in islice(counts.items(), num)
    ]
    others = len(counts) - len(named)
    return ", ".join(named) + (f" and {others} others" if others else "")


def _range(spread: Spread) -> str:
    return f"{spread.least:,} to {spread.most:,} (median {spread.median:,.0f})"


def _byte_range(spread: Spread) -> str:
    return f"{format_bytes(spread.least)} to {format_bytes(spread.most)} (median {format_bytes(spread.median)})"
