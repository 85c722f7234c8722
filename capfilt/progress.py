"""Progress of a long piece of work: what is done, how fast, and how long it will take.

In: `start(name, total, unit)`, then `advance(n)` as work is done, then `finish()`. Out: on a terminal a line
that is redrawn in place; elsewhere (a log, a pipe) a plain line every few seconds and one at the end.
No thread and no dependency: a line is drawn only when work advances, so worker processes can be forked at
any time.
"""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from typing import Protocol, TextIO

REDRAW_SECONDS = 0.1
LINE_SECONDS = 10.0
RATE_WINDOW_SECONDS = 30.0
BAR_WIDTH = 24


class Progress(Protocol):
    """What long functions report to, one piece of work at a time: start, advance, finish."""

    def start(self, name: str, total: int | None, unit: str, /) -> None:
        """Begin a piece of work of `total` units (None: not known), called `name`."""

    def advance(self, n: int = 1, /, *, already: bool = False, **fields: object) -> None:
        """`n` more units are done; `fields` are counts or figures shown beside the rate (the latest of each).

        `already` marks work that an earlier command did: it counts as done, but not towards the rate.
        """

    def finish(self) -> None:
        """The piece of work has ended."""

    def say(self, text: str, /) -> None:
        """A sentence about the work, on a line of its own."""


class NullProgress:
    """Says nothing."""

    def start(self, name: str, total: int | None, unit: str, /) -> None:
        """Nothing is shown."""

    def advance(self, n: int = 1, /, *, already: bool = False, **fields: object) -> None:
        """Nothing is shown."""

    def finish(self) -> None:
        """Nothing is shown."""

    def say(self, text: str, /) -> None:
        """Nothing is shown."""


class StreamProgress:
    """Writes to a stream: a line redrawn in place on a terminal, plain lines elsewhere."""

    def __init__(self, stream: TextIO | None = None, *, live: bool | None = None) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._live = is_live(self._stream) if live is None else live
        self._name: str | None = None
        self._total: int | None = None
        self._unit = ""
        self._done = self._already = 0
        self._fields: dict[str, object] = {}
        self._started = self._drawn = 0.0
        self._under_way = False
        self._history: deque[tuple[float, int]] = deque()

    def start(self, name: str, total: int | None, unit: str, /) -> None:
        """Begin a piece of work; one that was not finished ends here."""
        if self._name is not None:
            self.finish()
        self._name, self._total, self._unit, self._fields = name, total, unit, {}
        self._done = self._already = 0
        self._under_way = False
        self._started = self._drawn = time.monotonic()
        self._history = deque([(self._started, 0)])
        if self._live:
            self._draw(self._started)

    def advance(self, n: int = 1, /, *, already: bool = False, **fields: object) -> None:
        """Count `n` more units and redraw, but not more often than is readable."""
        if self._name is None:
            return
        self._done += n
        if already:
            self._already += n
            self._history = deque((when, done + n) for when, done in self._history)
        self._fields.update(fields)
        now = time.monotonic()
        if now - self._drawn >= (REDRAW_SECONDS if self._live else LINE_SECONDS):
            self._draw(now)

    def finish(self) -> None:
        """Draw the last state and end the line."""
        if self._name is None:
            return
        self._draw(time.monotonic(), ended=True)
        if self._live:
            self._stream.write("\n")
            self._stream.flush()
        self._name = None

    def say(self, text: str, /) -> None:
        """Write a line above the one that is redrawn."""
        self._stream.write(f"\r\x1b[2K{text}\n" if self._live else f"{text}\n")
        self._stream.flush()

    def _draw(self, now: float, *, ended: bool = False) -> None:
        self._drawn = now
        if not self._under_way and self._done > self._already:
            # The rate counts from here: what went before was loading models and opening files.
            self._under_way = True
            self._history.clear()
        self._history.append((now, self._done))
        while len(self._history) > 2 and now - self._history[0][0] > RATE_WINDOW_SECONDS:
            self._history.popleft()
        line = self._line(now, ended)
        if self._live:
            columns = terminal_columns(self._stream)
            self._stream.write("\r\x1b[2K" + line[: columns - 1])
        else:
            self._stream.write(line + "\n")
        self._stream.flush()

    def _line(self, now: float, ended: bool) -> str:
        elapsed = now - self._started
        parts = [f"{self._name:<10}"]
        if self._total is None:
            parts.append(f"{self._done:,} {self._unit}")
        else:
            share = self._done / self._total if self._total else 1.0
            if self._live:
                parts.append(bar(share, BAR_WIDTH, plain=not speaks_unicode(self._stream)))
            parts.append(f"{self._done:,}/{self._total:,} {self._unit} {share:4.0%}")
        if ended:
            rate = (self._done - self._already) / elapsed if elapsed > 0 else 0.0
            parts.append(f"{format_rate(rate)} {self._unit}/s")
            parts.append(f"in {format_seconds(elapsed)}")
        elif self._under_way and len(self._history) > 1:
            rate = self._recent_rate()
            parts.append(f"{format_rate(rate)} {self._unit}/s")
            if self._total is not None and rate > 0:
                parts.append(f"{format_seconds(max(self._total - self._done, 0) / rate)} left")
        parts.extend(f"{name} {format_field(value)}" for name, value in self._fields.items())
        return "  ".join(parts)

    def _recent_rate(self) -> float:
        (first_time, first_done), (last_time, last_done) = self._history[0], self._history[-1]
        return (last_done - first_done) / (last_time - first_time) if last_time > first_time else 0.0


def is_live(stream: TextIO) -> bool:
    """Whether a line of `stream` can be redrawn in place: a terminal that understands escape sequences."""
    return stream.isatty() and os.environ.get("TERM", "") not in ("", "dumb")


def terminal_columns(stream: TextIO) -> int:
    """Width of the terminal behind `stream`, 100 where it cannot be asked."""
    try:
        return os.get_terminal_size(stream.fileno()).columns or 100
    except (OSError, ValueError):
        return 100


def terminal_lines(stream: TextIO) -> int:
    """Height of the terminal behind `stream`, 25 where it cannot be asked."""
    try:
        return os.get_terminal_size(stream.fileno()).lines or 25
    except (OSError, ValueError):
        return 25


def speaks_unicode(stream: TextIO) -> bool:
    """Whether block characters can be written to `stream`."""
    return (getattr(stream, "encoding", None) or "").lower().replace("-", "").startswith("utf")


def bar(share: float, width: int, *, plain: bool = False) -> str:
    """`share` (0 to 1) of `width` cells filled, in eighths of a cell; `plain` keeps to ASCII."""
    if plain:
        return ("#" * round(min(max(share, 0.0), 1.0) * width)).ljust(width, ".")
    eighths = round(min(max(share, 0.0), 1.0) * width * 8)
    full, rest = divmod(eighths, 8)
    cells = "█" * full + (" ▏▎▍▌▋▊▉"[rest] if rest else "")
    return cells.ljust(width, "·" if full < width else " ")[:width]


def format_seconds(seconds: float) -> str:
    """0:07, 12:34 or 1:02:03; tenths below ten seconds."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def format_bytes(num: float) -> str:
    """1.2 kB, 34 MB, 5.6 GB: powers of ten."""
    for unit in ("B", "kB", "MB", "GB"):
        if num < 999.5:
            return f"{num:.0f} {unit}" if num >= 10 or unit == "B" else f"{num:.1f} {unit}"
        num /= 1000
    return f"{num:,.1f} TB"


def format_rate(rate: float) -> str:
    """Three figures: 0.21, 3.45, 67.8, 1,234."""
    for limit, digits in ((10.0, 2), (100.0, 1)):
        if rate < limit:
            return f"{rate:.{digits}f}"
    return f"{rate:,.0f}"


def format_field(value: object) -> str:
    """Whole numbers with separators, others with four figures, anything else as it is."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def counted(number: int, noun: str) -> str:
    """`1 shard`, `2 shards`, `1,200 shards`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def as_bytes(number: int) -> str:
    """`812 bytes`, `1.2 kB`, `345 MB`, `6.7 TB`."""
    if number < 1000:
        return counted(number, "byte")
    size, units = number / 1000, ["kB", "MB", "GB", "TB"]
    while size >= 999.5 and len(units) > 1:
        size /= 1000
        units.pop(0)
    return f"{size:,.0f} {units[0]}" if size >= 9.95 else f"{size:.1f} {units[0]}"
