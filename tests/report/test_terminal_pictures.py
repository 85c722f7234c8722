"""Pictures as text for terminals, decoded again; which way of drawing is chosen for which terminal."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pyte
import pytest
from PIL import Image

from capfilt.errors import UsageError
from capfilt.report.terminal import Cell
from capfilt.report.terminal_pictures import Pictures, choose_pictures
from tests.factories import draw_picture
from tests.report.terminals import (
    block_picture,
    clean_environment,
    difference,
    iterm2_pictures,
    kitty_pictures,
    sixel_pictures,
)

SHAPES = [(48, 40), (400, 100), (90, 700), (1, 1), (1200, 1000)]
BOXES = [(40, 10), (20, 30), (1, 1)]


@pytest.fixture(autouse=True)
def _many_colors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLORTERM", "truecolor")


def screen_of(text: str, columns: int, rows: int) -> pyte.Screen:
    screen = pyte.Screen(columns, rows)
    screen.set_mode(pyte.modes.LNM)
    pyte.Stream(screen).feed(text)
    return screen


@pytest.mark.parametrize("protocol", ["kitty", "iterm2", "sixel", "blocks"])
@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_drawn_is_the_picture(protocol: str, shape: tuple[int, int]) -> None:
    picture = draw_picture(3, width_px=shape[0], height_px=shape[1])
    for columns, rows in BOXES:
        drawn = Pictures(protocol, Cell(10, 20)).draw(picture, columns, rows)  # type: ignore[arg-type]
        assert 1 <= drawn.rows <= rows
        if protocol == "kitty":
            ((keys, seen),) = kitty_pictures(drawn.text)
            assert (keys["a"], keys["f"], keys["q"]) == ("T", "100", "2"), "shown at once, a PNG, no answers"
            cells = (int(keys["c"]), int(keys["r"]))
        elif protocol == "iterm2":
            ((options, seen),) = iterm2_pictures(drawn.text)
            assert options["inline"] == "1"
            cells = (int(options["width"]), int(options["height"]))
        elif protocol == "sixel":
            (seen,) = sixel_pictures(drawn.text)
            assert re.search(r"[?-~].*#\d+;2;", drawn.text.partition('"')[2]) is None, (
                "a colour defined amid the pixels"
            )
            cells = (seen.width // 10, seen.height // 20)
            assert seen.size == (cells[0] * 10, cells[1] * 20)
        else:
            screen = screen_of(drawn.text, 80, 40)
            assert (screen.cursor.y, screen.cursor.x) == (drawn.rows, 0)
            width = sum(cell.data == "▀" for cell in screen.buffer[0].values())
            seen, cells = block_picture(screen, 0, 0, width, drawn.rows), (width, drawn.rows)
        assert cells[0] <= columns
        assert cells[1] == drawn.rows
        assert cells[0] == columns or cells[1] == rows, "as large as there is room"
        if min(shape) > 1 and (columns, rows) != (1, 1):
            assert difference(seen, picture) < (12 if protocol == "sixel" else 4)
            assert 0.6 < (10 * cells[0] / (20 * cells[1])) / (shape[0] / shape[1]) < 1.7
        assert seen.width * seen.height <= max(shape[0] * shape[1], columns * 10 * rows * 20)


@pytest.mark.parametrize("protocol", ["kitty", "iterm2", "sixel"])
def test_the_cursor_ends_below_the_picture(protocol: str) -> None:
    drawn = Pictures(protocol, Cell(10, 20)).draw(draw_picture(1), 20, 6)  # type: ignore[arg-type]
    before, _, after = drawn.text.partition("\x1b7")
    assert before == "\n" * drawn.rows
    assert after.startswith(f"\x1b[{drawn.rows}A")
    assert after.endswith("\x1b8")


def test_a_file_that_a_decoder_may_fear_is_never_handed_on() -> None:
    """What is in a PNG besides its pixels stays behind."""
    buffer = io.BytesIO()
    picture = draw_picture(1)
    picture.info["comment"] = "\x1b]0;owned\x07"
    picture.save(buffer, "PNG", pnginfo=None)
    drawn = Pictures("kitty").draw(Image.open(buffer).convert("RGB"), 10, 10)
    ((_, seen),) = kitty_pictures(drawn.text)
    assert seen.info == {}


class FakeScreen(io.StringIO):
    """Says what it is, and nothing else of a terminal: no size."""

    encoding = "utf-8"

    def __init__(self, is_terminal: bool) -> None:
        super().__init__()
        self._is_terminal = is_terminal

    def isatty(self) -> bool:
        return self._is_terminal


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"TERM": "xterm-kitty"}, "kitty"),
        ({"TERM": "xterm-256color", "KITTY_WINDOW_ID": "1"}, "kitty"),
        ({"TERM": "xterm-ghostty", "TERM_PROGRAM": "ghostty"}, "kitty"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "iTerm.app"}, "iterm2"),
        ({"TERM": "xterm-256color", "LC_TERMINAL": "iTerm2"}, "iterm2"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "WezTerm"}, "iterm2"),
        ({"TERM": "xterm-256color"}, "blocks"),
        ({"TERM": "xterm-256color", "NO_COLOR": "1"}, "none"),
        ({"TERM": "xterm-kitty", "NO_COLOR": "1"}, "kitty"),
        ({"TERM": "screen-256color", "KITTY_WINDOW_ID": "1", "TMUX": "/tmp/x,1,0"}, "blocks"),
        ({"TERM": "tmux-256color", "LC_TERMINAL": "iTerm2"}, "blocks"),
        ({"TERM": "dumb"}, "none"),
        ({}, "none"),
    ],
)
def test_which_way_is_chosen(environment: dict[str, str], expected: str) -> None:
    assert choose_pictures("auto", None, FakeScreen(True), environment).protocol == expected
    assert choose_pictures("auto", None, FakeScreen(False), environment).protocol == "none"
    for asked in ("kitty", "iterm2", "sixel", "blocks", "none"):
        assert choose_pictures(asked, None, FakeScreen(False), environment).protocol == asked
    with pytest.raises(UsageError, match="--pictures is 'ascii'"):
        choose_pictures("ascii", None, FakeScreen(True), environment)


def test_the_library_never_speaks_to_the_terminal(tmp_path: Path) -> None:
    """In a real pseudo-terminal, where it would ask when it is imported, and for the size of the cells."""
    master, slave = os.openpty()
    code = (
        "import sys; from PIL import Image; from capfilt.report.terminal_pictures import Pictures\n"
        "p = Image.new('RGB', (9, 9)); out = sys.argv[1]\n"
        "open(out, 'w').write(Pictures('sixel').draw(p, 4, 4).text + Pictures('blocks').draw(p, 4, 4).text)\n"
        "assert sys.__stdout__.isatty()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "out")], stdin=slave, stdout=slave, stderr=subprocess.PIPE,
        env=clean_environment(TERM="xterm"), check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    os.set_blocking(master, False)
    with pytest.raises(BlockingIOError):
        os.read(master, 1)
    assert len(sixel_pictures((tmp_path / "out").read_text())) == 1
    os.close(master)
    os.close(slave)
