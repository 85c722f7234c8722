"""Figures against brute force."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from capfilt.world.language import full_caption
from capfilt.world.measure import (
    area_under_curve,
    has_held_out,
    recall_at,
    share_true,
    unseen_scenes,
    wrong_facts,
)
from capfilt.world.scenes import HELD_OUT

SCORES = st.lists(st.sampled_from([0.0, 0.1, 0.5, 0.7, 1.0]), min_size=1, max_size=20)


@given(SCORES, SCORES)
def test_area_under_curve_counts_pairs(positive: list[float], negative: list[float]) -> None:
    wins = [1.0 if p > n else 0.5 if p == n else 0.0 for p in positive for n in negative]
    assert area_under_curve(np.array(positive), np.array(negative)) == pytest.approx(np.mean(wins))


@given(arrays(np.float32, (6, 6), elements=st.sampled_from([0.0, 0.25, 0.5, 1.0])), st.integers(1, 6))
def test_recall_counts_ties_against(similarity: np.ndarray, k: int) -> None:
    hits = [sum(row[c] >= row[number] for c in range(6)) <= k for number, row in enumerate(similarity)]
    assert recall_at(similarity, k) == pytest.approx(np.mean(hits))


def test_equal_scores_gain_nothing() -> None:
    assert recall_at(np.ones((10, 10)), 1) == 0.0


def test_shares_of_texts() -> None:
    scenes = unseen_scenes(20)
    texts = [full_caption(scene, np.random.default_rng(0)) for scene in scenes]
    assert share_true(texts, scenes) == 1.0
    assert wrong_facts(texts, scenes) == {}
    assert share_true(["shop now"] * 20, scenes) == 0.0
    assert wrong_facts(["shop now"] * 20, scenes) == {"unrelated": 1.0}


def test_held_out_scenes_are_marked() -> None:
    scenes = unseen_scenes(300)
    marked = [scene for scene in scenes if has_held_out(scene)]
    assert 0 < len(marked) < 150
    assert all(any((g.color, g.kind) in HELD_OUT for g in scene.groups) for scene in marked)
