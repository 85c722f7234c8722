"""Texts for the language models: true, grounded in their preambles, the same every time."""

from __future__ import annotations

import itertools

import numpy as np

from capfilt.world import lexicon
from capfilt.world.language import judge, parse
from capfilt.world.scenes import draw_scene
from capfilt.world.texts_for_llms import (
    MAX_PREAMBLE_PLACES,
    RELATION_SHARE,
    draw_llm_text,
    draw_llm_texts,
    draw_probes,
    preamble,
    share_of_right_answers,
)

PLAIN_RELATIONS = {name: phrases[0] for name, phrases in lexicon.RELATION_PHRASES.items()}


def test_texts_are_the_same_every_time_and_do_not_depend_on_their_number() -> None:
    some = list(draw_llm_texts(20, seed=3))
    assert list(itertools.islice(draw_llm_texts(1000, seed=3), 20)) == some
    assert list(draw_llm_texts(20, seed=4)) != some


def test_most_texts_say_how_two_objects_lie() -> None:
    texts = list(draw_llm_texts(600, seed=5))
    said = [parse(text.text) for text in texts if text.preamble and not text.question]
    num_relations = sum(statement is not None and statement.relation is not None for statement in said)
    assert RELATION_SHARE - 0.06 < num_relations / len(texts) < RELATION_SHARE + 0.16
    assert sum(bool(text.question) for text in texts) > 60


def test_captions_are_true_and_questions_have_a_preamble() -> None:
    num_plain = num_questions = 0
    for seed in range(400):
        scene = draw_scene(seed)
        text = draw_llm_text(scene, np.random.default_rng(seed))
        if text.question:
            num_questions += 1
            assert text.preamble
        else:
            assert judge(text.text, scene).is_true
        num_plain += not text.preamble
    assert 20 <= num_plain <= 70
    assert 140 <= num_questions <= 230


def test_a_preamble_states_every_fact_of_an_object_at_one_place() -> None:
    lengths = set()
    for seed in range(300):
        scene = draw_scene(seed, "test")
        places = preamble(scene, np.random.default_rng(seed)).split()
        lengths.add(len(places))
        stated = {place for place in places if "+" in place}
        assert set(places) - stated - {"."} == {scene.background}
        assert len(stated) == len(scene.groups)
        for place in stated:
            words = place.split("+")
            assert judge(" ".join(words[:4]), scene).is_true
            assert len(words) == (4 if scene.relation is None else 5)
        if scene.relation is not None:
            first, second = (place.split("+") for place in stated)
            said = f"{' '.join(first[:4])} {PLAIN_RELATIONS[first[4]]} {' '.join(second[:4])}"
            assert judge(said, scene).is_true
            assert lexicon.CONVERSE[first[4]] == second[4]
    assert min(lengths) < 8
    assert max(lengths) == MAX_PREAMBLE_PLACES


def test_probes_and_their_figure() -> None:
    scenes = [draw_scene(seed, "test") for seed in range(10)]
    probes = draw_probes(scenes, questions=True)
    assert probes == draw_probes(scenes, questions=True)
    assert share_of_right_answers([probe.text for probe in probes], probes) == 1.0
    assert share_of_right_answers(["fish"] * 10, probes) == 0.0
    captions = draw_probes(scenes, questions=False)
    assert all(judge(p.text, scene).is_true for p, scene in zip(captions, scenes, strict=True))
