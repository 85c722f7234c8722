"""Maps over a picture's patches, drawn over the picture.

In: an RGB picture, maps as rows and columns of patches, titles. Out: an overlay as pixels, or a PNG with one panel
for each map. No display is needed.
"""

from __future__ import annotations

import io
import math
import textwrap
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from capfilt.data.texts import clean_for_terminal

MAX_PIXELS = 16_000_000
"""Of all panels together: larger pictures are drawn smaller."""
MIN_PANEL_PX = 192
"""Longest side of a panel at least: smaller pictures are drawn larger."""

_MAX_COLUMNS = 6
_GAP_PX, _LINE_PX, _CHARACTER_PX, _DPI = 12, 20, 8, 100
_TITLE_CHARS, _HEADING_CHARS, _HEADING_LINES = 20, 400, 6
_COLORS = "turbo"


@dataclass(frozen=True)
class Panel:
    """One map with its title."""

    title: str
    map: NDArray[Any]
    """(I, J) rows and columns of patches, none below 0."""


def overlay(picture: Image.Image, map_IJ: NDArray[Any]) -> NDArray[np.uint8]:
    """A map over a picture, (H, W, 3) at the picture's own size and aspect.

    The map is stretched to the picture bicubically, as the picture was squeezed to the model's square, and drawn in
    colours from its own greatest value (red) to 0 (blue, and the picture shows through). A map of zeros leaves the
    picture in blue.
    """
    from matplotlib import colormaps

    stretched = Image.fromarray(np.asarray(map_IJ, dtype=np.float32)).resize(picture.size, Image.Resampling.BICUBIC)
    heat_HW1 = np.clip(np.asarray(stretched), 0, None)[..., None]
    if (peak := float(heat_HW1.max())) > 0:
        heat_HW1 = heat_HW1 / peak
    colors_HWC = colormaps[_COLORS](heat_HW1[..., 0])[..., :3] * 255
    weight_HW1 = 0.2 + 0.45 * heat_HW1
    mixed_HWC = (1 - weight_HW1) * np.asarray(picture.convert("RGB"), dtype=np.float32) + weight_HW1 * colors_HWC
    return np.clip(mixed_HWC + 0.5, 0, 255).astype(np.uint8)


def draw_panels(picture: Image.Image, panels: Sequence[Panel], heading: str) -> bytes:
    """A PNG: the heading, then the panels in a grid, each an `overlay` under its title.

    Panels are as large as the picture, within MIN_PANEL_PX and MAX_PIXELS. Titles and heading are made safe and cut
    to fit; what the font lacks is drawn as a box.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    picture = _resized(picture, len(panels))
    columns = min(_MAX_COLUMNS, math.ceil(math.sqrt(len(panels))))
    cell_width = max(picture.width, (_TITLE_CHARS + 4) * _CHARACTER_PX) + _GAP_PX
    cell_height = picture.height + _LINE_PX + _GAP_PX
    width = columns * cell_width + _GAP_PX
    lines = textwrap.wrap(clean_for_terminal(heading, _HEADING_CHARS), max(width // _CHARACTER_PX - 2, 8))
    lines = lines[:_HEADING_LINES]
    top = _GAP_PX + len(lines) * _LINE_PX
    height = top + math.ceil(len(panels) / columns) * cell_height + _GAP_PX
    figure = Figure(figsize=(width / _DPI, height / _DPI), dpi=_DPI, facecolor="white")
    canvas = FigureCanvasAgg(figure)
    for number, line in enumerate(lines):
        _write(figure, line, _GAP_PX, height - _GAP_PX - number * _LINE_PX, bold=True)
    for number, panel in enumerate(panels):
        row, column = divmod(number, columns)
        left, upper = _GAP_PX + column * cell_width, height - top - row * cell_height
        _write(figure, panel.title, left, upper - 2)
        figure.figimage(overlay(picture, panel.map), xo=left, yo=upper - _LINE_PX - picture.height)
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph ")  # of scripts that matplotlib's own font lacks
        warnings.filterwarnings("ignore", message="Matplotlib currently does not support")
        canvas.print_png(buffer, metadata={"Software": "capfilt"}, pil_kwargs={"compress_level": 3})
    return buffer.getvalue()


def word_title(word: str, share: float) -> str:
    """A word, cut to fit, and its share in percent."""
    return f"{clean_for_terminal(word, _TITLE_CHARS - 5)} {share:.0%}"


def _write(figure: Any, text: str, left_px: int, upper_px: int, *, bold: bool = False) -> None:
    """One line of text, its upper left corner given in pixels from the left and from below."""
    width, height = (side * _DPI for side in figure.get_size_inches())
    figure.text(
        left_px / width,
        upper_px / height,
        clean_for_terminal(text, _HEADING_CHARS),
        fontsize=9,
        fontweight="bold" if bold else "normal",
        verticalalignment="top",
        parse_math=False,
    )


def _resized(picture: Image.Image, num_panels: int) -> Image.Image:
    """The picture in a size in which its panels are neither too small nor, together, too large."""
    factor = max(1.0, MIN_PANEL_PX / max(picture.size))
    factor = min(factor, math.sqrt(MAX_PIXELS / num_panels / (picture.width * picture.height)))
    if factor == 1:
        return picture
    size = (max(1, round(picture.width * factor)), max(1, round(picture.height * factor)))
    return picture.resize(size, Image.Resampling.BICUBIC)
