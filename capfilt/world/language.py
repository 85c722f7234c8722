"""Texts about scenes: captions of many phrasings, wrong captions, questions, and the judge of any text.

In: a `Scene` and a random generator, or a scene and a text. Out: texts, or a `Judgement`.

The judge reads a text against the same word table that writes it: a caption is true when all it states
holds, false when something does not (and what), unrelated when it is no sentence about such scenes.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass, replace
from functools import cache
from typing import TypeVar

import numpy as np

from capfilt.world import lexicon
from capfilt.world.scenes import BACKGROUNDS, COLORS, KINDS, MAX_COUNT, RELATIONS, SIZES, Group, Scene

T = TypeVar("T")

FACTS = ("kind", "color", "size", "count", "relation", "background")


@dataclass(frozen=True, slots=True)
class Mention:
    """What a noun phrase says of a group; None for what it leaves open. `count` 0 means two or more."""

    kind: str
    color: str | None = None
    size: str | None = None
    count: int | None = None


@dataclass(frozen=True, slots=True)
class Statement:
    """What a whole text says: one or two mentions, how the first lies to the second, the ground."""

    mentions: tuple[Mention, ...]
    relation: str | None = None
    background: str | None = None


@dataclass(frozen=True, slots=True)
class Judgement:
    """`verdict` is "true", "false" or "unrelated"; `wrong_facts` names what a false text gets wrong."""

    verdict: str
    wrong_facts: tuple[str, ...] = ()

    @property
    def is_true(self) -> bool:
        """Whether all that the text states holds."""
        return self.verdict == "true"


# --- writing ------------------------------------------------------------------------------------------------


def full_statement(scene: Scene) -> Statement:
    """Everything there is to say about a scene."""
    mentions = tuple(Mention(g.kind, g.color, g.size, g.count) for g in scene.groups)
    return Statement(mentions, scene.relation, scene.background)


def draw_statement(scene: Scene, rng: np.random.Generator) -> Statement:
    """Some of what there is to say: mostly colours, often the ground and the relation, sometimes sizes."""
    mentions = []
    for group in scene.groups:
        color = group.color if rng.random() < 0.92 else None
        size = group.size if rng.random() < 0.5 else None
        count = group.count if group.count == 1 or rng.random() < 0.85 else 0
        mentions.append(Mention(group.kind, color, size, count))
    relation = scene.relation if rng.random() < 0.8 else None
    if relation is None and rng.random() < 0.3:
        mentions = [mentions[int(rng.integers(len(mentions)))]]
    background = scene.background if rng.random() < 0.6 else None
    return Statement(tuple(mentions), relation, background)


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """A true caption that states some of the facts, in a phrasing drawn at random."""
    return phrase(draw_statement(scene, rng), rng)


def full_caption(scene: Scene, rng: np.random.Generator) -> str:
    """A true caption that states every fact of the scene."""
    return phrase(full_statement(scene), rng)


def change_one_fact(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    """A caption that is false in one fact, and the name of that fact."""
    while True:
        statement = draw_statement(scene, rng)
        fact = str(rng.choice(FACTS))
        changed = _change(statement, fact, rng)
        if changed is not None and _wrong_facts(changed, scene) == (fact,):
            return phrase(changed, rng), fact


def _change(statement: Statement, fact: str, rng: np.random.Generator) -> Statement | None:
    """The statement with another value for one fact, or None when it does not state that fact."""
    if fact in ("relation", "background"):
        if getattr(statement, fact) is None:
            return None
        value = str(rng.choice(RELATIONS if fact == "relation" else BACKGROUNDS))
        return replace(statement, relation=value) if fact == "relation" else replace(statement, background=value)
    index = int(rng.integers(len(statement.mentions)))
    mention = statement.mentions[index]
    if getattr(mention, fact) is None:
        return None
    values: dict[str, tuple[object, ...]] = {
        "kind": KINDS,
        "color": tuple(COLORS),
        "size": SIZES,
        "count": tuple(range(1, MAX_COUNT + 1)),
    }
    value = values[fact][int(rng.integers(len(values[fact])))]
    mentions = list(statement.mentions)
    mentions[index] = replace(mention, **{fact: value})
    return replace(statement, mentions=tuple(mentions))


def phrase(statement: Statement, rng: np.random.Generator) -> str:
    """Put a statement into words."""
    if statement.relation is not None and rng.random() < 0.5:
        first, second = statement.mentions
        statement = replace(statement, mentions=(second, first), relation=lexicon.CONVERSE[statement.relation])
    nouns = [_noun_phrase(mention, rng) for mention in statement.mentions]
    plural = statement.mentions[0].count != 1
    body = nouns[0]
    if len(nouns) == 2 and statement.relation is not None:
        relation = _pick(lexicon.RELATION_PHRASES[statement.relation], rng, 0.5)
        verb = ("are " if plural else "is ") if rng.random() < 0.15 else ""
        body = f"{nouns[0]} {verb}{relation} {nouns[1]}"
    elif len(nouns) == 2:
        body = " and ".join(nouns if rng.random() < 0.5 else nouns[::-1])
        plural = True
    opener = _draw_opener(plural, rng) if rng.random() < 0.18 else ""
    if statement.background is None:
        return f"{opener}{body}"
    where, what = _pick(lexicon.BACKGROUND_PHRASES[statement.background], rng, 0.5)
    form = rng.random()
    if form < 0.78 or "verb" in opener:
        verb = _draw_verb(plural, rng) if not opener and statement.relation is None and rng.random() < 0.2 else ""
        return f"{opener}{body} {verb}{where}"
    if form < 0.9:
        return f"{where} {opener}{body}" if opener else f"{where} {body}"
    return f"{what} with {body}" + (" on it" if rng.random() < 0.3 else "")


def _pick(options: tuple[T, ...], rng: np.random.Generator, plain: float) -> T:
    """The first option with probability `plain`, else any."""
    return options[0] if rng.random() < plain else options[int(rng.integers(len(options)))]


def _draw_opener(plural: bool, rng: np.random.Generator) -> str:
    wrong = ("there is", "here is", "this is") if plural else ("there are", "here are", "these are")
    return _pick(tuple(o for o in lexicon.OPENERS if o not in wrong), rng, 0.0) + " "


def _draw_verb(plural: bool, rng: np.random.Generator) -> str:
    verbs = ("are", "sit", "lie", "rest", "stand") if plural else ("is", "sits", "lies", "rests", "stands")
    return _pick(verbs, rng, 0.4) + " "


def _noun_phrase(mention: Mention, rng: np.random.Generator) -> str:
    singular, plural = _pick(lexicon.KIND_NOUNS[mention.kind], rng, 0.7)
    words = [singular if mention.count == 1 else plural]
    if mention.color is not None:
        words.insert(0, _pick(lexicon.COLOR_WORDS[mention.color], rng, 0.9))
    if mention.size is not None:
        words.insert(0, _pick(lexicon.SIZE_WORDS[mention.size], rng, 0.5))
    if mention.count == 1:
        article = "an" if words[0][0] in "aeio" else "a"
        words.insert(0, article if rng.random() < 0.85 else _pick(("one", "the", "a single", "a lone"), rng, 0.4))
    elif mention.count:
        words.insert(0, _pick(lexicon.COUNT_WORDS[mention.count], rng, 0.7))
    elif rng.random() < 0.6:
        words.insert(0, _pick(lexicon.MANY_WORDS, rng, 0.5))
    return " ".join(words)


# --- reading ------------------------------------------------------------------------------------------------

# A token class is a letter: O opener, D one, N number, M many, S size, C colour, K one noun, P plural noun,
# R relation, B where, G ground, V verb, A and, W with, I "on it".
_NOUN = "(?:D|N|M)?S?C?(?:K|P)"
_PAIR = f"(?:{_NOUN}(?:V?R{_NOUN}|A{_NOUN})?)"
_SENTENCE = re.compile(f"O?{_PAIR}(?:V?B)?|BO?{_PAIR}|O?GW{_PAIR}I?")


@cache
def _phrases() -> dict[str, list[tuple[str, object]]]:
    """Phrase → the token classes it may be, with the value of each."""
    table: dict[str, list[tuple[str, object]]] = {}

    def add(text: str, letter: str, value: object = None) -> None:
        table.setdefault(text, []).append((letter, value))

    for kind, nouns in lexicon.KIND_NOUNS.items():
        for singular, plural in nouns:
            add(singular, "K", kind)
            add(plural, "P", kind)
    for letter, words_of in (("C", lexicon.COLOR_WORDS), ("S", lexicon.SIZE_WORDS), ("R", lexicon.RELATION_PHRASES)):
        for value, words in words_of.items():
            for text in words:
                add(text, letter, value)
    for count, words in lexicon.COUNT_WORDS.items():
        for text in words:
            add(text, "N", count)
    for background, pairs in lexicon.BACKGROUND_PHRASES.items():
        for where, what in pairs:
            add(where, "B", background)
            add(what, "G", background)
    for letter, words in (
        ("D", lexicon.ONE_WORDS), ("M", lexicon.MANY_WORDS), ("O", lexicon.OPENERS), ("V", lexicon.VERBS),
        ("A", ("and",)), ("W", ("with",)), ("I", ("on it", "in it")),
    ):  # fmt: skip
        for text in words:
            add(text, letter)
    return table


def _tokenise(text: str) -> list[tuple[str, object]] | None:
    """Split a text into known phrases, the longest first; None when a word is unknown."""
    words = re.sub(r"[^\w\s]", " ", text.lower()).split()
    table, tokens, start = _phrases(), [], 0
    while start < len(words):
        for end in range(min(len(words), start + 7), start, -1):
            options = table.get(" ".join(words[start:end]))
            if options:
                tokens.append(options[0])
                start = end
                break
        else:
            return None
    return tokens


def parse(text: str) -> Statement | None:
    """Read a text; None when it is no sentence about scenes of this world."""
    tokens = _tokenise(text)
    if not tokens or not _SENTENCE.fullmatch("".join(letter for letter, _ in tokens)):
        return None
    mentions: list[Mention] = []
    fields: dict[str, object] = {}
    found: dict[str, str] = {}
    names = {"S": "size", "C": "color"}
    for letter, value in tokens:
        if letter in names:
            fields[names[letter]] = value
        elif letter in "DNM":
            fields["count"] = {"D": 1, "M": 0}.get(letter, value)
        elif letter in "KP":
            count = fields.get("count")
            if (letter == "K" and count not in (1, None)) or (letter == "P" and count == 1):
                return None
            fields["count"] = 1 if letter == "K" else (count or 0)
            mentions.append(Mention(kind=str(value), **fields))  # type: ignore[arg-type]
            fields = {}
        elif letter in "RBG":
            found["relation" if letter == "R" else "background"] = str(value)
    return Statement(tuple(mentions), **found)


def judge(text: str, scene: Scene) -> Judgement:
    """Say whether a text is true of a scene, false (and in which facts) or unrelated."""
    statement = parse(text)
    if statement is None:
        return Judgement("unrelated")
    wrong = _wrong_facts(statement, scene)
    return Judgement("false", wrong) if wrong else Judgement("true")


def _wrong_facts(statement: Statement, scene: Scene) -> tuple[str, ...]:
    """The facts that fail under the kindest reading of which mention means which group."""
    background_wrong = statement.background not in (None, scene.background)
    best: list[str] | None = None
    readings: list[tuple[int, ...]] = list(itertools.permutations(range(len(scene.groups)), len(statement.mentions)))
    if len(statement.mentions) > len(scene.groups):
        readings = [(0, 0)]  # two are mentioned where there is one: the second is not there
    for reading in readings:
        wrong: list[str] = []
        for mention, index in zip(statement.mentions, reading, strict=True):
            wrong += _mismatches(mention, scene.groups[index])
        if len(statement.mentions) > len(scene.groups):
            wrong.append("count")
        if statement.relation is not None:
            actual = scene.relation if reading[0] == 0 else lexicon.CONVERSE.get(scene.relation or "", None)
            if statement.relation != actual or reading == (0, 0):
                wrong.append("relation")
        if best is None or len(wrong) < len(best):
            best = wrong
    facts = set(best or ()) | ({"background"} if background_wrong else set())
    return tuple(fact for fact in FACTS if fact in facts)


def _mismatches(mention: Mention, group: Group) -> list[str]:
    wrong = [
        fact
        for fact in ("kind", "color", "size")
        if getattr(mention, fact) is not None and getattr(mention, fact) != getattr(group, fact)
    ]
    count_holds = group.count >= 2 if mention.count == 0 else mention.count in (None, group.count)
    return wrong if count_holds else [*wrong, "count"]


# --- questions ----------------------------------------------------------------------------------------------


def question(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    """A question with one right answer, and that answer, both in plain words."""
    group = scene.groups[int(rng.integers(len(scene.groups)))]
    singular, plural = lexicon.KIND_NOUNS[group.kind][0]
    noun, verb = (singular, "is") if group.count == 1 else (plural, "are")
    unique = sum(g.kind == group.kind for g in scene.groups) == 1
    forms: list[tuple[str, str]] = [("what is the background", _plain_background(scene.background))]
    if unique:
        forms.append((f"what color {verb} the {noun}", group.color))
        forms.append((f"what size {verb} the {noun}", group.size))
        forms.append((f"how many {plural} are there", ("one", "two", "three", "four", "five")[group.count - 1]))
    if len(scene.groups) == 1:
        forms.append((f"which objects {verb} there", plural if group.count > 1 else singular))
    else:
        forms.append(_relation_question(scene, rng))
    asked = str(rng.choice([group.kind, str(rng.choice(KINDS))]))
    present = any(g.kind == asked for g in scene.groups)
    forms.append((f"do you see any {lexicon.KIND_NOUNS[asked][0][1]}", "yes" if present else "no"))
    text, answer = forms[int(rng.integers(len(forms)))]
    return f"{text}?", answer


def _relation_question(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    assert scene.relation is not None
    first, second = scene.groups
    relation = scene.relation
    if rng.random() < 0.5:
        first, second, relation = second, first, lexicon.CONVERSE[relation]
    return (
        f"what is {lexicon.RELATION_PHRASES[relation][0]} the {second.color} {lexicon.KIND_NOUNS[second.kind][0][0]}",
        f"{first.color} {lexicon.KIND_NOUNS[first.kind][0][0]}",
    )


def _plain_background(background: str) -> str:
    return lexicon.BACKGROUND_PHRASES[background][0][1].removeprefix("the ").removeprefix("a ")
