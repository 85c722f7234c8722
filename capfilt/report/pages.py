"""Samples as pages: lines, the picture, lines. Written one after another, or turned by keys on a screen of their own.

In: samples to walk along, a way to draw pictures, perhaps a model's explanation. Out: a terminal's text.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image

from capfilt.data.images import ImageRefused
from capfilt.errors import UsageError
from capfilt.report.browse import BrowsedSample, Browser
from capfilt.report.decks import Deck
from capfilt.report.sample_view import Look, caption_lines, head_lines, is_wide, wrap
from capfilt.report.terminal import END, Terminal
from capfilt.report.terminal_pictures import Pictures

MAX_PICTURE_PX = 1024
"""Longest side of what is handed on to be drawn."""
MIN_PICTURE_ROWS, MAX_LISTED_ROWS = 3, 24
_LOOK_AGAIN_SECONDS = 0.4

KEYS = (
    ("n, space, →", "the next sample"),
    ("p, ←", "the one before"),
    ("g, G", "the first, the last"),
    ("j, ↓ and k, ↑", "down and up, where the captions have no room"),
    ("e", "where the model sees the best kept caption (--explain)"),
    ("q", "quit"),
    ("?", "this help"),
)
_NEXT, _PREVIOUS = ("n", " ", "right", "enter"), ("p", "left", "backspace")
_SCROLLS = {"j": 1, "down": 1, "k": -1, "up": -1, "page down": 10, "page up": -10}


@dataclass(frozen=True)
class Explained:
    """Where a model sees a caption."""

    overlay: Image.Image
    """The picture with the map over it, as large as it was given."""
    lines: tuple[str, ...]
    """Cleaned."""


Explain = Callable[[Image.Image, Image.Image, str], Explained]
"""(the picture, the same as it is drawn, a caption) → what a model sees. UsageError for a caption without words."""


@dataclass(frozen=True)
class Page:
    """One sample."""

    head: list[str]
    picture: Image.Image | None
    tail: list[str]


class Pages:
    """Makes the pages of a deck."""

    def __init__(
        self, browser: Browser, deck: Deck, pictures: Pictures, explain: Explain | None, caption_index: int | None
    ) -> None:
        self.deck, self.pictures = deck, pictures
        self.can_explain = explain is not None
        self._browser, self._explain, self._caption_index = browser, explain, caption_index

    def page(self, place: Any, look: Look, *, explained: bool) -> Page:
        """The page of a place; `explained`: with what the model sees. Raises CorruptionError for damage on disk."""
        sample = self._browser.sample(self.deck.at(place))
        head, tail = list(head_lines(sample, self.deck.position(place), look)), list(caption_lines(sample, look))
        is_seen = self.pictures.protocol != "none"
        if not sample.has_picture or not (is_seen or explained):
            return Page(head, None, tail)
        try:
            whole = self._browser.picture(self.deck.at(place))
        except ImageRefused as error:
            return Page([*head, *wrap(f"The picture cannot be shown: {error}", look.columns)], None, tail)
        picture = _drawable(whole)
        if explained and self._explain is not None:
            picture, lines = self._explained(sample, whole, picture, look)
            tail = [*lines, *tail]
        return Page(head, picture if is_seen else None, tail)

    def _explained(
        self, sample: BrowsedSample, whole: Image.Image, picture: Image.Image, look: Look
    ) -> tuple[Image.Image, list[str]]:
        assert self._explain is not None
        text = text_to_explain(sample, self._caption_index)
        if text is None:
            return picture, wrap("There is no such caption to explain.", look.columns)
        try:
            found = self._explain(whole, picture, text)
        except UsageError as error:
            return picture, wrap(str(error), look.columns)
        lines = [line for text in found.lines for line in wrap(text, look.columns)]
        return _joined(picture, found.overlay, beside=is_wide(look)), lines


def text_to_explain(sample: BrowsedSample, caption_index: int | None) -> str | None:
    """The caption of that number; else the best of those kept, or of all where none is."""
    rows = sample.captions
    if caption_index is not None:
        return next((row["text"] for row in rows if row["caption_index"] == caption_index), None)
    best = max((row for row in rows if row["text"]), key=_goodness, default=None)
    return None if best is None else best["text"]


def _goodness(row: dict[str, Any]) -> tuple[bool, float, float]:
    itm, clip = (-2.0 if row[name] is None else row[name] for name in ("itm_score", "clip_score"))
    return row["kept"] is True, itm, clip


def _drawable(picture: Image.Image) -> Image.Image:
    smaller = picture.copy()
    smaller.thumbnail((MAX_PICTURE_PX, MAX_PICTURE_PX), Image.Resampling.LANCZOS)
    return smaller


def _joined(picture: Image.Image, overlay: Image.Image, *, beside: bool) -> Image.Image:
    """Two pictures of one size as one: beside each other, or one under the other."""
    width, height = picture.size
    gap = max(1, min(width, height) // 20)
    joined = Image.new("RGB", (2 * width + gap, height) if beside else (width, 2 * height + gap))
    joined.paste(picture, (0, 0))
    joined.paste(overlay, (width + gap, 0) if beside else (0, height + gap))
    return joined


def list_pages(pages: Pages, look: Look, rows: int, write: Callable[[str], object]) -> None:
    """Write all samples, one after another; pictures take half of a screen of `rows` at most."""
    place, gap = pages.deck.after(None), ""
    while place is not None:
        page = pages.page(place, look, explained=pages.can_explain)
        text = gap + "".join(f"{line}\n" for line in page.head)
        if page.picture is not None:
            most = min(max(rows // 2, MIN_PICTURE_ROWS), MAX_LISTED_ROWS)
            text += pages.pictures.draw(page.picture, look.columns, most).text
        write(text + "".join(f"{line}\n" for line in page.tail))
        place, gap = pages.deck.after(place), "\n"


class Pager:
    """Turns pages as keys say, until one says to end."""

    def __init__(self, pages: Pages, terminal: Terminal, look: Look) -> None:
        self._pages, self._terminal, self._look = pages, terminal, look
        self._place = pages.deck.after(None)
        self._explained = pages.can_explain
        self._first_line, self._most_lines = 0, 0
        self._message, self._shows_help = "", False
        self._made: tuple[Any, Page] | None = None

    def run(self) -> None:
        """Show pages until the end."""
        self._terminal.open_own_screen()
        drawn_for = None
        while True:
            size = self._terminal.size()
            if drawn_for != size:
                self._draw(*size)
                drawn_for = size
            key = self._terminal.read_key(_LOOK_AGAIN_SECONDS)
            if key in ("q", "Q", END):
                return
            if key is not None:
                self._act(key)
                drawn_for = None

    def _act(self, key: str) -> None:
        self._message, showed_help = "", self._shows_help
        self._shows_help = key in ("?", "h") and not showed_help
        if showed_help or self._shows_help:
            return
        deck = self._pages.deck
        if key in _NEXT:
            self._turn(deck.after(self._place), "This is the last one.")
        elif key in _PREVIOUS:
            self._turn(deck.before(self._place), "This is the first one.")
        elif key in ("g", "home"):
            self._turn(deck.after(None), "")
        elif key in ("G", "end"):
            self._say("Looking for the last one ...")
            self._turn(deck.before(None), "")
        elif key in _SCROLLS:
            self._first_line = min(max(self._first_line + _SCROLLS[key], 0), self._most_lines)
        elif key == "e" and self._pages.can_explain:
            self._explained = not self._explained
        elif key == "e":
            self._message = "Give a model to explain with: --explain MODEL"

    def _turn(self, place: Any, otherwise: str) -> None:
        if place is None:
            self._message = otherwise
        elif place != self._place:
            self._place, self._first_line = place, 0

    def _say(self, text: str) -> None:
        columns, rows = self._terminal.size()
        self._terminal.write(f"\x1b[{rows};1H\x1b[K{text[: columns - 1]}")

    def _draw(self, columns: int, rows: int) -> None:
        look = replace(self._look, columns=columns)
        if self._shows_help:
            lines = [line for keys, text in KEYS for line in wrap(f"{self._plain(keys)}: {text}", columns)]
            self._write(lines[: rows - 1], "", "any key goes back", columns, rows)
            return
        page = self._page(look)
        head = page.head[: max(1, rows // 3)]
        room = rows - 1 - len(head)
        drawn = None
        most = max(room // 2, room - len(page.tail))
        if page.picture is not None and most >= MIN_PICTURE_ROWS:
            drawn = self._pages.pictures.draw(page.picture, columns, most)
            room -= drawn.rows
        self._most_lines = max(0, len(page.tail) - room)
        self._first_line = min(self._first_line, self._most_lines)
        shown = page.tail[self._first_line :][:room]
        lines = [*head, *[""] * (drawn.rows if drawn else 0), *shown]
        picture = f"\x1b[{len(head) + 1};1H{drawn.text}" if drawn else ""
        self._write(lines, picture, self._message or self._hint(columns), columns, rows)

    def _page(self, look: Look) -> Page:
        """The page of now; made once, as a model may take its time."""
        asked = (self._place, self._explained, look)
        if self._made is None or self._made[0] != asked:
            if self._explained:
                self._say("Explaining ...")
            self._made = asked, self._pages.page(self._place, look, explained=self._explained)
        return self._made[1]

    def _hint(self, columns: int) -> str:
        """The keys, or those of them that there is room for."""
        more = self._most_lines - self._first_line
        explain = "e explain" if self._pages.can_explain else ""
        for hints in (
            (f"j {more} more lines" if more else "", "n next", "p previous", "g first", "G last", explain, "q quit"),
            ("j more" if more else "", "n next", "p prev", "q quit"),
            (),
        ):
            text = "  ".join([*filter(None, hints), "? help"])
            if len(text) < columns:
                break
        return text

    def _write(self, lines: list[str], picture: str, footer: str, columns: int, rows: int) -> None:
        """A whole screen, at once."""
        text = f"\x1b[H\x1b[2J{self._pages.pictures.erase}"
        text += "".join(f"\x1b[{number};1H{line}" for number, line in enumerate(lines, 1) if line)
        self._terminal.write(f"{text}{picture}\x1b[{rows};1H{footer[: columns - 1]}")

    def _plain(self, text: str) -> str:
        names = (("→", "right"), ("←", "left"), ("↓", "down"), ("↑", "up"))
        for arrow, name in names if self._look.plain else ():
            text = text.replace(arrow, name)
        return text
