"""Figures that a card does not state: of the embedded captioner and filter, which know the unseen scenes well."""

from __future__ import annotations

import pytest

from capfilt.figures import measure_greedy, measure_retrieval
from capfilt.weights.find import EMBEDDED_DIR, EMBEDDED_FOLDERS

NUM_SCENES = 30

pytestmark = pytest.mark.skipif(
    not all((EMBEDDED_DIR / folder).is_dir() for folder in EMBEDDED_FOLDERS.values()),
    reason="the embedded models are not built (make assets)",
)


def test_the_captioner_writes_truly_and_in_words_of_the_references() -> None:
    figures = measure_greedy(EMBEDDED_DIR / "blip-captioner", NUM_SCENES)
    assert figures["captions true"] >= 0.85
    assert 0.3 < figures["CIDEr"] < 10


def test_the_filter_finds_an_image_by_its_text_and_back() -> None:
    figures = measure_retrieval(EMBEDDED_DIR / "blip-filter", NUM_SCENES, k_test=NUM_SCENES)
    assert list(figures) == [
        f"{way} R@1, {head}" for head in ("ITC", "ITM") for way in ("image to text", "text to image")
    ]
    assert min(figures.values()) >= 0.7, "chance is 0.03"
    by_itc = measure_retrieval(EMBEDDED_DIR / "blip-filter", NUM_SCENES, k_test=1)
    for way in ("image to text", "text to image"):
        assert by_itc[f"{way} R@1, ITM"] == by_itc[f"{way} R@1, ITC"], "one candidate keeps its place"
