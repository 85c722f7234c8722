"""Overlays and panels: sizes, places, and titles of any script."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from capfilt.report import gradcam
from capfilt.report.gradcam import Panel, draw_panels, overlay, word_title
from tests import factories

GREY = (128, 128, 128)


def opened(png: bytes) -> np.ndarray:
    image = Image.open(io.BytesIO(png))
    assert image.format == "PNG"
    return np.asarray(image.convert("RGB"))


@pytest.mark.parametrize(("row", "column"), [(0, 0), (1, 3), (5, 2)])
def test_the_warmest_place_is_that_of_the_map_in_the_pictures_aspect(row: int, column: int) -> None:
    picture = Image.new("RGB", (300, 120), GREY)
    map_66 = np.zeros((6, 6), dtype=np.float32)
    map_66[row, column] = 1e-6
    pixels = overlay(picture, map_66).astype(int)
    assert pixels.shape == (120, 300, 3)
    warmth = pixels[..., 0] - pixels[..., 2]
    y, x = np.unravel_index(warmth.argmax(), warmth.shape)
    assert (y // 20, x // 50) == (row, column)
    far = pixels[110 if row < 3 else 10, 290 if column < 3 else 10]
    assert abs(far - np.array(GREY)).max() < 35, "the picture shows through where nothing is seen"


def test_a_map_is_stretched_bicubically() -> None:
    """Along a ramp the warmth never falls; a nearest or blocky one would have steps as wide as a patch."""
    ramp = np.tile(np.linspace(0, 1, 8, dtype=np.float32), (8, 1))
    pixels = overlay(Image.new("RGB", (160, 160), (0, 0, 0)), ramp)
    assert len({tuple(pixel) for pixel in pixels[80]}) > 100


def test_a_map_of_zeros_and_a_single_patch() -> None:
    picture = factories.draw_picture(1)
    flat = overlay(picture, np.zeros((4, 4), dtype=np.float32))
    assert flat.shape == (40, 48, 3)
    one = overlay(picture, np.ones((1, 1), dtype=np.float32))
    assert (one.astype(int) - flat)[..., 0].min() > -255
    assert not np.array_equal(one, flat)


def test_panels_hold_the_overlays_pixel_by_pixel() -> None:
    picture = factories.draw_picture(2, width_px=240, height_px=200)
    maps = [np.random.default_rng(seed).random((5, 5)) for seed in range(5)]
    sheet = opened(draw_panels(picture, [Panel(f"word {n}", one) for n, one in enumerate(maps)], "match 0.9: a word"))
    for map_55 in maps:
        wanted = overlay(picture, map_55)
        places = np.argwhere((sheet[: -199 or None, :-239] == wanted[0, 0]).all(axis=2))
        assert any(np.array_equal(sheet[y : y + 200, x : x + 240], wanted) for y, x in places)
    background = (sheet == 255).all(axis=2).mean()
    assert 0.1 < background < 0.6


@pytest.mark.parametrize("size", [(7, 5), (16, 300), (3000, 200)])
def test_small_and_slender_pictures_keep_their_aspect(size: tuple[int, int]) -> None:
    picture = gradcam._resized(factories.draw_picture(3, width_px=size[0], height_px=size[1]), 4)
    assert max(picture.size) >= gradcam.MIN_PANEL_PX
    assert picture.width / picture.height == pytest.approx(size[0] / size[1], rel=0.05)
    assert opened(draw_panels(picture, [Panel("a", np.eye(3))] * 4, "x")).size


def test_large_pictures_are_drawn_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradcam, "MAX_PIXELS", 1_000_000)
    sheet = opened(draw_panels(Image.new("RGB", (2000, 1000), GREY), [Panel("a", np.eye(4))] * 8, "x"))
    assert 0.9e6 < sheet.shape[0] * sheet.shape[1] < 1.4e6


@pytest.mark.parametrize(
    "text",
    [
        "$\\frac{1$",
        "汉字 и 🐶 العربية עברית हिन्दी ภาษา",
        "\x1b[31mred\x07\u202eright to left",
        "\ud800 lone",
        "",
        "{}%s\\n",
        "W" * 3000,
        "word " * 600,
    ],
)
def test_titles_and_headings_of_any_text(text: str) -> None:
    picture = factories.draw_picture(4)
    sheet = opened(draw_panels(picture, [Panel(word_title(text, 0.5), np.eye(3)), Panel(text, np.eye(3))], text))
    assert sheet.shape[0] < 1000
    assert sheet.shape[1] < 1000


def test_word_titles() -> None:
    assert word_title("dog", 0.345) == "dog 34%"
    assert word_title("\x1b[0m", 1.0) == "\\x1b[0m 100%"
    assert len(word_title("donaudampfschifffahrtsgesellschaft", 0.0)) <= 20
