"""Values as a recipe or the command line gives them, made the type that a setting has; names mended.

In: a value of a TOML file or the text behind `NAME=`, and the setting's type. Out: the typed value; TypeError carries
what was expected, in words that follow "expected".
"""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterable
from typing import Any, Union, get_args, get_origin

VERY_NEAR = 0.75
"""Share of the letters of two names that are the same, from which a list of all names would only hide the nearest."""
_EXPECTED = {str: "a text in quotes", int: "a whole number", float: "a number", bool: "true or false"}


def typed(value: object, hint: Any) -> object:
    """`value` of a TOML file as the type `hint`; TypeError carries what was expected."""
    hint = without_none(hint)
    if get_origin(hint) is tuple:
        if not isinstance(value, list):
            raise TypeError("a list in brackets")
        return tuple(typed(item, get_args(hint)[0]) for item in value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise TypeError("a smaller number") from None
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise TypeError(_EXPECTED[hint])
    return value


def typed_text(text: str, hint: Any) -> object:
    """`text` of the command line as the type `hint`, the items of a tuple between commas; TypeError as `typed`."""
    hint = without_none(hint)
    if get_origin(hint) is tuple:
        item_hint = get_args(hint)[0]
        return tuple(typed_text(item.strip(), item_hint) for item in text.split(",") if item.strip())
    if hint is bool:
        return typed({"true": True, "false": False}.get(text, text), hint)
    try:
        return hint(text)
    except ValueError:
        return typed(text, hint)


def did_you_mean(word: str, known: Iterable[str], before: str = "") -> str:
    """A sentence, after a space, with the nearest of the `known` names (all that are as near), `before` set before
    each; or nothing. Capitals do not count."""
    listed = " or ".join(before + name for name in nearest_of(word, known))
    return f" Did you mean {listed}?" if listed else ""


def nearest_or_all(word: str, known: Iterable[str]) -> str:
    """After a space, the nearest of the `known` names, and unless it is very near all of them, as sentences."""
    names = list(known)
    near = nearest_of(word, names)
    listed = "" if near and _likeness(word, near[0].lower()) >= VERY_NEAR else f" Known: {', '.join(names)}."
    return f"{did_you_mean(word, names)}{listed}"


def nearest_of(word: str, known: Iterable[str]) -> list[str]:
    """The nearest of the `known` names, all that are as near; none where nothing is like it. Capitals do not count."""
    names = {name.lower(): name for name in known}
    near = difflib.get_close_matches(word.lower(), names, n=3, cutoff=0.5)
    return [names[name] for name in sorted(near) if _likeness(word, name) == _likeness(word, near[0])]


def _likeness(word: str, name: str) -> float:
    return difflib.SequenceMatcher(a=name, b=word.lower()).ratio()


def without_none(hint: Any) -> Any:
    """The type of a setting that may also be None."""
    if get_origin(hint) in (Union, types.UnionType):
        return next(option for option in get_args(hint) if option is not type(None))
    return hint
