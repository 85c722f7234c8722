"""Ranks and recalls against plain loops, ties included."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from capfilt.evaluate.ranking import match_ranks, recall_at, recalls_of

FEW = st.sampled_from([-1.0, 0.0, 0.25, 0.5, 1.0])


def rank_by_loop(scores: list[float], matches: list[bool]) -> int:
    """Sorted with every false candidate before the true ones of its score."""
    order = sorted(zip(scores, matches, strict=True), key=lambda pair: (-pair[0], pair[1]))
    places = [place for place, (_, is_match) in enumerate(order, 1) if is_match]
    return places[0] if places else 0


@given(arrays(np.float32, (5, 7), elements=FEW), arrays(np.bool_, (5, 7)))
def test_ranks_count_ties_against(scores: np.ndarray, matches: np.ndarray) -> None:
    found = match_ranks(torch.from_numpy(scores), torch.from_numpy(matches)).tolist()
    assert found == [rank_by_loop(*rows) for rows in zip(scores.tolist(), matches.tolist(), strict=True)]


def test_equal_scores_gain_nothing() -> None:
    ranks = match_ranks(torch.ones(10, 10), torch.eye(10, dtype=torch.bool))
    assert ranks.tolist() == [10] * 10
    assert recall_at(ranks, 1) == recall_at(ranks, 9) == 0.0
    assert recall_at(ranks, 10) == 100.0


def test_further_matches_of_a_query_do_not_count_against_it() -> None:
    assert match_ranks(torch.ones(1, 5), torch.tensor([[True, True, True, True, False]])).tolist() == [2]
    assert match_ranks(torch.ones(1, 4), torch.ones(1, 4, dtype=torch.bool)).tolist() == [1]


def test_queries_without_a_match_are_no_queries() -> None:
    ranks = torch.tensor([0, 1, 3, 0])
    assert recall_at(ranks, 1) == 50.0
    assert recall_at(torch.zeros(3, dtype=torch.int64), 1) == 0.0


def test_the_mean_is_of_all_figures() -> None:
    found = recalls_of(torch.tensor([1, 2, 6, 20]), torch.tensor([1, 1, 1, 11]))
    assert found.image_to_text == {1: 25.0, 5: 50.0, 10: 75.0}
    assert found.text_to_image == {1: 75.0, 5: 75.0, 10: 75.0}
    assert found.mean == pytest.approx(62.5)
