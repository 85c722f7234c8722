"""Texts that teach the embedded language models the world's language, and to go by what stands before.

In: scenes. Out: `LlmText`s: a preamble that states the scene in words, then a caption or a question and its
answer; and probes of the same form for a trained model (`capfilt.world.measure.share_true` judges captions).

In BLIP-2's stage 2 the language model is frozen and sees an image only as soft visual prompts, some 32
vectors in front of the text. A model that has read captions alone has no use for what stands before one,
and stage 2 would have to find that use through frozen weights. So most texts have a preamble, placed
exactly where the visual prompts will be, which states all facts of the scene; what follows is true of it.
Stage 2 then only has to map image features to something like a preamble. As a visual prompt says several
things at once, so does a preamble: the words of one object stand at one place (`capfilt.train.llm`). Small
models learn to read these in minutes; to find out which colour goes with which of two nouns in a sentence
takes them hours. Places come in any order, some of them twice or thrice, as queries may say the same; the
preamble's length varies, so that a caption may start at any place. A share of plain captions keeps the
language fluent without one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from capfilt.data.llm_texts import LlmText
from capfilt.world import lexicon
from capfilt.world.language import caption, full_caption, parse, question
from capfilt.world.scenes import Scene, draw_scene

RELATION_SHARE = 0.6
"""Texts that are captions which say how two objects lie, with a preamble. On which side is learnt last, and only
where most texts ask for it: where a third did, OPT still guessed it after 4,000 steps."""

PLAIN_SHARE = 0.1
"""Of the other texts, those without a preamble; all of them captions, as a question needs a scene."""

QUESTION_SHARE = 0.5
"""Of the other texts with a preamble, the questions."""

MAX_PREAMBLE_PLACES = 24
"""Places of a preamble at most; a stop takes two tokens, so that a preamble may be as long as 32 visual prompts."""

FULL_SHARE = 0.3
"""Captions that state every fact, among those drawn; of the ones that say how two objects lie they are more."""


def draw_llm_texts(num_texts: int, seed: int = 0) -> Iterator[LlmText]:
    """Texts about scenes of the train split, one each, pure in (seed, place)."""
    for place in range(num_texts):
        rng = np.random.default_rng((seed, place, 3))
        if rng.random() < RELATION_SHARE:
            yield _draw_relation_text(rng)
        else:
            yield draw_llm_text(_draw_train_scene(rng), rng)


def _draw_train_scene(rng: np.random.Generator) -> Scene:
    return draw_scene(int(rng.integers(1 << 40)), "train")


def _draw_relation_text(rng: np.random.Generator) -> LlmText:
    while True:
        scene = _draw_train_scene(rng)
        text = _draw_caption(scene, rng)
        said = parse(text)
        if said is not None and said.relation is not None:
            return LlmText(text, preamble(scene, rng))


def _draw_caption(scene: Scene, rng: np.random.Generator) -> str:
    return full_caption(scene, rng) if rng.random() < FULL_SHARE else caption(scene, rng)


def draw_llm_text(scene: Scene, rng: np.random.Generator) -> LlmText:
    """A caption or a question about a scene, mostly with a preamble that holds all it takes."""
    text = _draw_caption(scene, rng)
    if rng.random() < PLAIN_SHARE:
        return LlmText(text)
    if rng.random() >= QUESTION_SHARE:
        return LlmText(text, preamble(scene, rng))
    asked, answer = question(scene, rng)
    return LlmText(answer, preamble(scene, rng), asked)


def preamble(scene: Scene, rng: np.random.Generator) -> str:
    """A scene as visual prompts may tell it: a place for each object and the ground, some twice, stops between.

    ". wood . one+small+red+heart+left . . wood one+large+blue+ball+right ." says that the heart lies left of the
    ball. The order is random.
    """
    places = [scene.background, *(_group_place(scene, group) for group in range(len(scene.groups)))]
    places += [place for place in places for _ in range(int(rng.integers(0, 3)))]
    places += ["."] * int(rng.integers(0, MAX_PREAMBLE_PLACES - len(places) + 1))
    return " ".join(places[i] for i in rng.permutation(len(places)))


def _group_place(scene: Scene, number: int) -> str:
    """A group's facts as words at one place, last how it lies to the other."""
    group = scene.groups[number]
    singular, plural = lexicon.KIND_NOUNS[group.kind][0]
    count = "one" if group.count == 1 else lexicon.COUNT_WORDS[group.count][0]
    words = [count, group.size, group.color, singular if group.count == 1 else plural]
    if scene.relation is not None:
        words.append(scene.relation if number == 0 else lexicon.CONVERSE[scene.relation])
    return "+".join(words)


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
