"""Settings described: sentences from the source, and ranges that hold."""

from __future__ import annotations

from dataclasses import dataclass

from capfilt.settings import Blip2CaptionsSettings, CaptionerTrainSettings, CaptionSettings
from capfilt.settings.checks import require
from capfilt.settings.described import describe, names_of


@dataclass(frozen=True, kw_only=True)
class Odd:
    """Settings whose refusals say more, or less, than they mean."""

    side: int = 64
    """Side,
    in pixels."""
    size: int = 0
    least: int = 1
    """Least."""
    colour: str = "red"
    """Colour."""
    name: str = "x"
    """Name."""

    def __post_init__(self) -> None:
        require(self.side % 32 == 0, "side", self.side, "a multiple of 32")
        require(self.size >= 0, "size", self.size, "at least 1, or 0 for none")
        require(1 <= self.least <= self.side, "least", self.least, "1 to side")
        require(self.colour in ("red", "blue"), "colour", self.colour, "red or blue")
        require(self.name == "x", "name", self.name, "what nobody can read")


def test_what_refusals_say_is_kept_where_it_is_true() -> None:
    found = {one.name: dict(one.allowed) for one in describe(Odd)}
    assert found == {
        "side": {"type": "integer", "multipleOf": 32},
        "size": {"type": "integer"},
        "least": {"type": "integer", "minimum": 1},
        "colour": {"type": "string", "enum": ["red", "blue"]},
        "name": {"type": "string"},
    }
    assert names_of(Odd, "colour") == ("red", "blue")
    assert names_of(Odd, "name") == ()


def test_sentences_are_those_of_the_source_the_nearest_class_first() -> None:
    assert {one.name: one.sentence for one in describe(Odd)} == {
        "side": "Side, in pixels.", "size": "", "least": "Least.", "colour": "Colour.", "name": "Name.",
    }  # fmt: skip
    captioner = {one.name: one.sentence for one in describe(CaptionerTrainSettings)}
    assert captioner["max_steps"] == "Optimizer steps."
    assert captioner["learning_rate"].startswith("Peak rate (BLIP's released code for captions")
    assert all(one.sentence for one in describe(Blip2CaptionsSettings))


def test_names_of_a_setting() -> None:
    assert names_of(CaptionSettings, "decoding") == ("nucleus", "greedy", "beam", "top-k")
    assert names_of(CaptionSettings, "device") == ("auto", "cpu", "cuda", "mps")
    assert names_of(CaptionerTrainSettings, "losses") == ("itc", "itm", "lm")
    assert names_of(CaptionSettings, "captioner") == ()
