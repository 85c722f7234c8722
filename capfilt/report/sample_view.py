"""A sample of a run as lines of text: what it is, then its captions with scores and verdicts.

In: a `BrowsedSample` and a width. Out: lines that fit it. Keys, addresses, texts and all else that came from outside
are cleaned here; widths count the cells that a terminal gives a character.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rich.cells import cell_len, chop_cells

from capfilt.data.reasons import DROP_REASON_SENTENCES, REASON_SENTENCES
from capfilt.data.texts import clean_for_terminal
from capfilt.report.browse import BrowsedSample
from capfilt.report.shard_pairs import NO_ROW

MAX_TEXT_CHARS = 400
_TABLE_COLUMNS = 64
"""Where there are fewer, a caption's text stands below its figures."""


@dataclass(frozen=True, kw_only=True)
class Look:
    """How lines are written."""

    columns: int
    plain: bool = False
    """Nothing but ASCII of our own."""
    color: bool = False


def head_lines(sample: BrowsedSample, position: str, look: Look) -> Iterator[str]:
    """What stands above the picture: the key, where it is, its address, its size; of a failed row, why."""
    yield from _wrapped(f"{_text(sample.key, 100)}  shard {sample.shard}, {position}", look)
    if sample.url:
        yield from _wrapped(_text(sample.url), look)
    if sample.status == NO_ROW:
        yield from _wrapped("The shard has no row of this key: `capfilt verify` says what is damaged.", look)
    elif not sample.has_picture:
        yield from _failure_lines(sample, look)
    else:
        threshold = "" if sample.threshold is None else f"; ITM threshold {sample.threshold:g}"
        yield from _wrapped(f"{sample.width} x {sample.height} px{threshold}", look)
        if sample.reason is not None:
            yield from _failure_lines(sample, look)


def _failure_lines(sample: BrowsedSample, look: Look) -> Iterator[str]:
    reason = sample.reason or "no reason given"
    what = _text(sample.status, 40) if not sample.has_picture else "set aside"
    yield from _wrapped(f"{what}: {_text(reason, 40)}. {REASON_SENTENCES.get(reason, '')}".rstrip(), look)
    if sample.detail:
        yield from _wrapped(_text(sample.detail), look)
    if sample.web_caption and not sample.has_picture:
        yield from _wrapped(f"web caption: {_text(sample.web_caption)}", look)


def caption_lines(sample: BrowsedSample, look: Look) -> Iterator[str]:
    """What stands below the picture: a row for each caption, the kept ones first, and what their drop reasons mean."""
    if not sample.captions:
        if sample.has_picture:
            yield from _wrapped("No captions.", look)
        return
    is_partial = not all(row["matches"] for row in sample.captions)
    rows = [_Row(row, is_partial, look) for row in sorted(sample.captions, key=_best_first)]
    shown = [column for column in _COLUMNS if any(row.cells[column] for row in rows)]
    widths = {column: max(len(column), *(len(row.cells[column]) for row in rows)) for column in shown}
    if is_wide(look):
        yield "  " + "  ".join(_aligned(column, column, widths[column]) for column in shown) + "  text"
    for row in rows:
        yield from row.lines(shown, widths)
    dropped = {row["drop_reason"] for row in sample.captions} - {None}
    for reason in sorted(dropped):
        yield from _wrapped(
            f"{_text(reason, 40)}: {DROP_REASON_SENTENCES.get(reason, 'Not a reason of capfilt.')}", look
        )


_COLUMNS: Mapping[str, Callable[[Mapping[str, Any]], str]] = {
    "source": lambda row: _text(row["source"], 20),
    "CLIP": lambda row: _figure(row["clip_score"]),
    "rank": lambda row: "" if row["rank"] is None else str(row["rank"]),
    "ITM": lambda row: _figure(row["itm_score"]),
    "verdict": lambda row: _verdict(row),
}
_NUMBERS = frozenset({"CLIP", "rank", "ITM"})


def is_wide(look: Look) -> bool:
    """Whether there is room for things beside each other."""
    return look.columns >= _TABLE_COLUMNS


class _Row:
    """A caption in the table."""

    def __init__(self, row: Mapping[str, Any], is_partial: bool, look: Look) -> None:
        self.look = look
        self.mark = ("> " if look.plain else "› ") if is_partial and row["matches"] else "  "
        self.cells = {column: tell(row) for column, tell in _COLUMNS.items()}
        self.text = _text(row["text"] or "", MAX_TEXT_CHARS)
        self.kept = row["kept"]

    def lines(self, shown: Iterable[str], widths: Mapping[str, int]) -> Iterator[str]:
        """The row in the table; in a narrow terminal its figures, and the text below them."""
        if not is_wide(self.look):
            named = [
                f"{column} {self.cells[column]}" if column in _NUMBERS else self._painted(self.cells[column])
                for column in shown
                if self.cells[column]
            ]
            yield from _wrapped_items(named, self.mark, self.look)
            for line in wrap(self.text, self.look.columns - 4):
                yield "    " + line
            return
        cells = [self._painted(_aligned(column, self.cells[column], widths[column])) for column in shown]
        start = self.mark + "  ".join(cells) + "  "
        indent = 2 + sum(widths[column] + 2 for column in shown)
        first, *others = wrap(self.text, self.look.columns - indent) or [""]
        yield (start + first).rstrip()
        for line in others:
            yield " " * indent + line

    def _painted(self, cell: str) -> str:
        """In colour where it is the verdict."""
        if not self.look.color or self.kept is None or cell.strip() != self.cells["verdict"]:
            return cell
        return f"\x1b[{'32' if self.kept else '33'}m{cell}\x1b[39m"


def _best_first(row: Mapping[str, Any]) -> tuple[Any, ...]:
    score = row["itm_score"] if row["itm_score"] is not None else -1.0
    rank = row["rank"] if row["rank"] is not None else 1 << 30
    return (not row["kept"], -score, rank, row["caption_index"])


def _verdict(row: Mapping[str, Any]) -> str:
    if row["kept"] is None:
        return ""
    return "kept" if row["kept"] else _text(row["drop_reason"] or "dropped", 20)


def _figure(score: float | None) -> str:
    return "" if score is None else f"{score:.3f}"


def _aligned(column: str, cell: str, width: int) -> str:
    return cell.rjust(width) if column in _NUMBERS else cell.ljust(width)


def _text(value: str, max_chars: int = MAX_TEXT_CHARS) -> str:
    return clean_for_terminal(value, max_chars)


def _wrapped(text: str, look: Look) -> list[str]:
    return wrap(text, look.columns)


def _wrapped_items(items: Iterable[str], start: str, look: Look) -> Iterator[str]:
    """Items, with what paints them, on as few lines as they fit."""
    line = ""
    for item in items:
        if line and _visible(line) + 2 + _visible(item) > look.columns - 2:
            yield start + line
            line, start = "", "  "
        line += f"  {item}" if line else item
    yield start + line


def _visible(text: str) -> int:
    """Cells of our own texts, which are ASCII; escapes that paint have none."""
    plain = text
    for escape in ("\x1b[32m", "\x1b[33m", "\x1b[39m"):
        plain = plain.replace(escape, "")
    return cell_len(plain)


def wrap(text: str, columns: int) -> list[str]:
    """A cleaned text in lines of at most so many cells, between words where there are any."""
    columns = max(columns, 4)
    lines, line, used = list[str](), "", 0
    for word in text.split():
        for piece in chop_cells(word, columns) if cell_len(word) > columns else [word]:
            length = cell_len(piece)
            if line and used + 1 + length > columns:
                lines.append(line)
                line, used = "", 0
            line, used = (f"{line} {piece}", used + 1 + length) if line else (piece, length)
    return [*lines, line] if line else lines
