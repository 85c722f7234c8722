"""Small drawings in characters: a row of bars, a curve with a point marked.

In: numbers, and how many cells wide. Out: strings. `plain` keeps to ASCII.
"""

from __future__ import annotations

from collections.abc import Sequence

BARS = " ▁▂▃▄▅▆▇█"
PLAIN_BARS = " .:-=+*#%"
MARK, PLAIN_MARK = "▲", "^"


def sparks(counts: Sequence[float], most: float | None = None, *, plain: bool = False) -> str:
    """A bar for each number, the largest (or `most`) the highest; whatever is above nothing is seen."""
    bars = PLAIN_BARS if plain else BARS
    top = max(counts, default=0) if most is None else most
    return "".join(
        bars[max(1, min(len(bars) - 1, round(count / top * (len(bars) - 1))))] if count > 0 and top > 0 else bars[0]
        for count in counts
    )


def fitted(counts: Sequence[int], width: int) -> tuple[int, int, list[int]]:
    """Neighbours added up until they fit into `width`: (bins in one, first bin, sums) from the first filled bin on."""
    filled = [number for number, count in enumerate(counts) if count]
    if not filled:
        return 1, 0, []
    first, last = filled[0], filled[-1]
    step = max(1, -(-(last + 1 - first) // max(width, 1)))
    return step, first, [sum(counts[start : start + step]) for start in range(first, last + 1, step)]


def mark_at(share: float, width: int, label: str, *, plain: bool = False) -> str:
    """A line below a row of `width` cells whose ends are 0 and 1: a mark at `share`, its label behind it."""
    place = round(min(max(share, 0.0), 1.0) * (width - 1))
    return " " * place + f"{PLAIN_MARK if plain else MARK} {label}"


def resampled(values: Sequence[float], width: int) -> list[float]:
    """A curve given at even distances, read at `width` even places."""
    last = len(values) - 1
    return [values[round(place * last / max(width - 1, 1))] for place in range(width)] if values else []
