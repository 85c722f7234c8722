"""Settings described for people and programs: each one's type, default, sentence, and the values that are allowed.

In: a class of settings. Out: a `Setting` per field. The sentence is the text below the field in the source. What is
allowed is asked of the class itself: it refuses a wrong value in words ("at least 1", "0 to 1", "one of a, b"), which
are read here, and kept where they contradict no value that it takes.
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from itertools import pairwise
from typing import Any, get_args, get_origin, get_type_hints

from capfilt.errors import UsageError
from capfilt.settings.values import without_none

NAMES = {str: "string", int: "integer", float: "number", bool: "boolean"}
"""Types of Python → those of JSON Schema."""

_NUMBER = r"(-?\d+(?:\.\d+)?)"
_BOUNDS = (
    (rf"^at least {_NUMBER}\b", ("minimum",)),
    (rf"^{_NUMBER} to {_NUMBER}\b", ("minimum", "maximum")),
    (rf"^{_NUMBER} to [a-z]", ("minimum",)),
    (rf"^{_NUMBER}(?: \([\w ]+\))? or more\b", ("minimum",)),
    (rf"\bmore than {_NUMBER}\b", ("exclusiveMinimum",)),
    (rf"\bless than {_NUMBER}\b", ("exclusiveMaximum",)),
    (rf"\bat most {_NUMBER}\b", ("maximum",)),
    (rf"^a multiple of {_NUMBER}$", ("multipleOf",)),
)
"""Words of a refusal → what of JSON Schema they say."""
_WRONG_TEXT = "no such name"
_PROBES: Mapping[type, Sequence[Any]] = {
    int: (-1, 0, 1, 2, 3, 100, 10**9),
    float: (-1.0, 0.0, 0.5, 1.0, 2.0, 1e9),
    str: (_WRONG_TEXT,),
    bool: (),
}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One setting of a class."""

    name: str
    hint: Any
    """Its type."""
    default: Any
    sentence: str
    """What it is, with its unit and its source."""
    allowed: Mapping[str, Any]
    """What JSON Schema calls the values that it may have, None aside: `type`, `enum`, `minimum`, `items`, …"""


@cache
def describe(cls: type) -> tuple[Setting, ...]:
    """The settings of a class, in their order."""
    hints, sentences = get_type_hints(cls), _sentences(cls)
    return tuple(
        Setting(
            name=f.name, hint=hints[f.name], default=None if f.default is MISSING else f.default,
            sentence=sentences.get(f.name, ""), allowed=_allowed(cls, f.name, hints[f.name]),
        )
        for f in fields(cls)
    )  # fmt: skip


def names_of(cls: type, setting: str) -> tuple[str, ...]:
    """The names that a setting may have; none where any text is allowed."""
    allowed = next(one.allowed for one in describe(cls) if one.name == setting)
    return tuple(_names_in(allowed.get("items", allowed)))


def _names_in(allowed: Mapping[str, Any]) -> Sequence[str]:
    return next((one["enum"] for one in (allowed, *allowed.get("anyOf", ())) if "enum" in one), ())


def _sentences(cls: type) -> dict[str, str]:
    """Field → the text below it, of the class and those it is made from."""
    found: dict[str, str] = {}
    for part in reversed(cls.__mro__):
        if not is_dataclass(part):
            continue
        tree = ast.parse(textwrap.dedent(inspect.getsource(part)))
        body = next(node for node in tree.body if isinstance(node, ast.ClassDef)).body
        for node, following in pairwise(body):
            if not (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)):
                continue
            text = following.value if isinstance(following, ast.Expr) else None
            if isinstance(text, ast.Constant) and isinstance(text.value, str):
                found[node.target.id] = " ".join(text.value.split())
    return found


# --- what is allowed ----------------------------------------------------------------------------------------


def _allowed(cls: type, name: str, hint: Any) -> dict[str, Any]:
    hint = without_none(hint)
    if get_origin(hint) is not tuple:
        return {"type": NAMES[hint]} | _limits(cls, name, _PROBES[hint], lambda value: value)
    item = get_args(hint)[0]
    limits = _limits(cls, name, _PROBES[item], lambda value: (value,))
    whole = {"minItems": 1} if _refusal(cls, name, ()) else {}
    return {"type": "array", "items": {"type": NAMES[item]} | limits} | whole


def _limits(cls: type, name: str, probes: Sequence[Any], wrap: Callable[[Any], Any]) -> dict[str, Any]:
    """What the refusals of some values say, as long as it holds for the values that are taken."""
    refusals = {value: _refusal(cls, name, wrap(value)) for value in probes}
    taken = [value for value, refusal in refusals.items() if not refusal]
    limits: dict[str, Any] = {}
    for refusal in filter(None, refusals.values()):
        for key, limit in _read(refusal).items():
            if all(_fits(value, key, limit) for value in taken):
                limits[key] = limit
    names = limits.get("enum")
    if names and not _refusal(cls, name, wrap(f"{names[-1]}:1")):  # cuda:1
        return {"anyOf": [{"enum": names}, {"pattern": f"^({'|'.join(map(re.escape, names))}):"}]}
    return limits


def _refusal(cls: type, name: str, value: Any) -> str:
    """The words with which the class refuses a value of a setting, the others at their defaults; else nothing."""
    try:
        cls(**{name: value})
    except UsageError as error:
        said = re.match(rf"{name} is .*?; expected (.+?)\.( Did you mean .*)?$", str(error), re.DOTALL)
        return said.group(1) if said else ""
    return ""


def _read(refusal: str) -> dict[str, Any]:
    """What a refusal says, in JSON Schema's words."""
    listed = re.match(r"(?:one|some) of ([\w-]+(?:, [\w-]+)*)$", refusal) or re.match(
        r"([a-z][\w-]* or [\w-]+)$", refusal
    )
    if listed:
        return {"enum": re.split(r", | or ", listed.group(1))}
    found: dict[str, Any] = {}
    for words, keys in _BOUNDS:
        if match := re.search(words, refusal):
            numbers = (float(number) if "." in number else int(number) for number in match.groups())
            found.update(zip(keys, numbers, strict=True))
    return found


def _fits(value: Any, key: str, limit: Any) -> bool:
    """Whether a value keeps to one limit."""
    checks: dict[str, Callable[[Any, Any], bool]] = {
        "minimum": lambda v, n: v >= n,
        "maximum": lambda v, n: v <= n,
        "exclusiveMinimum": lambda v, n: v > n,
        "exclusiveMaximum": lambda v, n: v < n,
        "multipleOf": lambda v, n: v % n == 0,
        "enum": lambda v, names: v in names,
    }
    return checks[key](value, limit)
