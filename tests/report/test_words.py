"""Words of many captions at once, against one caption at a time."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capfilt.report import words
from capfilt.report.words import WordCounts, count_words, distinct, plain_texts

ASSIGNED = st.characters(exclude_categories=["Cn", "Cs"])
"""Of the Unicode that Python knows; Arrow knows more."""

TEXTS = st.lists(
    st.one_of(
        st.text(ASSIGNED, max_size=20),
        st.text(st.sampled_from("ab'’Ü  .,_-9é猫\nीe\u0301❤\ufe0f"), max_size=20),
        st.none(),
    ),
    max_size=12,
)


def words_of(text: str | None) -> list[str]:
    """Runs of letters, numbers and apostrophes of a text in lower case, with the marks behind them."""
    lowered = pa.compute.utf8_lower(pa.scalar(text or "")).as_py().replace("’", "'")
    kinds = ["w" if char == "'" else unicodedata.category(char)[0] for char in lowered]
    found = re.finditer("[wLN][wLNM]*", "".join(kinds))
    return [lowered[one.start() : one.end()] for one in found]


@pytest.mark.parametrize("many", [0, 1000], ids=["by Arrow's expression", "by Python's"])
@pytest.mark.parametrize(
    ("text", "num"),
    [("हिन्दी भाषा", 2), ("it’s a dog", 3), ("cafe\u0301 au lait", 3), ("I ❤️ you", 2), ("\u0301", 0), ("สวัสดี", 1)],
)
def test_marks_belong_to_their_letters(many: int, text: str, num: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(words, "_MANY_TEXTS", many)
    assert count_words(plain_texts(pa.chunked_array([[text]]))).tolist() == [num]


@pytest.mark.parametrize("many", [0, 1000], ids=["by Arrow's expression", "by Python's"])
@given(TEXTS, st.integers(0, 3))
@settings(max_examples=300, deadline=None)
def test_words_are_those_of_each_text(many: int, texts: list[str | None], skipped: int) -> None:
    expected = [[word for word in words_of(text) if word] for text in texts[skipped:]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(words, "_MANY_TEXTS", many)
        plain = plain_texts(pa.chunked_array([pa.array(texts, pa.string())]).slice(skipped))
    assert [text.split() for text in plain.to_pylist()] == expected
    assert count_words(plain).tolist() == [len(own) for own in expected]
    counts, halves = WordCounts(), WordCounts()
    counts.add(plain)
    for half in (plain.slice(0, len(plain) // 2), plain.slice(len(plain) // 2)):
        one = WordCounts()
        one.add(half)
        halves.merge(one)
    everything = Counter(word for own in expected for word in set(own))
    assert counts.top(1000) == halves.top(1000) == dict(everything)
    assert list(counts.top(3)) == sorted(everything, key=lambda word: (-everything[word], word.encode()))[:3]


@given(st.lists(st.integers(-3, 3)))
def test_distinct(values: list[int]) -> None:
    assert distinct(np.array(values, np.int64)).tolist() == sorted(set(values))
