"""A terminal that a person sits at: its size, its answers, its keys, and its state, which is given back.

In: file descriptors of a terminal. Out: keys by name, and what it says of itself. Nothing waits longer than it is told
to; what a terminal answers too late is taken for no key, and is not left to the shell.
"""

from __future__ import annotations

import fcntl
import os
import re
import select
import struct
import termios
import time
import tty
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple, Self, TextIO

ANSWER_SECONDS = 0.5
"""Waited for an answer: what is farther away than this is taken for a terminal that knows no pictures."""
_SEQUENCE_SECONDS = 0.05
_MAX_ANSWER_BYTES = 4096

_ASKED = b"\x1b[>q\x1b[16t\x1b[c"
"""Its name, the size of a cell, and what every terminal answers, which ends the answers."""
_NAME, _CELL = re.compile(rb"\x1bP>\|([^\x1b]*)\x1b\\"), re.compile(rb"\x1b\[6;(\d{1,4});(\d{1,4})t")
_ATTRIBUTES = re.compile(rb"\x1b\[\?([0-9;]*)c")
_SEQUENCE = re.compile(rb"\x1b\[[0-?]*[ -/]*[@-~]|\x1bO[@-~]|\x1b[P\]_^X][^\x07\x1b]*(?:\x07|\x1b\\)")
_BEGUN_SEQUENCE = re.compile(rb"\x1b(?:\[[0-?]*[ -/]*|O|[P\]_^X][^\x07\x1b]*\x1b?)?")
END = "end of input"
"""Given for a key when there will be no more."""
_NAMES = {
    b"\x1b[A": "up", b"\x1b[B": "down", b"\x1b[C": "right", b"\x1b[D": "left", b"\x1bOA": "up", b"\x1bOB": "down",
    b"\x1bOC": "right", b"\x1bOD": "left", b"\x1b[H": "home", b"\x1b[F": "end", b"\x1b[1~": "home", b"\x1b[4~": "end",
    b"\x1b[5~": "page up", b"\x1b[6~": "page down", b"\r": "enter", b"\n": "enter", b"\x7f": "backspace",
    b"\x04": END,
}  # fmt: skip
_ENTER_SCREEN, _LEAVE_SCREEN = "\x1b[?1049h\x1b[?25l", b"\x1b\\\x1b[0m\x1b[?25h\x1b[?1049l"


class Cell(NamedTuple):
    """Size of a character's cell, in pixels."""

    width: int
    height: int


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What a terminal said of itself."""

    name: str = ""
    """With its version, as its makers write it."""
    has_sixel: bool = False
    cell: Cell | None = None


class Terminal:
    """Keys and screen. Within its context keys come one by one, and are not shown; then the terminal is as it was.

    What ends the process without leaving the context must call `give_back`.
    """

    def __init__(self, keys: int, screen: TextIO) -> None:
        self._keys, self._screen = keys, screen
        self._before = termios.tcgetattr(keys)
        self._read, self._has_ended = b"", False
        self._owes_an_answer = self._has_own_screen = False

    def __enter__(self) -> Self:
        self._screen.flush()
        tty.setcbreak(self._keys, termios.TCSANOW)
        changed = termios.tcgetattr(self._keys)
        changed[6][termios.VSUSP] = b"\0"  # stopped, it would leave the shell a terminal that shows nothing
        termios.tcsetattr(self._keys, termios.TCSANOW, changed)
        return self

    def __exit__(self, *_: object) -> None:
        self.give_back()

    def give_back(self) -> None:
        """Leave it as it was; nothing where that has been done."""
        how = termios.TCSAFLUSH if self._owes_an_answer else termios.TCSADRAIN
        with suppress(OSError, termios.error):  # it may be gone
            if self._has_own_screen:
                self._has_own_screen = False
                os.write(self._screen.fileno(), _LEAVE_SCREEN)
            termios.tcsetattr(self._keys, how, self._before)

    def write(self, text: str) -> None:
        """Write to the screen: not by its buffer, which would keep the rest of a picture that Ctrl-C came into."""
        rest = memoryview(text.encode(self._screen.encoding, "replace"))
        while rest:
            rest = rest[os.write(self._screen.fileno(), rest) :]

    def size(self) -> tuple[int, int]:
        """(columns, rows)"""
        found = os.get_terminal_size(self._screen.fileno())
        return found.columns or 80, found.lines or 24

    def ask(self, seconds: float = ANSWER_SECONDS) -> Answers:
        """Ask it for its name, the size of its cells and what it can do."""
        self.write(_ASKED.decode("ascii"))
        self._owes_an_answer, end = True, time.monotonic() + seconds
        while self._owes_an_answer and len(self._read) < _MAX_ANSWER_BYTES:
            if not self._fill(end - time.monotonic()):
                break
            self._owes_an_answer = _ATTRIBUTES.search(self._read) is None
        name, cell, attributes = (pattern.search(self._read) for pattern in (_NAME, _CELL, _ATTRIBUTES))
        for pattern in (_NAME, _CELL, _ATTRIBUTES):
            self._read = pattern.sub(b"", self._read)
        return Answers(
            name=name[1].decode("ascii", "replace") if name else "",
            has_sixel=attributes is not None and b"4" in attributes[1].split(b";"),
            cell=Cell(max(1, int(cell[2])), max(1, int(cell[1]))) if cell else None,
        )

    def read_key(self, seconds: float) -> str | None:
        """The next key by its name or character; None where none comes in time, and for what is no key of ours."""
        if not self._read and not self._fill(seconds):
            return END if self._has_ended else None
        while len(self._read) < _MAX_ANSWER_BYTES and _BEGUN_SEQUENCE.fullmatch(self._read):
            if not self._fill(_SEQUENCE_SECONDS):
                break
        found = _SEQUENCE.match(self._read)
        key = found[0] if found else self._read[:1]
        self._read = self._read[len(key) :]
        return _NAMES.get(key) or (key.decode("ascii") if len(key) == 1 and b" " <= key <= b"~" else None)

    def _fill(self, seconds: float) -> bool:
        """Read what is there; whether anything came, the end included."""
        ready, _, _ = select.select([self._keys], [], [], max(0.0, seconds))
        if not ready:
            return False
        try:
            found = os.read(self._keys, 1024)
        except OSError:  # it is gone
            found = b""
        self._has_ended = not found
        self._read += found
        return bool(found)

    def open_own_screen(self) -> None:
        """A screen beside the one with what was printed before, without a cursor, until the terminal is given back."""
        self._has_own_screen = True
        self.write(_ENTER_SCREEN)


def is_a_persons(keys: TextIO, screen: TextIO, environment: Mapping[str, str]) -> bool:
    """Whether somebody can see the screen and press keys: both are a terminal, which is given to this process."""
    try:
        if not (keys.isatty() and screen.isatty()) or environment.get("TERM", "") in ("", "dumb"):
            return False
        return os.tcgetpgrp(keys.fileno()) == os.getpgrp()
    except (OSError, ValueError):
        return False


def cell_of(screen: TextIO) -> Cell | None:
    """Size of a cell as the system knows it; None where it does not, or where there is no terminal."""
    try:
        answer = fcntl.ioctl(screen.fileno(), termios.TIOCGWINSZ, bytes(8))
    except (OSError, ValueError):
        return None
    rows, columns, width, height = struct.unpack("HHHH", answer)
    cell = Cell(width // columns if columns else 0, height // rows if rows else 0)
    return cell if min(cell) > 0 else None
