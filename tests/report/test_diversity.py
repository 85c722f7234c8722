"""How much captions differ, beside NLTK's BLEU and plain counting."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu

from capfilt.report.diversity import distinct_n, diversity_of, self_bleu

TEXTS = st.lists(st.lists(st.sampled_from("abcde"), min_size=1, max_size=9), min_size=2, max_size=6)


@given(TEXTS)
def test_self_bleu_is_nltk_s(texts: list[list[str]]) -> None:
    smooth = SmoothingFunction(epsilon=0.1).method1
    expected = [
        sentence_bleu(texts[:number] + texts[number + 1 :], text, smoothing_function=smooth)
        for number, text in enumerate(texts)
    ]
    assert self_bleu(texts) == pytest.approx(sum(expected) / len(expected), abs=1e-9)


@given(TEXTS, st.integers(1, 3))
def test_distinct_n_by_counting(texts: list[list[str]], order: int) -> None:
    grams = ["".join(text[start : start + order]) for text in texts for start in range(len(text) - order + 1)]
    assert distinct_n(texts, order) == (len(set(grams)) / len(grams) if grams else 0.0)


def test_captions_alike_and_unlike() -> None:
    alike = diversity_of([["a red dog on the grass"] * 4])
    assert alike is not None
    assert (alike.num_images, alike.distinct_1, alike.distinct_2) == (1, 0.25, 0.25)
    assert alike.self_bleu == pytest.approx(1)
    unlike = diversity_of([["a b c d e", "f g h i j"], ["one alone"], ["", "two"]])
    assert unlike is not None
    assert (unlike.num_images, unlike.distinct_1, unlike.self_bleu) == (1, 1.0, 0.0)
    assert diversity_of([["one alone"], []]) is None
