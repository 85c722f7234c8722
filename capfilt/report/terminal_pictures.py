"""Pictures in a terminal: by the protocols of kitty and iTerm2, as sixels, or as half blocks in colour.

In: an RGB picture that was decoded here, and the cells there are for it. Out: text for a terminal. kitty's and iTerm2's
protocols are each an escape sequence around a PNG made of the pixels alone; sixels and half blocks come from
textual-image.
"""

from __future__ import annotations

import base64
import io
import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, TextIO, cast, get_args

from PIL import Image

from capfilt.errors import UsageError
from capfilt.progress import speaks_unicode
from capfilt.report.terminal import Answers, Cell, Terminal, cell_of

Protocol = Literal["kitty", "iterm2", "sixel", "blocks", "none"]
USUAL_CELL = Cell(10, 20)
"""Where a terminal does not say."""

_KITTY_CHUNK = 4096
_SIXELS = re.compile(r"(\x1bP[0-9;]*q\"[0-9;]*)(.*?\x1b\\)", re.DOTALL)
_SIXEL_COLOR = re.compile(r"(#\d+);2;\d+;\d+;\d+")
_TERMS = {"xterm-kitty": "kitty", "xterm-ghostty": "kitty", "mintty": "iterm2"}
_PROGRAMS = {"kitty": "kitty", "ghostty": "kitty", "iTerm.app": "iterm2", "iTerm2": "iterm2", "WezTerm": "iterm2",
             "mintty": "iterm2"}  # fmt: skip
_INSIDE_ANOTHER = ("TMUX", "STY", "ZELLIJ")


@dataclass(frozen=True)
class Drawn:
    """A picture as text."""

    text: str
    """Leaves the cursor at the beginning of the line below the picture; it takes `rows` lines."""
    rows: int


@dataclass(frozen=True)
class Pictures:
    """Draws pictures in one way."""

    protocol: Protocol
    cell: Cell = USUAL_CELL

    def draw(self, picture: Image.Image, columns: int, rows: int) -> Drawn:
        """An RGB picture as large as it can be within so many cells, its shape kept."""
        width, height = self._fitted(picture, columns, rows)
        if self.protocol == "blocks":
            return Drawn(self._half_blocks(picture, width, height), height)
        data = {"kitty": self._kitty, "iterm2": self._iterm2, "sixel": self._sixel}[self.protocol](
            picture, width, height
        )
        # room first, as the screen may have to scroll; then the picture from its upper corner, and back
        return Drawn("\n" * height + f"\x1b7\x1b[{height}A{data}\x1b8", height)

    @property
    def erase(self) -> str:
        """What a screen needs besides being cleared."""
        return "\x1b_Ga=d,d=A,q=2;\x1b\\" if self.protocol == "kitty" else ""

    def _fitted(self, picture: Image.Image, columns: int, rows: int) -> tuple[int, int]:
        """(columns, rows) that it takes."""
        cell = self.cell
        scale = min(columns * cell.width / picture.width, rows * cell.height / picture.height)
        width, height = picture.width * scale / cell.width, picture.height * scale / cell.height
        return min(max(1, round(width)), columns), min(max(1, round(height)), rows)

    def _png(self, picture: Image.Image, width: int, height: int) -> bytes:
        """With no more pixels than the cells have; the terminal enlarges it."""
        size = (width * self.cell.width, height * self.cell.height)
        if picture.width > size[0] or picture.height > size[1]:
            picture = picture.resize(size, Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        picture.save(buffer, "PNG", compress_level=3)
        return buffer.getvalue()

    def _kitty(self, picture: Image.Image, width: int, height: int) -> str:
        data = base64.b64encode(self._png(picture, width, height)).decode("ascii")
        chunks = [data[start : start + _KITTY_CHUNK] for start in range(0, len(data), _KITTY_CHUNK)]
        keys = [f"a=T,f=100,q=2,C=1,c={width},r={height},", *[""] * (len(chunks) - 1)]
        more = [1] * (len(chunks) - 1) + [0]
        parts = zip(keys, more, chunks, strict=True)
        return "".join(f"\x1b_G{key}m={follows};{chunk}\x1b\\" for key, follows, chunk in parts)

    def _iterm2(self, picture: Image.Image, width: int, height: int) -> str:
        png = self._png(picture, width, height)
        options = f"inline=1;size={len(png)};width={width};height={height};preserveAspectRatio=0;doNotMoveCursor=1"
        return f"\x1b]1337;File={options}:{base64.b64encode(png).decode('ascii')}\x07"

    def _sixel(self, picture: Image.Image, width: int, height: int) -> str:
        with _told_instead_of_asking(self.cell):
            from textual_image.renderable import SixelImage

            found = _SIXELS.search(_rendered(SixelImage(picture, width, height), width))
        if found is None:
            raise RuntimeError("textual-image gave no sixels")
        return _colors_first(*found.groups())

    def _half_blocks(self, picture: Image.Image, width: int, height: int) -> str:
        with _told_instead_of_asking(self.cell):
            from textual_image.renderable import HalfcellImage

            return _rendered(HalfcellImage(picture, width, height), width)


def _colors_first(head: str, body: str) -> str:
    """Sixels with every colour defined before the first pixel.

    textual-image defines one where it is first used; of the six rows in which that happens xterm (379) paints parts in
    other colours.
    """
    return head + "".join(color[0] for color in _SIXEL_COLOR.finditer(body)) + _SIXEL_COLOR.sub(r"\1", body)


def _rendered(renderable: object, columns: int) -> str:
    """What rich makes of it, in as many colours as the terminal is said to have."""
    from rich.console import Console

    console = Console(
        file=io.StringIO(), force_terminal=True, color_system=_colors(os.environ), no_color=False, width=columns,
        height=1000, legacy_windows=False,
    )  # fmt: skip
    console.print(renderable, end="")
    return cast(io.StringIO, console.file).getvalue()


def _colors(environment: Mapping[str, str]) -> Literal["standard", "256", "truecolor"]:
    term = environment.get("TERM", "")
    if environment.get("COLORTERM") in ("truecolor", "24bit") or term.endswith("-direct"):
        return "truecolor"
    if term in _TERMS or term.startswith(("alacritty", "foot", "wezterm")):
        return "truecolor"
    return "standard" if term == "linux" else "256"


@contextmanager
def _told_instead_of_asking(cell: Cell) -> Iterator[None]:
    """textual-image asks the terminal what it can do when it is imported, and how large its cells are; the answers
    would be found among the keys. Without a terminal it takes what the environment says."""
    told = {"TEXTUAL_CELL_WIDTH": str(cell.width), "TEXTUAL_CELL_HEIGHT": str(cell.height)}
    before, stdout = {name: os.environ.get(name) for name in told}, sys.__stdout__
    try:
        sys.__stdout__ = io.StringIO()  # type: ignore[misc]
        os.environ.update(told)
        yield
    finally:
        sys.__stdout__ = stdout  # type: ignore[misc]
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def choose_pictures(
    asked: str, terminal: Terminal | None, screen: TextIO, environment: Mapping[str, str] = os.environ
) -> Pictures:
    """How to draw. `auto` is the best that the terminal can do, and nothing where there is none.

    The terminal is asked where the environment does not say. UsageError for another name.
    """
    known = ("auto", *get_args(Protocol))
    if asked not in known:
        raise UsageError(f"--pictures is {asked!r}; expected one of {', '.join(known)}.")
    cell = cell_of(screen)
    protocol = asked if asked != "auto" else _by_environment(screen, environment)
    answers = Answers()
    if terminal is not None and (protocol is None or (protocol == "sixel" and cell is None)):
        answers = terminal.ask()
    if protocol is None:
        protocol = _by_answers(answers, environment)
    if protocol is None:
        protocol = "blocks" if speaks_unicode(screen) and not environment.get("NO_COLOR") else "none"
    return Pictures(cast(Protocol, protocol), cell or answers.cell or USUAL_CELL)


def _by_environment(screen: TextIO, environment: Mapping[str, str]) -> str | None:
    if not screen.isatty() or environment.get("TERM", "") in ("", "dumb"):
        return "none"
    if _is_inside_another(environment):
        return None
    if environment.get("KITTY_WINDOW_ID"):
        return "kitty"
    programs = [environment.get(name, "") for name in ("TERM_PROGRAM", "LC_TERMINAL")]
    known = [_TERMS.get(environment["TERM"]), *(_PROGRAMS.get(program) for program in programs)]
    return next((protocol for protocol in known if protocol), None)


def _by_answers(answers: Answers, environment: Mapping[str, str]) -> str | None:
    program = re.split(r"[ (]", answers.name)[0]
    if program in _PROGRAMS and not _is_inside_another(environment):
        return _PROGRAMS[program]
    return "sixel" if answers.has_sixel else None


def _is_inside_another(environment: Mapping[str, str]) -> bool:
    """Whether a multiplexer is between, which shows what it knows itself: the environment may be of the outer one."""
    inside = any(environment.get(name) for name in _INSIDE_ANOTHER)
    return inside or environment.get("TERM", "").startswith(("screen", "tmux"))
