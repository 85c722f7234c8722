"""Only bytes that a terminal prints come out, whatever goes in."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capfilt.data.texts import clean_for_terminal

ANY_TEXT = st.text(st.characters(codec=None, exclude_categories=()), max_size=60)


@settings(max_examples=500, deadline=None)
@given(ANY_TEXT, st.integers(1, 80))
def test_output_is_one_printable_line_within_its_length(text: str, max_chars: int) -> None:
    cleaned = clean_for_terminal(text, max_chars)
    assert len(cleaned) <= max_chars
    cleaned.encode("utf-8")
    for char in cleaned:
        assert char in "\u200c\u200d" or unicodedata.category(char)[0] != "C", hex(ord(char))
        assert char not in "\u2028\u2029"


@settings(deadline=None)
@given(st.text(st.characters(categories=["L", "N", "P", "S"]), max_size=40))
def test_plain_text_passes_unchanged(text: str) -> None:
    assert clean_for_terminal(text) == text


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("a\x1b]0;title\x07b", "a\\x1b]0;title\\x07b"),
        ("a\x1b]52;c;aGk=\x1b\\", "a\\x1b]52;c;aGk=\\x1b\\"),
        ("\x9b31mred", "\\x9b31mred"),
        ("evil\u202egpj.exe", "evil\\u202egpj.exe"),
        ("two\r\nlines\tand\u2028more", "two  lines and more"),
        ("tag \U000e0041", "tag \\U000e0041"),
        ("lone \ud800", "lone \\ud800"),
        ("Straße — 猫 👩\u200d🚀", "Straße — 猫 👩\u200d🚀"),
        ("x" * 300, "x" * 199 + "…"),
    ],
)
def test_known_tricks(text: str, cleaned: str) -> None:
    assert clean_for_terminal(text) == cleaned
