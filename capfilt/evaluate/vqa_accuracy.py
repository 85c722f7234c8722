"""VQA accuracy as the evaluation code of the VQA data set computes it (Antol et al. 2015, §3; VQAv2).

In: an answer and the answers of ten people. Out: 0 to 1. Both sides are normalised first:

1. line breaks and tabs are spaces, those at the ends go
2. each mark of PUNCTUATION goes, where it stands beside a space anywhere in the text, or the text has a comma between
   digits; elsewhere it becomes a space
3. a full stop that no digit follows goes
4. lower case; number words up to ten become digits, "none" becomes 0; a, an and the go
5. contractions without their apostrophe get it: dont → don't

The released versions of that code differ in whether ten equal answers are normalised, and people's answers by steps 4
and 5; here everything is, so that an answer never loses for its spelling alone. VQAv2's answers are published in
lower case and mostly normalised, so that little depends on it. (The code also stops step 3 after 32 full stops, by a
flag in the place of a count; here it does not.)
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
ARTICLES = frozenset(("a", "an", "the"))
NUMBER_WORDS = {
    "none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6",
    "seven": "7", "eight": "8", "nine": "9", "ten": "10",
}  # fmt: skip

_ONE_APOSTROPHE = """
ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's isn't it'd
it'll ma'am might've mightn't must've mustn't needn't not've o'clock oughtn't shan't should've shouldn't somebody'll
somebody's someone'd someone'll someone's something'd something'll that's there'd there're there's they'd they'll
they're they've 'twas wasn't we've weren't what'll what're what's what've when's where'd where's where've who'd who'll
who's who've why'll why're why's won't would've wouldn't y'all you'd you'll you're you've
"""
_MORE_APOSTROPHES = """
couldn't've hadn't've he'd've it'd've mightn't've 'ow's'at she'd've shouldn't've somebody'd've someone'd've
something'd've there'd've they'd've we'd've who'd've wouldn't've y'all'd've y'all'll you'd've
"""


def _without_one_apostrophe(word: str) -> list[str]:
    return [word[:place] + word[place + 1 :] for place, mark in enumerate(word) if mark == "'"]


CONTRACTIONS = {
    wrong: right for right in (_ONE_APOSTROPHE + _MORE_APOSTROPHES).split() for wrong in _without_one_apostrophe(right)
} | {"somebody'd": "somebodyd"}  # the one that the table has the other way round
"""Spelling that lacks one apostrophe → with it. Spellings that are words of their own (were, well) are not here."""

_COMMA_BETWEEN_DIGITS = re.compile(r"\d,\d")
_FULL_STOP = re.compile(r"\.(?!\d)")


@lru_cache(maxsize=1 << 16)  # "yes" is said a hundred thousand times
def normalise_answer(text: str) -> str:
    """The answer by which two spellings are the same answer; normalising twice changes nothing."""
    text = text.replace("\n", " ").replace("\t", " ").strip()
    text = _FULL_STOP.sub("", _replace_marks(text))
    words = (NUMBER_WORDS.get(word, word) for word in text.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def answer_accuracy(answer: str, references: Sequence[str]) -> float:
    """The mean, over each person left out in turn, of min(1, people of the others who say the same / 3)."""
    said = normalise_answer(answer)
    matches = sum(normalise_answer(reference) == said for reference in references)
    others = len(references) - matches
    return (matches * min(1.0, (matches - 1) / 3) + others * min(1.0, matches / 3)) / len(references)


def _replace_marks(text: str) -> str:
    has_comma_between_digits = _COMMA_BETWEEN_DIGITS.search(text) is not None
    replaced = text
    for mark in PUNCTUATION:
        goes = has_comma_between_digits or f"{mark} " in text or f" {mark}" in text
        replaced = replaced.replace(mark, "" if goes else " ")
    return replaced
