"""Texts that teach the embedded language models the world's language, and to go by what stands before.

In: scenes. Out: `LlmText`s: a preamble that states the scene in words, then a caption or a question and its
answer; and probes of the same form for a trained model (`capfilt.world.measure.share_true` judges captions).

In BLIP-2's stage 2 the language model is frozen and sees an image only as soft visual prompts, some 32
vectors in front of the text. A model that has read captions alone has no use for what stands before one,
and stage 2 would have to find that use through frozen weights. So most texts have a preamble, placed
exactly where the visual prompts will be, which states all facts in another phrasing or as notes in random
order; what follows is true of it. Stage 2 then only has to map image features to something like a preamble.
The notes bring each group of objects in a few words, in any order, twice at times, as queries may; the
preamble's length varies, so that a caption may start at any place. A share of plain captions keeps the
language fluent without one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

import numpy as np

from capfilt.data.llm_texts import LlmText
from capfilt.world import lexicon
from capfilt.world.language import caption, full_caption, question
from capfilt.world.scenes import Scene, draw_scene

T = TypeVar("T")

PLAIN_SHARE = 0.1
"""Texts without a preamble; all of them captions, as a question needs a scene."""

QUESTION_SHARE = 0.4
"""Questions among the texts with a preamble."""

FULL_SHARE = 0.3
"""Captions that state every fact, among the captions."""


def draw_llm_texts(num_texts: int, seed: int = 0) -> Iterator[LlmText]:
    """Texts about scenes of the train split, one each, pure in (seed, place)."""
    for place in range(num_texts):
        rng = np.random.default_rng((seed, place, 3))
        yield draw_llm_text(draw_scene(int(rng.integers(1 << 40)), "train"), rng)


def draw_llm_text(scene: Scene, rng: np.random.Generator) -> LlmText:
    """A caption or a question about a scene, mostly with a preamble that holds all it takes."""
    text = full_caption(scene, rng) if rng.random() < FULL_SHARE else caption(scene, rng)
    if rng.random() < PLAIN_SHARE:
        return LlmText(text)
    if rng.random() >= QUESTION_SHARE:
        return LlmText(text, preamble(scene, rng))
    asked, answer = question(scene, rng)
    return LlmText(answer, preamble(scene, rng), asked)


def preamble(scene: Scene, rng: np.random.Generator) -> str:
    """A scene in words: one to three notes or full captions, each closed by a full stop."""
    num_parts = int(rng.choice([1, 2, 3], p=[0.55, 0.3, 0.15]))
    parts = [notes(scene, rng) if rng.random() < 0.6 else full_caption(scene, rng) for _ in range(num_parts)]
    return " ".join(f"{part}." for part in parts)


def notes(scene: Scene, rng: np.random.Generator) -> str:
    """All facts of a scene as short notes in random order, some of them twice."""
    clauses = [_group_note(scene, index, rng) for index in range(len(scene.groups))]
    clauses.append(_background_note(scene, rng))
    if scene.relation is not None:
        clauses.append(_relation_note(scene, rng))
    clauses += [clause for clause in clauses if rng.random() < 0.15]
    return ", ".join(clauses[i] for i in rng.permutation(len(clauses)))


def _group_note(scene: Scene, index: int, rng: np.random.Generator) -> str:
    group = scene.groups[index]
    words = [
        _pick(lexicon.COLOR_WORDS[group.color], rng),
        _pick(lexicon.SIZE_WORDS[group.size], rng),
        _pick(lexicon.KIND_NOUNS[group.kind], rng)[group.count > 1],
        "one" if group.count == 1 else lexicon.COUNT_WORDS[group.count][0],
    ]
    return " ".join(words[i] for i in rng.permutation(len(words)))


def _background_note(scene: Scene, rng: np.random.Generator) -> str:
    return _pick(lexicon.BACKGROUND_PHRASES[scene.background], rng)[1]


def _relation_note(scene: Scene, rng: np.random.Generator) -> str:
    """How one object lies to the other, each by kind and colour: kinds or colours alone may be the same."""
    assert scene.relation is not None
    first, second = scene.groups
    relation = scene.relation
    if rng.random() < 0.5:
        first, second, relation = second, first, lexicon.CONVERSE[relation]
    names = [
        f"{_pick(lexicon.COLOR_WORDS[g.color], rng)} {_pick(lexicon.KIND_NOUNS[g.kind], rng)[0]}"
        for g in (first, second)
    ]
    return f"{names[0]} {_pick(lexicon.RELATION_PHRASES[relation], rng)} {names[1]}"


def _pick(options: tuple[T, ...], rng: np.random.Generator) -> T:
    """The plain word in half of the cases, else any."""
    return options[0] if rng.random() < 0.5 else options[int(rng.integers(len(options)))]


def draw_probes(scenes: Sequence[Scene], *, questions: bool, seed: int = 0) -> list[LlmText]:
    """A preamble for each scene, and a question with its answer, or a full caption for reference."""
    probes = []
    for place, scene in enumerate(scenes):
        rng = np.random.default_rng((seed, place, 4))
        asked, answer = question(scene, rng) if questions else ("", full_caption(scene, rng))
        probes.append(LlmText(answer, preamble(scene, rng), asked))
    return probes


def share_of_right_answers(answers: Sequence[str], probes: Sequence[LlmText]) -> float:
    """Share of answers that are the right one, word for word."""
    pairs = zip(answers, probes, strict=True)
    return float(np.mean([answer.strip() == probe.text for answer, probe in pairs]))
