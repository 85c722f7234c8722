"""Scenes are drawn from their seed alone, hold out what they should, and show their facts."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from capfilt.errors import UsageError
from capfilt.world.scenes import (
    BACKGROUNDS,
    COLORS,
    HELD_OUT,
    KINDS,
    RELATIONS,
    SHAPES,
    Group,
    Placement,
    Scene,
    draw_scene,
    render,
)

SEEDS = st.integers(0, 2**40)


def test_world_is_as_rich_as_promised() -> None:
    assert len(KINDS) >= 10
    assert len(COLORS) >= 10
    assert len(BACKGROUNDS) >= 5
    counts = {group.count for seed in range(500) for group in draw_scene(seed).groups}
    assert counts == {1, 2, 3, 4, 5}
    assert {draw_scene(seed).relation for seed in range(500)} == {None, *RELATIONS}


@given(SEEDS)
def test_same_seed_same_picture(seed: int) -> None:
    scene = draw_scene(seed, "test")
    assert scene == draw_scene(seed, "test")
    assert np.array_equal(render(scene, 40, 56), render(scene, 40, 56))
    assert render(scene, 40, 56).shape == (56, 40, 3)


def test_held_out_pairs_are_in_the_test_split_only() -> None:
    train = {(g.color, g.kind) for seed in range(3000) for g in draw_scene(seed, "train").groups}
    test = {(g.color, g.kind) for seed in range(3000) for g in draw_scene(seed, "test").groups}
    assert not train & HELD_OUT
    assert test >= HELD_OUT
    assert {kind for _, kind in HELD_OUT} == set(KINDS)


@given(SEEDS, st.sampled_from(["train", "test"]))
def test_relation_is_where_the_objects_are(seed: int, split: str) -> None:
    scene = draw_scene(seed, split)
    assert len(scene.placements) == sum(group.count for group in scene.groups)
    if scene.relation is None:
        return
    first, second = scene.placements
    apart = {
        "left": second.x - first.x,
        "right": first.x - second.x,
        "above": second.y - first.y,
        "below": first.y - second.y,
    }
    assert max(apart, key=apart.__getitem__) == scene.relation
    assert apart[scene.relation] > 0.4


@given(SEEDS)
def test_equal_objects_do_not_cover_each_other(seed: int) -> None:
    for one, other in itertools.combinations(draw_scene(seed).placements, 2):
        assert np.hypot(one.x - other.x, one.y - other.y) > one.radius


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("color", ["red", "blue", "white"])
def test_object_is_painted_in_its_color(kind: str, color: str) -> None:
    scene = Scene(1, (Group(kind, color, "large"),), None, "wood", (Placement(0, 0.5, 0.5, 0.2),))
    picture = render(scene, 96, 96, noise=0).astype(int)
    near = np.abs(picture - np.array(COLORS[color])).sum(axis=2) < 12
    inside = near[28:68, 28:68].mean()
    assert inside > 0.12, "a good part of the object's window has its colour"
    assert near[:20].mean() < 0.05


def test_kinds_look_different() -> None:
    pictures = []
    for kind in SHAPES:
        scene = Scene(1, (Group(kind, "red", "large"),), None, "cloth", (Placement(0, 0.5, 0.5, 0.2),))
        pictures.append(render(scene, 64, 64, noise=0).astype(int))
    for one, other in itertools.combinations(pictures, 2):
        assert (np.abs(one - other).sum(axis=2) > 60).sum() > 40


def test_unknown_split_is_refused() -> None:
    with pytest.raises(UsageError, match="'dev'; expected one of train, test"):
        draw_scene(1, "dev")
