"""Charts of a page: drawings in SVG with their numbers as a table beneath, and bars in the rows of a table.

In: names and counts. Out: HTML. Every drawing has a title and a sentence for those who do not see it; colours are the
page's classes (s0 web, s1 synthetic, s2 others), readable in light and dark.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise

from capfilt.report.markup import escaped
from capfilt.report.sparks import fitted

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 560, 190, 8, 24, 18
"""Of a drawing, in its own units; what is right of LEFT and above BOTTOM is the plot."""
BAR_WIDTH = 200
_CLASSES = {"web": "s0", "synthetic": "s1"}
_MOST_BINS = 40


def bar_table(title: str, rows: Iterable[tuple[str, int, str]], total: int | None) -> Iterator[str]:
    """A table of names, counts and shares, each with a bar, and what is to be said of it.

    Without a total there are no shares, and the longest bar is the largest count's.
    """
    listed = list(rows)
    if not listed:
        return
    whole = max(number for _, number, _ in listed) if total is None else total
    yield f"<table><caption>{escaped(title)}</caption>\n"
    for name, number, said in listed:
        share = number / whole if whole else 0.0
        width = max(1, round(share * BAR_WIDTH)) if number else 0
        shown = "" if total is None else f'<td class="n">{share:.1%}</td>'
        yield (
            f'<tr><th scope="row">{escaped(name)}</th><td class="n">{number:,}</td>{shown}'
            f'<td><svg class="bar" viewBox="0 0 {BAR_WIDTH} 10" aria-hidden="true"><rect class="s0" x="0" y="0" '
            f'width="{width}" height="10"></rect></svg></td><td>{escaped(said)}</td></tr>\n'
        )
    yield "</table>\n"


def histogram(
    title: str,
    bounds: Sequence[float],
    series: Mapping[str, Sequence[int]],
    *,
    mark: float | None = None,
    is_open: bool = False,
) -> Iterator[str]:
    """Counts between the bounds as areas, each source as shares of its own, on one axis.

    Bounds that are whole numbers are those of counts: 3 to 5 are three of them. `is_open`: the last bin has all above.
    """
    filled = {name: counts for name, counts in series.items() if sum(counts)}
    if not filled:
        return
    step, first, together = fitted([sum(counts) for counts in zip(*filled.values(), strict=True)], _MOST_BINS)
    starts = range(first, first + step * len(together), step)
    shares = {
        name: [sum(counts[start : start + step]) / sum(counts) for start in starts] for name, counts in filled.items()
    }
    edges = [bounds[start] for start in starts] + [bounds[min(starts[-1] + step, len(bounds) - 1)]]
    most = max(max(values) for values in shares.values())
    yield from _open_figure(title, f"{edges[0]:g} to {edges[-1]:g}", shares)
    for name, values in shares.items():
        points = [f"{_x(0.0):.1f},{_y(0.0):.1f}"]
        for number, share in enumerate(values):
            height = _y(share / most)
            points += [f"{_x(place / len(values)):.1f},{height:.1f}" for place in (number, number + 1)]
        points.append(f"{_x(1.0):.1f},{_y(0.0):.1f}")
        yield f'<polygon class="{_class(name)} area" points="{" ".join(points)}"></polygon>\n'
    yield from _axis(edges[0], edges[-1], mark)
    yield "</svg>\n"
    header = [_bin_name(low, high, is_open=is_open and high == bounds[-1]) for low, high in pairwise(edges)]
    yield from _numbers(title, header, {name: [f"{share:.1%}" for share in own] for name, own in shares.items()})
    yield "</figure>\n"


def _bin_name(low: float, high: float, *, is_open: bool) -> str:
    if isinstance(low, float):
        return f"{low:.2f} to {high:.2f}"
    if is_open:
        return f"{low:,} and more"
    return f"{low:,}" if high - low == 1 else f"{low:,} to {high - 1:,}"


def curve(
    title: str, places: Sequence[float], series: Mapping[str, Sequence[float]], *, mark: float | None = None
) -> Iterator[str]:
    """Shares (0 to 1) at even places as lines; a place may be marked."""
    if not series:
        return
    yield from _open_figure(title, f"{places[0]:g} to {places[-1]:g}", series)
    for name, values in series.items():
        points = " ".join(
            f"{_x(number / (len(values) - 1)):.1f},{_y(value):.1f}" for number, value in enumerate(values)
        )
        yield f'<polyline class="{_class(name)} line" points="{points}"></polyline>\n'
    yield from _axis(places[0], places[-1], mark)
    yield "</svg>\n"
    shown = range(0, len(places), max(1, len(places) // 20))
    cells = {name: [f"{values[number]:.1%}" for number in shown] for name, values in series.items()}
    yield from _numbers(title, [f"{places[number]:.2f}" for number in shown], cells)
    yield "</figure>\n"


def _open_figure(title: str, extent: str, series: Iterable[str]) -> Iterator[str]:
    names = list(series)
    keys = "".join(f'<span class="key {_class(name)}">{escaped(name)}</span> ' for name in names)
    yield f"<figure><figcaption>{escaped(title)} {keys}</figcaption>\n"
    said = escaped(f"{title}, {extent}, of {' and '.join(names)}; the numbers are in the table below")
    yield f'<svg class="plot" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{said}">\n'


def _axis(low: float, high: float, mark: float | None) -> Iterator[str]:
    ground = HEIGHT - BOTTOM
    yield f'<line class="axis" x1="{LEFT}" y1="{ground}" x2="{WIDTH - LEFT}" y2="{ground}"></line>\n'
    for anchor, place, value in (("start", 0.0, low), ("middle", 0.5, (low + high) / 2), ("end", 1.0, high)):
        yield f'<text x="{_x(place):.1f}" y="{HEIGHT - 6}" text-anchor="{anchor}">{value:.4g}</text>\n'
    if mark is not None and low <= mark <= high:
        x = _x((mark - low) / (high - low))
        yield f'<line class="mark" x1="{x:.1f}" y1="{TOP}" x2="{x:.1f}" y2="{ground}"></line>\n'
        anchor = "end" if x > WIDTH / 2 else "start"
        yield f'<text x="{x:.1f}" y="{TOP - 5}" text-anchor="{anchor}">threshold {mark:g}</text>\n'


def _numbers(title: str, header: Sequence[str], cells: Mapping[str, Sequence[str]]) -> Iterator[str]:
    yield f"<details><summary>Numbers</summary><table><caption>{escaped(title)}</caption>\n<tr><td></td>"
    yield "".join(f'<th scope="col">{escaped(name)}</th>' for name in cells) + "</tr>\n"
    for number, name in enumerate(header):
        own = "".join(f'<td class="n">{values[number]}</td>' for values in cells.values())
        yield f'<tr><th scope="row">{escaped(name)}</th>{own}</tr>\n'
    yield "</table></details>\n"


def _x(share: float) -> float:
    return LEFT + share * (WIDTH - 2 * LEFT)


def _y(share: float) -> float:
    return HEIGHT - BOTTOM - share * (HEIGHT - BOTTOM - TOP)


def _class(name: str) -> str:
    return _CLASSES.get(name, "s2")
