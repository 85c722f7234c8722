"""The words of the miniature world: every phrase, and the fact it states.

One table serves the writer and the judge (`capfilt.world.language`), so whatever is written can be judged.
"""

from __future__ import annotations

KIND_NOUNS: dict[str, tuple[tuple[str, str], ...]] = {
    # kind: (singular, plural), the plain noun first
    "ball": (("ball", "balls"), ("sphere", "spheres"), ("globe", "globes")),
    "box": (("box", "boxes"), ("parcel", "parcels"), ("crate", "crates")),
    "cone": (("cone", "cones"), ("triangle", "triangles"), ("pyramid", "pyramids")),
    "cross": (("cross", "crosses"), ("plus sign", "plus signs")),
    "ring": (("ring", "rings"), ("hoop", "hoops"), ("donut", "donuts")),
    "star": (("star", "stars"), ("starfish", "starfishes")),
    "heart": (("heart", "hearts"), ("valentine", "valentines")),
    "moon": (("moon", "moons"), ("crescent", "crescents"), ("half moon", "half moons")),
    "kite": (("kite", "kites"), ("diamond", "diamonds")),
    "tree": (("tree", "trees"), ("lollipop tree", "lollipop trees")),
    "flower": (("flower", "flowers"), ("blossom", "blossoms"), ("bloom", "blooms")),
    "flag": (("flag", "flags"), ("banner", "banners"), ("pennant", "pennants")),
}
COLOR_WORDS: dict[str, tuple[str, ...]] = {
    "red": ("red", "scarlet"),
    "orange": ("orange", "tangerine"),
    "yellow": ("yellow", "lemon"),
    "green": ("green", "emerald"),
    "blue": ("blue", "azure"),
    "purple": ("purple", "violet"),
    "pink": ("pink", "rosy"),
    "brown": ("brown", "chocolate"),
    "white": ("white", "ivory"),
    "black": ("black", "jet black"),
}
SIZE_WORDS: dict[str, tuple[str, ...]] = {
    "small": ("small", "little", "tiny"),
    "large": ("large", "big", "huge"),
}
COUNT_WORDS: dict[int, tuple[str, ...]] = {
    2: ("two", "a pair of", "a couple of"),
    3: ("three", "a trio of", "a group of three"),
    4: ("four", "a group of four"),
    5: ("five", "a group of five"),
}
ONE_WORDS = ("a", "an", "one", "the", "a single", "a lone")
MANY_WORDS = ("some", "several", "many")
"""Two or more, without saying how many."""
BACKGROUND_PHRASES: dict[str, tuple[tuple[str, str], ...]] = {
    # ground: (where something is, what it is), the plain phrase first
    "grass": (("on the grass", "the grass"), ("on a lawn", "a lawn"), ("in a green meadow", "a green meadow")),
    "sand": (("on the sand", "the sand"), ("on a beach", "a beach"), ("in the desert", "the desert")),
    "water": (("on the water", "the water"), ("in the sea", "the sea"), ("on a lake", "a lake")),
    "snow": (("in the snow", "the snow"), ("on a snowy field", "a snowy field"), ("on ice", "ice")),
    "night": (
        ("in the night sky", "the night sky"),
        ("at night", "the night"),
        ("among the stars of the dark sky", "the dark sky"),
    ),
    "brick": (("on a brick wall", "a brick wall"), ("in front of bricks", "bricks"), ("against a wall", "a wall")),
    "wood": (("on a wooden floor", "a wooden floor"), ("on wood", "wood"), ("on a table", "a table")),
    "cloth": (
        ("on a checkered cloth", "a checkered cloth"),
        ("on tiles", "tiles"),
        ("on a picnic blanket", "a picnic blanket"),
    ),
}
RELATION_PHRASES: dict[str, tuple[str, ...]] = {
    "left": ("left of", "to the left of", "on the left side of"),
    "right": ("right of", "to the right of", "on the right side of"),
    "above": ("above", "over", "higher than", "on top of"),
    "below": ("below", "under", "beneath", "lower than"),
}
CONVERSE = {"left": "right", "right": "left", "above": "below", "below": "above"}
OPENERS = (
    "a photo of", "a picture of", "an image of", "a drawing of", "there is", "there are", "here is", "here are",
    "this is", "these are", "we see", "you can see", "this picture shows", "the image shows", "look at",
    "i found", "my photo of",
)  # fmt: skip
VERBS = ("is", "are", "sits", "sit", "lies", "lie", "rests", "rest", "stands", "stand", "placed", "shown", "seen")
QUESTION_WORDS = (
    "what", "color", "how", "many", "which", "where", "size", "object", "objects", "there", "does", "it", "yes", "no",
    "question", "answer", "short", "do", "you", "see", "describe", "background", "any", "to", "of", "in", "caption",
)  # fmt: skip


def vocabulary() -> tuple[str, ...]:
    """Every word that a caption, a question or an answer can hold, sorted."""
    phrases: list[str] = [*ONE_WORDS, *MANY_WORDS, *OPENERS, *VERBS, *QUESTION_WORDS, "and", "with", "on it", "in it"]
    phrases += [noun for nouns in KIND_NOUNS.values() for pair in nouns for noun in pair]
    phrases += [phrase for phrases_ in BACKGROUND_PHRASES.values() for pair in phrases_ for phrase in pair]
    for table in (COLOR_WORDS, SIZE_WORDS, RELATION_PHRASES):
        phrases += [phrase for words in table.values() for phrase in words]
    phrases += [phrase for words in COUNT_WORDS.values() for phrase in words]
    return tuple(sorted({word for phrase in phrases for word in phrase.split()}))
