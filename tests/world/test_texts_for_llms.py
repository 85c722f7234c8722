"""Texts for the language models: true, grounded in their preambles, the same every time."""

from __future__ import annotations

import itertools

import numpy as np

from capfilt.world import lexicon
from capfilt.world.language import judge, parse
from capfilt.world.scenes import draw_scene
from capfilt.world.texts_for_llms import (
    draw_llm_text,
    draw_llm_texts,
    draw_probes,
    notes,
    preamble,
    share_of_right_answers,
)


def test_texts_are_the_same_every_time_and_do_not_depend_on_their_number() -> None:
    some = list(draw_llm_texts(20, seed=3))
    assert list(itertools.islice(draw_llm_texts(1000, seed=3), 20)) == some
    assert list(draw_llm_texts(20, seed=4)) != some


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
    assert 100 <= num_questions <= 190


def test_a_preamble_is_sentences_that_are_true_or_notes_that_name_every_fact() -> None:
    for seed in range(200):
        scene, rng = draw_scene(seed, "test"), np.random.default_rng(seed)
        words = preamble(scene, rng)
        assert words.endswith(".")
        for part in words.removesuffix(".").split(". "):
            if parse(part) is not None:
                assert judge(part, scene).is_true, part


def test_notes_name_kind_color_size_count_ground_and_relation() -> None:
    for seed in range(200):
        scene = draw_scene(seed, "test")
        clauses = notes(scene, np.random.default_rng(seed)).split(", ")
        for group in scene.groups:
            colors, sizes = lexicon.COLOR_WORDS[group.color], lexicon.SIZE_WORDS[group.size]
            kinds = [noun for pair in lexicon.KIND_NOUNS[group.kind] for noun in pair]
            assert any(
                any(c in clause for c in colors) and any(s in clause for s in sizes) and any(k in clause for k in kinds)
                for clause in clauses
            )
        grounds = [what for _, what in lexicon.BACKGROUND_PHRASES[scene.background]]
        assert set(clauses) & set(grounds)
        relations = [phrase for phrases in lexicon.RELATION_PHRASES.values() for phrase in phrases]
        related = [clause for clause in clauses if any(f" {phrase} " in clause for phrase in relations)]
        assert bool(related) == (scene.relation is not None)


def test_probes_and_their_figure() -> None:
    scenes = [draw_scene(seed, "test") for seed in range(10)]
    probes = draw_probes(scenes, questions=True)
    assert probes == draw_probes(scenes, questions=True)
    assert share_of_right_answers([probe.text for probe in probes], probes) == 1.0
    assert share_of_right_answers(["fish"] * 10, probes) == 0.0
    captions = draw_probes(scenes, questions=False)
    assert all(judge(p.text, scene).is_true for p, scene in zip(captions, scenes, strict=True))
