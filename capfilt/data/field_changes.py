"""What differs between the parameters that a result was made with and those asked for now, in words.

In: two dictionaries of a fingerprint's fields. Out: a text for each entry that differs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from capfilt.data.sealed import canonical_json

_DIGEST = re.compile(r"[0-9a-f]{64}")
_ABSENT = object()


def field_changes(
    old: Mapping[str, Any], new: Mapping[str, Any], digests: Mapping[str, str] | None = None
) -> list[str]:
    """`name old -> new` of each entry that differs, by their names; of a sha256, that it is another.

    Entries of an inner dictionary are named by themselves, as `outer: inner old -> new`. `digests`: name of an entry
    that is a digest → what it is of.
    """
    changes: list[str] = []
    for name in sorted({*old, *new}):
        before, after = old.get(name, _ABSENT), new.get(name, _ABSENT)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            changes += [f"{name}: {change}" for change in field_changes(before, after)]
        elif _differ(before, after):
            changes.append(
                f"another {digests[name]}" if digests and name in digests else _in_words(name, before, after)
            )
    return changes


def _differ(before: Any, after: Any) -> bool:
    """As numbers, and as JSON: 1 is 1.0, and a tuple is a list."""
    if before is _ABSENT or after is _ABSENT:
        return True
    return before != after and canonical_json(before) != canonical_json(after)


def _in_words(name: str, before: Any, after: Any) -> str:
    is_digest = [isinstance(value, str) and _DIGEST.fullmatch(value) is not None for value in (before, after)]
    if all(is_digest):
        return f"another {name}"
    if any(is_digest) and _ABSENT in (before, after):
        return f"{name} besides" if before is _ABSENT else f"no {name}"
    return f"{name} {_shown(before)} -> {_shown(after)}"


def _shown(value: Any) -> str:
    return "none" if value is _ABSENT else repr(value)
