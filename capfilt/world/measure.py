"""Figures of models on scenes they never saw, against the world's own truth.

In: what models wrote or scored for scenes. Out: shares, areas under curves, recalls, by plain counting.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from capfilt.world.language import judge
from capfilt.world.scenes import HELD_OUT, Scene, draw_scene

FIRST_UNSEEN_SEED = 0
"""Seeds of the test split; no training scene has that split."""


def unseen_scenes(num_scenes: int, first_seed: int = FIRST_UNSEEN_SEED) -> list[Scene]:
    """Scenes of the test split, held-out pairs of colour and kind among them."""
    return [draw_scene(first_seed + number, "test") for number in range(num_scenes)]


def has_held_out(scene: Scene) -> bool:
    """Whether a scene shows a pair of colour and kind that no training scene shows."""
    return any((group.color, group.kind) in HELD_OUT for group in scene.groups)


def share_true(texts: Sequence[str], scenes: Sequence[Scene]) -> float:
    """Share of texts that are true of their scenes, 0 to 1."""
    return float(np.mean([judge(text, scene).is_true for text, scene in zip(texts, scenes, strict=True)]))


def wrong_facts(texts: Sequence[str], scenes: Sequence[Scene]) -> dict[str, float]:
    """Fact → share of texts that get it wrong; "unrelated" for texts that are no sentences about scenes."""
    counts: Counter[str] = Counter()
    for text, scene in zip(texts, scenes, strict=True):
        judgement = judge(text, scene)
        counts.update(judgement.wrong_facts or (() if judgement.is_true else ("unrelated",)))
    return {fact: count / len(texts) for fact, count in sorted(counts.items())}


def area_under_curve(positive: NDArray[np.floating], negative: NDArray[np.floating]) -> float:
    """Probability that a positive scores higher than a negative, ties counted half (ROC AUC)."""
    scores = np.concatenate([positive, negative])
    _, places, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    ranks = (ends - (counts - 1) / 2)[places]
    wins = ranks[: len(positive)].sum() - len(positive) * (len(positive) + 1) / 2
    return float(wins / (len(positive) * len(negative)))


def recall_at(similarity_QC: NDArray[np.floating], k: int) -> float:
    """Share of queries whose own candidate (the one of the same number) is among the k most similar.

    A candidate that is as similar as the own one counts against it, so equal scores gain nothing.
    """
    own = np.diagonal(similarity_QC)[:, None]
    return float(((similarity_QC >= own).sum(axis=1) <= k).mean())
