"""What several settings share: names that are allowed, and the checks that each class makes at construction.

What they say was expected is also read by capfilt/settings/described.py: "at least 1", "0 to 1", "one of a, b".
"""

from __future__ import annotations

from collections.abc import Sequence

from capfilt.errors import UsageError
from capfilt.settings.values import did_you_mean

EMBEDDED = "embedded"
"""The name that asks for a model shipped in the package; never taken unless it is named."""

MAX_WORLD_URLS = 2**24
"""Of the miniature world: scenes that a seed has."""
DECODINGS = ("nucleus", "greedy", "beam", "top-k")
DEVICES = ("auto", "cpu", "cuda", "mps")
RESIZERS = ("torchvision", "pillow")
DTYPES = ("auto", "float32", "bfloat16", "float16")


_OTHER_NAMES = {"gpu": "cuda", "nvidia": "cuda", "metal": "mps", "apple": "mps", "fp32": "float32", "fp16": "float16",
                "half": "float16", "bf16": "bfloat16"}  # fmt: skip
"""What people call a name that is allowed."""


def require(condition: bool, name: str, value: object, expected: str) -> None:
    """Raise UsageError with the setting's name, its value and what was expected, unless `condition` holds."""
    if not condition:
        raise UsageError(f"{name} is {value!r}; expected {expected}.")


def require_one_of(name: str, value: str, known: Sequence[str]) -> None:
    """UsageError, with the nearest name, unless `value` is one of the `known` names."""
    if value not in known:
        raise UsageError(not_one_of(name, value, known))


def require_some_of(name: str, values: Sequence[str], known: Sequence[str]) -> None:
    """UsageError, with the name nearest to a wrong one, unless `values` are some of the `known` names, at least one."""
    wrong = [value for value in values if value not in known]
    if wrong or not values:
        nearest = did_you_mean(wrong[0], known) if wrong else ""
        raise UsageError(f"{name} is {values!r}; expected some of {', '.join(known)}.{nearest}")


def require_device(value: str) -> None:
    """UsageError unless `value` is a device, perhaps with its number (cuda:1)."""
    if value.split(":")[0] not in DEVICES:
        raise UsageError(not_one_of("device", value, DEVICES))


def not_one_of(name: str, value: str, known: Sequence[str]) -> str:
    """The message for a `value` that is none of the `known` names, with the nearest."""
    other = _OTHER_NAMES.get(value.split(":")[0].lower())
    nearest = f" Did you mean {other}?" if other in known else did_you_mean(value, known)
    return f"{name} is {value!r}; expected one of {', '.join(known)}.{nearest}"
