"""Terminals for tests: a pseudo-terminal with a person's keys, and what pictures in its text look like."""

from __future__ import annotations

import base64
import codecs
import fcntl
import io
import os
import re
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import numpy as np
import pyte
from PIL import Image

SECONDS = 60
COMMAND = ("-m", "capfilt")
_LAUNCH = "import os, sys; os.login_tty(int(sys.argv[1])); os.execv(sys.executable, [sys.executable, *sys.argv[2:]])"
_OF_REAL_TERMINALS = (
    "TERM", "COLORTERM", "NO_COLOR", "TERM_PROGRAM", "LC_TERMINAL", "KITTY_WINDOW_ID", "TMUX", "STY", "ZELLIJ",
    "COLUMNS", "LINES",
)  # fmt: skip


def clean_environment(**changes: str) -> dict[str, str]:
    """This process's, without what tells of the terminal it may be in."""
    kept = {name: value for name, value in os.environ.items() if name not in _OF_REAL_TERMINALS}
    return {**kept, "PYTHONIOENCODING": "utf-8", **changes}


class Session:
    """A `capfilt` command, or another program, in a pseudo-terminal of its own."""

    def __init__(
        self, *arguments: object, columns: int = 80, rows: int = 24, cell: tuple[int, int] = (0, 0),
        term: str = "xterm", answer: Callable[[str], str] | None = None, program: Sequence[str] = COMMAND,
        **environment: str,
    ) -> None:  # fmt: skip
        self.columns, self.rows, self.text = columns, rows, ""
        self._answer = answer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.master, self.slave = os.openpty()
        self.resize(columns, rows, cell)
        self.before = termios.tcgetattr(self.slave)
        command = [sys.executable, "-c", _LAUNCH, str(self.slave), *program, *map(str, arguments)]
        self.process = subprocess.Popen(
            command, pass_fds=[self.slave], env=clean_environment(TERM=term, **environment), stdin=subprocess.DEVNULL
        )

    def __enter__(self) -> Session:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self.master)
        os.close(self.slave)

    def resize(self, columns: int, rows: int, cell: tuple[int, int] = (0, 0)) -> None:
        """Make it so large."""
        self.columns, self.rows = columns, rows
        size = struct.pack("HHHH", rows, columns, columns * cell[0], rows * cell[1])
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, size)

    def press(self, keys: str) -> None:
        os.write(self.master, keys.encode())

    def wait_for(self, pattern: str) -> str:
        """Read until the pattern is found in what came since the last call; gives all that came since then."""
        end, start = time.monotonic() + SECONDS, len(self.text)
        while not re.search(pattern, self.text[start:], re.DOTALL):
            assert time.monotonic() < end, (pattern, self.text[start:][-2000:])
            assert self._read(0.1) or self.process.poll() is None, (pattern, self.text[start:][-2000:])
        return self.text[start:]

    def end(self) -> int:
        """Read to the end; the exit code."""
        end = time.monotonic() + SECONDS
        while self._read(0.1) or self.process.poll() is None:
            assert time.monotonic() < end, self.text[-2000:]
        return self.process.wait()

    def left_for_the_shell(self) -> bytes:
        """What the next program would find typed."""
        before = termios.tcgetattr(self.slave)
        raw = [*before]
        raw[3] &= ~(termios.ICANON | termios.ECHO)
        termios.tcsetattr(self.slave, termios.TCSANOW, raw)
        ready, _, _ = select.select([self.slave], [], [], 0.1)
        return os.read(self.slave, 4096) if ready else b""

    def screen(self) -> pyte.Screen:
        """What is seen after all that came; not of text with pictures by kitty, iTerm2 or sixels."""
        screen = pyte.Screen(self.columns, self.rows)
        stream = pyte.Stream(screen)
        stream.feed(self.text.replace("\x1b[?1049h", "").replace("\x1b[?1049l", ""))
        return screen

    def _read(self, seconds: float) -> bool:
        ready, _, _ = select.select([self.master], [], [], seconds)
        if not ready:
            return False
        found = os.read(self.master, 65536)
        text = self._decoder.decode(found)
        self.text += text
        if self._answer and (said := self._answer(text)):
            os.write(self.master, said.encode())
        return True


def kitty_pictures(text: str) -> list[tuple[dict[str, str], Image.Image]]:
    """Pictures by kitty's protocol, each with the keys of its first part."""
    pictures: list[tuple[dict[str, str], Image.Image]] = []
    data, first = "", dict[str, str]()
    for keys, payload in re.findall(r"\x1b_G([^;\x1b]*);([^\x1b]*)\x1b\\", text):
        named = dict(pair.split("=") for pair in keys.split(",") if pair)
        if named.get("a") == "d":
            continue
        assert len(payload) <= 4096
        first, data = first or named, data + payload
        if named.get("m", "0") == "0":
            pictures.append((first, opened(data)))
            data, first = "", {}
    assert not data
    return pictures


def iterm2_pictures(text: str) -> list[tuple[dict[str, str], Image.Image]]:
    """Pictures by iTerm2's protocol, each with its options."""
    found = re.findall(r"\x1b\]1337;File=([^:]*):([^\x07]*)\x07", text)
    pictures = [(dict(pair.split("=") for pair in options.split(";")), data) for options, data in found]
    for options, data in pictures:
        assert int(options["size"]) == len(base64.b64decode(data, validate=True))
    return [(options, opened(data)) for options, data in pictures]


def opened(data: str) -> Image.Image:
    picture = Image.open(io.BytesIO(base64.b64decode(data, validate=True)))
    assert picture.format == "PNG"
    return picture.convert("RGB")


def sixel_pictures(text: str) -> list[Image.Image]:
    """Pictures in sixels, drawn as DEC's manual of the VT340 says."""
    return [_sixels(body) for body in re.findall(r"\x1bP[0-9;]*q(.*?)\x1b\\", text, re.DOTALL)]


def _sixels(body: str) -> Image.Image:
    width, height = map(int, re.match(r'"\d+;\d+;(\d+);(\d+)', body).groups())  # type: ignore[union-attr]
    pixels = np.zeros((height + 6, width, 3), np.uint8)
    colors: dict[int, Any] = {}
    x = y = color = 0
    for number, rgb, repeat, char, move in re.findall(
        r"#(\d+)(;2;\d+;\d+;\d+)?|(?:!(\d+))?([?-~])|([$-])", body.partition(";")[2].lstrip("0123456789;")
    ):
        if number:
            color = int(number)
            if rgb:
                colors[color] = [round(int(part) * 2.55) for part in rgb.split(";")[2:]]
        elif char:
            times = int(repeat or 1)
            for bit in range(6):
                if (ord(char) - 63) >> bit & 1:
                    pixels[y + bit, x : x + times] = colors[color]
            x += times
        else:
            x, y = 0, y + (6 if move == "-" else 0)
    return Image.fromarray(pixels[:height])


def block_picture(screen: pyte.Screen, top: int, left: int, width: int, height: int) -> Image.Image:
    """What half blocks show: the upper half of a cell in its colour, the lower one in its background."""
    pixels = np.zeros((2 * height, width, 3), np.uint8)
    for row in range(height):
        for column in range(width):
            cell = screen.buffer[top + row][left + column]
            assert cell.data == "▀", (row, column, cell)
            pixels[2 * row, column] = list(bytes.fromhex(cell.fg))
            pixels[2 * row + 1, column] = list(bytes.fromhex(cell.bg))
    return Image.fromarray(pixels)


def difference(picture: Image.Image, expected: Image.Image) -> float:
    """Mean distance of two pictures' values, 0 to 255, after the expected one was brought to the other's size."""
    resized = expected.convert("RGB").resize(picture.size, Image.Resampling.BICUBIC)
    return float(np.abs(np.asarray(picture, np.float32) - np.asarray(resized, np.float32)).mean())
