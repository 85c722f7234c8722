"""What the world's writer writes, its judge finds true; what is changed, false in just that fact."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from capfilt.world import lexicon
from capfilt.world.language import (
    FACTS,
    caption,
    change_one_fact,
    full_caption,
    full_statement,
    judge,
    parse,
    question,
)
from capfilt.world.scenes import Group, Placement, Scene, draw_scene

SCENES = st.builds(draw_scene, st.integers(0, 2**40), st.sampled_from(["train", "test"]))
RNGS = st.builds(np.random.default_rng, st.integers(0, 2**40))

SINGLE = Scene(0, (Group("star", "red", "small"),), None, "sand", (Placement(0, 0.5, 0.5, 0.12),))
SEVERAL = Scene(0, (Group("box", "blue", "large", 3),), None, "snow", ())
PAIR = Scene(0, (Group("star", "red", "small"), Group("ball", "green", "large")), "left", "grass", ())


@given(SCENES, RNGS)
def test_captions_are_true(scene: Scene, rng: np.random.Generator) -> None:
    assert judge(caption(scene, rng), scene).verdict == "true"


@given(SCENES, RNGS)
def test_full_captions_state_every_fact(scene: Scene, rng: np.random.Generator) -> None:
    text = full_caption(scene, rng)
    statement = parse(text)
    assert statement is not None
    assert statement.background == scene.background
    assert {(m.kind, m.color, m.size, m.count) for m in statement.mentions} == {
        (m.kind, m.color, m.size, m.count) for m in full_statement(scene).mentions
    }


@given(SCENES, RNGS)
def test_one_changed_fact_is_found(scene: Scene, rng: np.random.Generator) -> None:
    text, fact = change_one_fact(scene, rng)
    assert judge(text, scene).wrong_facts == (fact,)


@given(st.text())
def test_any_text_gets_a_verdict(text: str) -> None:
    assert judge(text, PAIR).verdict in ("true", "false", "unrelated")


@pytest.mark.parametrize(
    ("text", "scene", "wrong"),
    [
        ("A small red star, on the sand!", SINGLE, ()),
        ("a star", SINGLE, ()),
        ("two red stars on the sand", SINGLE, ("count",)),
        ("a red heart on the sand", SINGLE, ("kind",)),
        ("a red star on a beach", SINGLE, ()),
        ("a red star in the snow", SINGLE, ("background",)),
        ("three large blue boxes", SEVERAL, ()),
        ("some boxes in the snow", SEVERAL, ()),
        ("a blue box", SEVERAL, ("count",)),
        ("a pair of tiny blue boxes", SEVERAL, ("size", "count")),
        ("a red star left of a green ball", PAIR, ()),
        ("a green ball to the right of a red star on a lawn", PAIR, ()),
        ("a green ball left of a red star", PAIR, ("relation",)),
        ("a red star above a green ball", PAIR, ("relation",)),
        ("a green star left of a red ball", PAIR, ("color",)),
        ("a green ball and a red star", PAIR, ()),
        ("a large green ball", PAIR, ()),
        ("a red star and a red star", SINGLE, ("count",)),
    ],
)
def test_known_verdicts(text: str, scene: Scene, wrong: tuple[str, ...]) -> None:
    judgement = judge(text, scene)
    assert judgement.verdict == ("false" if wrong else "true")
    assert judgement.wrong_facts == wrong


@pytest.mark.parametrize(
    "text",
    ["", "buy now 50% off", "IMG_2041.jpg", "a red", "star red a", "a red star left", "a dog on the sand",
     "a stars", "two star", "on the sand", "a red star on the sand a red star"],
)  # fmt: skip
def test_no_sentences(text: str) -> None:
    assert judge(text, SINGLE).verdict == "unrelated"


@given(SCENES, RNGS)
def test_questions_use_known_words(scene: Scene, rng: np.random.Generator) -> None:
    text, answer = question(scene, rng)
    assert text.endswith("?")
    words = set(text[:-1].split()) | set(answer.split())
    assert words <= set(lexicon.vocabulary())


def test_answers_follow_the_scene() -> None:
    answers: dict[str, set[str]] = {}
    for seed in range(2000):
        asked, answer = question(PAIR, np.random.default_rng(seed))
        answers.setdefault(asked, set()).add(answer)
    assert answers["what color is the star?"] == {"red"}
    assert answers["what size is the ball?"] == {"large"}
    assert answers["how many balls are there?"] == {"one"}
    assert answers["what is left of the green ball?"] == {"red star"}
    assert answers["what is right of the red star?"] == {"green ball"}
    assert answers["do you see any stars?"] == {"yes"}
    assert answers["do you see any moons?"] == {"no"}


def test_vocabulary_is_rich() -> None:
    assert len(lexicon.vocabulary()) >= 150
    texts = {caption(draw_scene(seed), np.random.default_rng(seed)) for seed in range(2000)}
    assert len(texts) > 1800


def test_every_fact_is_changed_now_and_then() -> None:
    rng = np.random.default_rng(0)
    assert {change_one_fact(draw_scene(seed), rng)[1] for seed in range(300)} == set(FACTS)
