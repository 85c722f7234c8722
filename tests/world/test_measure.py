"""Shares of true texts."""

from __future__ import annotations

import numpy as np

from capfilt.world.language import full_caption
from capfilt.world.measure import has_held_out, share_true, unseen_scenes, wrong_facts
from capfilt.world.scenes import HELD_OUT


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
