"""Captions as BLIP's models know them."""

from __future__ import annotations

import time

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capfilt.data.captions import clean_caption, has_words


def test_captions_are_cleaned_as_blip_does() -> None:
    assert clean_caption('A  "Red" Ball; (on the) grass!') == "a red ball on the grass"
    assert clean_caption("one two three", max_words=2) == "one two"


@pytest.mark.parametrize(
    "text",
    [
        "<p>a red ball</p>", "<b>A red ball</b>", '<a href="/x?a=1">a red</a> ball', "&nbsp;a red&nbsp;ball",
        "<!-- alt -->a red ball", "&lt;a red ball&gt;", "&quot;a red ball&quot;", '<img alt="" src="x"/>a red<br/>ball',
    ],
)  # fmt: skip
def test_markup_does_not_count(text: str) -> None:
    assert clean_caption(text) == "a red ball"


def test_what_is_no_tag_stays() -> None:
    assert clean_caption("1 < 2 and 3 > 2") == "1 2 and 3 2"
    assert clean_caption("fish & chips") == "fish & chips"


@given(st.text(st.characters(codec="utf-8"), max_size=200))
def test_any_text_is_prepared_once_and_for_all(text: str) -> None:
    cleaned = clean_caption(text)
    assert not set('<>"()*#:;~.!') & set(cleaned)
    assert clean_caption(clean_caption(cleaned)) == clean_caption(cleaned)
    assert len(cleaned.split()) <= 50


def test_comments_without_end_take_no_time() -> None:
    started = time.process_time()
    clean_caption("<!--" * 3000)
    assert time.process_time() - started < 2


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.text(st.sampled_from('ab .!"()*#:;~<>/&;lt猫\n\x0b\x1c\x85\u00a0\u2028\u3000'), max_size=12) | st.none(),
        max_size=8,
    )
)
def test_has_words_says_what_cleaning_leaves(texts: list[str | None]) -> None:
    found = has_words(pa.chunked_array([pa.array(texts, pa.string())])).to_pylist()
    assert found == [bool(clean_caption(text)) if text is not None else False for text in texts]
