"""Captions as BLIP's models know them. In: any text. Out: the text as it was prepared in their training."""

from __future__ import annotations

import re

_DROPPED_MARKS = re.compile(r"[.!\"()*#:;~]")
_SPACES = re.compile(r"\s+")


def clean_caption(text: str, max_words: int = 50) -> str:
    """Give `text` in lower case, without punctuation, at most `max_words` words (BLIP's released code)."""
    words = _SPACES.sub(" ", _DROPPED_MARKS.sub(" ", text.lower())).strip().split(" ")
    return " ".join(words[:max_words])
