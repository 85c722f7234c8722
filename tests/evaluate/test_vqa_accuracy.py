"""VQA accuracy and its normalisation, against the rules of the evaluation code written out at length."""

from __future__ import annotations

import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from capfilt.evaluate.vqa_accuracy import CONTRACTIONS, NUMBER_WORDS, answer_accuracy, normalise_answer

# The table of the evaluation code, in lower case, as "without → with"; what is never reached (capitals) is left out.
_TABLE = (
    "aint:ain't arent:aren't cant:can't couldve:could've couldnt:couldn't couldn'tve:couldn't've "
    "couldnt've:couldn't've didnt:didn't doesnt:doesn't dont:don't hadnt:hadn't hadnt've:hadn't've "
    "hadn'tve:hadn't've hasnt:hasn't havent:haven't hed:he'd hed've:he'd've he'dve:he'd've hes:he's howd:how'd "
    "howll:how'll hows:how's isnt:isn't itd:it'd itd've:it'd've it'dve:it'd've itll:it'll maam:ma'am "
    "mightnt:mightn't mightnt've:mightn't've mightn'tve:mightn't've mightve:might've mustnt:mustn't mustve:must've "
    "neednt:needn't notve:not've oclock:o'clock oughtnt:oughtn't ow's'at:'ow's'at 'ows'at:'ow's'at "
    "'ow'sat:'ow's'at shant:shan't shed've:she'd've she'dve:she'd've shouldve:should've shouldnt:shouldn't "
    "shouldnt've:shouldn't've shouldn'tve:shouldn't've somebody'd:somebodyd somebodyd've:somebody'd've "
    "somebody'dve:somebody'd've somebodyll:somebody'll somebodys:somebody's someoned:someone'd "
    "someoned've:someone'd've someone'dve:someone'd've someonell:someone'll someones:someone's "
    "somethingd:something'd somethingd've:something'd've something'dve:something'd've somethingll:something'll "
    "thats:that's thered:there'd thered've:there'd've there'dve:there'd've therere:there're theres:there's "
    "theyd:they'd theyd've:they'd've they'dve:they'd've theyll:they'll theyre:they're theyve:they've twas:'twas "
    "wasnt:wasn't wed've:we'd've we'dve:we'd've weve:we've werent:weren't whatll:what'll whatre:what're "
    "whats:what's whatve:what've whens:when's whered:where'd wheres:where's whereve:where've whod:who'd "
    "whod've:who'd've who'dve:who'd've wholl:who'll whos:who's whove:who've whyll:why'll whyre:why're whys:why's "
    "wont:won't wouldve:would've wouldnt:wouldn't wouldnt've:wouldn't've wouldn'tve:wouldn't've yall:y'all "
    "yall'll:y'all'll y'allll:y'all'll yall'd've:y'all'd've y'alld've:y'all'd've y'all'dve:y'all'd've youd:you'd "
    "youd've:you'd've you'dve:you'd've youll:you'll youre:you're youve:you've"
)
TABLE = dict(pair.split(":") for pair in _TABLE.split())
MARKS = [";", "/", "[", "]", '"', "{", "}", "(", ")", "=", "+", "\\", "_", "-", ">", "<", "@", "`", ",", "?", "!"]


def specification(text: str) -> str:
    """The rules, one after the other, character by character."""
    text = text.replace("\n", " ").replace("\t", " ").strip()
    out = text
    for mark in MARKS:
        beside_space = any(text[n : n + 2] in (mark + " ", " " + mark) for n in range(len(text)))
        number_with_comma = any(
            re.match(r"\d", text[n - 1]) and text[n] == "," and re.match(r"\d", text[n + 1])
            for n in range(1, len(text) - 1)
        )
        out = out.replace(mark, "") if beside_space or number_with_comma else out.replace(mark, " ")
    kept = ""
    for n, character in enumerate(out):
        if character == "." and not (n + 1 < len(out) and re.match(r"\d", out[n + 1])):
            continue
        kept += character
    words = []
    for word in kept.lower().split():
        word = NUMBER_WORDS.get(word, word)
        if word not in ("a", "an", "the"):
            words.append(TABLE.get(word, word))
    return " ".join(words)


PIECES = [*MARKS, " ", "\n", "\t", ".", ",", "1", "2", "a", "the", "one", "none", "dont", "couldntve", "T", "İ", "٣"]
answers = st.lists(st.sampled_from(PIECES), max_size=12).map("".join) | st.text(max_size=20)


def test_the_table_of_contractions() -> None:
    assert CONTRACTIONS == TABLE


@given(text=answers)
@example(text="Yes.")
@example(text="The man's 1,000 t-shirts!")
def test_normalisation_is_the_specification_and_changes_nothing_twice(text: str) -> None:
    found = normalise_answer(text)
    assert found == specification(text)
    assert normalise_answer(found) == found


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A dog.", "dog"), ("t-shirt", "t shirt"), ("black, white", "black white"), ("black,white", "black white"),
        ("1,000", "1000"), ("$1.50", "$1.50"), ("2.", "2"), ("dont know", "don't know"), ("None", "0"),
        ("Ten\n", "10"), ("yes/no", "yes no"), ("yes / no", "yes no"), ("an", ""), ("o'clock", "o'clock"),
        ("it's", "it's"), ("north-west , 5", "north west 5"), ("blue- green", "blue green"), ("5 p.m.", "5 pm"),
    ],
)  # fmt: skip
def test_known_answers(text: str, expected: str) -> None:
    assert normalise_answer(text) == expected


@pytest.mark.parametrize(("same", "expected"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_known_accuracies(same: int, expected: float) -> None:
    """As the data set's authors list them: 0, 30, 60, 90 and 100 percent."""
    assert answer_accuracy("Yes", ["yes"] * same + ["no"] * (10 - same)) == pytest.approx(expected)


@given(answer=st.sampled_from(["1", "one", "2", "the 2", "x"]), people=st.lists(answers | st.just("1"), min_size=1))
def test_accuracy_is_the_mean_over_those_left_out(answer: str, people: list[str]) -> None:
    scores = []
    for left_out in range(len(people)):
        others = [specification(text) for n, text in enumerate(people) if n != left_out]
        scores.append(min(1.0, others.count(specification(answer)) / 3))
    assert answer_accuracy(answer, people) == pytest.approx(sum(scores) / len(scores))
