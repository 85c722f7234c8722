"""Captions as BLIP's models know them."""

from __future__ import annotations

from capfilt.data.captions import clean_caption


def test_captions_are_cleaned_as_blip_does() -> None:
    assert clean_caption('A  "Red" Ball; (on the) grass!') == "a red ball on the grass"
    assert clean_caption("one two three", max_words=2) == "one two"
