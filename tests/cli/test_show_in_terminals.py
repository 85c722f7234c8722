"""`capfilt show` in real terminals on a virtual screen: the picture stands there, colours and sides in their places."""

from __future__ import annotations

import io
import os
import select
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.cli.conftest import capfilt

WIDTH_PX, HEIGHT_PX = 240, 160
COLOURS = np.array([[[215, 0, 95], [0, 175, 95]], [[95, 95, 215], [215, 175, 0]]], np.uint8)
"""Of the four quarters of the picture, by row and column; the palette of half blocks in xterm has them."""
NEAR = 24
"""Difference of a channel within which a colour is taken for it."""
SCREEN_WIDTH_PX, SCREEN_HEIGHT_PX = 1000, 800
TERMINALS = {
    "kitty": ["kitty", "--config", "NONE", "-o", "remember_window_size=no", "-o", "initial_window_width=900",
              "-o", "initial_window_height=700", "--"],
    "iterm2": ["mlterm", "-g", "90x40", "-e"],
    "sixel": ["xterm", "-ti", "vt340", "-fa", "monospace", "-geometry", "90x40+0+0", "-e"],
    "blocks": ["xterm", "-fa", "monospace", "-geometry", "90x40+0+0", "-e"],
}  # fmt: skip
"""Way of showing a picture → a terminal that knows it."""
ASKED = {"iterm2": ["--pictures", "iterm2"]}
"""mlterm knows sixels too, which it is given unasked."""

pytestmark = pytest.mark.skipif(shutil.which("Xvfb") is None, reason="no Xvfb is installed (Debian: apt install xvfb)")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("terminals")
    picture, content = COLOURS.repeat(HEIGHT_PX // 2, axis=0).repeat(WIDTH_PX // 2, axis=1), io.BytesIO()
    Image.fromarray(picture).save(content, "jpeg", quality=95)
    with tarfile.open(folder / "a.tar", "w") as tar:
        for name, body in (("000.jpg", content.getvalue()), ("000.txt", b"four colours")):
            member = tarfile.TarInfo(name)
            member.size = len(body)
            tar.addfile(member, io.BytesIO(body))
    assert capfilt("import", folder / "a.tar", folder / "run").code == 0
    return folder / "run"


class VirtualScreen:
    """An X server without a screen, and what stands on it."""

    def __init__(self, folder: Path) -> None:
        reading, writing = os.pipe()
        size = f"{SCREEN_WIDTH_PX}x{SCREEN_HEIGHT_PX}x24"
        self._process = subprocess.Popen(
            ["Xvfb", "-displayfd", str(writing), "-screen", "0", size, "-fbdir", str(folder), "-noreset"],
            pass_fds=[writing], stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(writing)
        with os.fdopen(reading) as answer:  # a whole line: it ends with it where nobody reads on
            assert select.select([answer], [], [], 60)[0], "Xvfb does not start"
            self.display = f":{answer.readline().strip()}"
        self._pixels = folder / "Xvfb_screen0"

    def pixels(self) -> np.ndarray:
        """(height, width, 3), RGB, uint8. The file is an X window dump: header, colour map, BGRX pixels."""
        data = self._pixels.read_bytes()
        header_size, *_ = header = np.frombuffer(data, ">u4", 25)
        bytes_per_line, num_colours = int(header[12]), int(header[19])
        start = int(header_size) + 12 * num_colours
        lines = np.frombuffer(data, np.uint8, SCREEN_HEIGHT_PX * bytes_per_line, start).reshape(SCREEN_HEIGHT_PX, -1, 4)
        return lines[:, :SCREEN_WIDTH_PX, 2::-1]

    def close(self) -> None:
        self._process.terminate()
        self._process.wait()


@pytest.fixture
def screen(tmp_path: Path) -> Iterator[VirtualScreen]:
    opened = VirtualScreen(tmp_path)
    yield opened
    opened.close()


def boxes(pixels: np.ndarray) -> np.ndarray:
    """(2, 2, 4): left, top, right and bottom of each quarter's colour; -1 where there is little of it."""
    found = np.full((2, 2, 4), -1)
    for place in np.ndindex(2, 2):
        ys, xs = np.nonzero((np.abs(pixels.astype(int) - COLOURS[place]) <= NEAR).all(-1))
        if len(xs) > 1000:
            found[place] = (*np.percentile(xs, [0.2, 99.8]), *np.percentile(ys, [0.2, 99.8]))
    return found[..., [0, 2, 1, 3]]


@pytest.mark.parametrize("way", TERMINALS)
def test_the_picture_stands_on_the_screen(way: str, run: Path, screen: VirtualScreen, tmp_path: Path) -> None:
    if shutil.which(TERMINALS[way][0]) is None:
        pytest.skip(f"no {TERMINALS[way][0]} is installed (Debian: apt install {TERMINALS[way][0]})")
    show = [sys.executable, "-m", "capfilt", "show", str(run), *ASKED.get(way, [])]
    clean = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "TERM", "COLUMNS", "LINES")}
    environment = {**clean, "DISPLAY": screen.display, "LC_ALL": "C.UTF-8", "LIBGL_ALWAYS_SOFTWARE": "1"}
    environment |= {"HOME": str(tmp_path)}  # no settings of whoever runs the test
    terminal = subprocess.Popen([*TERMINALS[way], *show], env=environment, stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 90
        while (found := boxes(screen.pixels())).min() < 0:
            assert time.monotonic() < end, f"{way}: the picture did not come: {found}"
            time.sleep(0.2)
        time.sleep(1)  # whatever is drawn over it
        found = boxes(screen.pixels())
    finally:
        terminal.terminate()
        terminal.wait()
    left, top, right, bottom = np.moveaxis(found, -1, 0)
    width, height = right.max() - left.min(), bottom.max() - top.min()
    assert width / height == pytest.approx(WIDTH_PX / HEIGHT_PX, rel=0.08)  # the nearest whole cells
    near = 0.04 * width + 4
    assert (np.abs(left - [[left.min(), left.min() + width / 2]] * 2) <= near).all()
    assert (np.abs(top - [[top.min()] * 2, [top.min() + height / 2] * 2]) <= near).all()
    assert (np.abs(right - left - width / 2) <= near).all()
    assert (np.abs(bottom - top - height / 2) <= near).all()
