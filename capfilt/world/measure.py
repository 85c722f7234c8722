"""Figures of models on scenes they never saw, against the world's own truth.

In: what models wrote of scenes. Out: shares, by plain counting.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

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
