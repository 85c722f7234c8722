"""Captions as BLIP's models know them. In: any text. Out: the text as it was prepared in their training."""

from __future__ import annotations

import html
import re

import pyarrow as pa
import pyarrow.compute as pc

_TAGS = re.compile(r"<!--.*?-->|</?[a-zA-Z][^<>]*>", re.DOTALL)
_DROPPED_MARKS = re.compile(r"[.!\"()*#:;~<>]")
_SPACES = re.compile(r"\s+")
_WORD = r"[^\s\p{Z}\x0b\x1c-\x1f\x{85}.!\"()*#:;~<>]"
"""What `clean_caption` leaves; RE2's \\s knows ASCII's spaces alone."""


def clean_caption(text: str, max_words: int = 50) -> str:
    """Give `text` in lower case, without markup and punctuation, at most `max_words` words.

    As BLIP's released code, but for HTML, which alt-text from the web holds now and then: tags and comments go,
    entities become what they stand for.
    """
    shown = html.unescape(_TAGS.sub(" ", text)).lower()
    words = _SPACES.sub(" ", _DROPPED_MARKS.sub(" ", shown)).strip().split(" ")
    return " ".join(words[:max_words])


def has_words(texts: pa.ChunkedArray) -> pa.ChunkedArray:
    """Whether something of each text is left by `clean_caption`; booleans."""
    seen = pc.match_substring_regex(texts, _WORD)
    in_doubt = pc.and_(seen, pc.match_substring_regex(texts, "[<&]"))  # tags and entities, which may be all there is
    if pc.any(in_doubt).as_py():
        cleaned = [not text or bool(clean_caption(text)) for text in pc.if_else(in_doubt, texts, "").to_pylist()]
        seen = pc.and_(seen, pa.array(cleaned, pa.bool_()))
    return pc.fill_null(seen, False)
