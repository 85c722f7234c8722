"""Names of many tars in few words: `{00000..00099}`, `{train,dev}`, `*` and `?`.

In: patterns as typed. Out: existing local files, each once, in the order of the patterns (a glob sorted).
"""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from capfilt.errors import UsageError

MAX_PATHS = 1_000_000
"""Most names that one command takes."""

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d{1,12})\.\.(\d{1,12})")
_ADDRESS = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*:")


def expand_patterns(patterns: Sequence[str]) -> list[Path]:
    """Give the files that `patterns` name. Raises UsageError when one names nothing or no local file."""
    found: dict[Path, None] = {}
    for pattern in patterns:
        if Path(pattern).is_file():  # a name may contain what looks like a pattern
            found[Path(pattern)] = None
            continue
        if _ADDRESS.match(pattern):
            raise UsageError(f"{pattern} is an address; expected local tars. Copy them here first: `rclone copy`.")
        for name in expand_braces(pattern):
            matches = sorted(glob.glob(name, recursive=True)) if glob.has_magic(name) else [name]
            paths = [Path(match) for match in matches]
            absent = [path for path in paths if not path.is_file()]
            if absent or not paths:
                raise UsageError(
                    f"{absent[0] if absent else name} is not there (from {pattern!r}); expected tars such as "
                    "'shards/{00000..00099}.tar' or 'shards/*.tar'."
                )
            found |= dict.fromkeys(paths)
            if len(found) > MAX_PATHS:
                raise UsageError(f"{pattern!r} names more than {MAX_PATHS:,} files. Import them in several commands.")
    if not found:
        raise UsageError("No tars were named. Give paths such as 'shards/{00000..00099}.tar' or 'shards/*.tar'.")
    return list(found)


def expand_braces(pattern: str) -> Iterator[str]:
    """Expand the braces of a pattern as a shell does; a width of leading zeros is kept."""
    match = _BRACES.search(pattern)
    if match is None:
        yield pattern
        return
    before, after = pattern[: match.start()], pattern[match.end() :]
    if bounds := _RANGE.fullmatch(match[1]):
        first, last = int(bounds[1]), int(bounds[2])
        if abs(last - first) >= MAX_PATHS:
            raise UsageError(f"{pattern!r} names more than {MAX_PATHS:,} files. Import them in several commands.")
        has_zeros = any(len(bound) > 1 and bound.startswith("0") for bound in bounds.groups())
        width = max(map(len, bounds.groups())) if has_zeros else 0
        numbers = range(first, last + 1) if first <= last else range(first, last - 1, -1)
        choices: list[str] = [f"{number:0{width}d}" for number in numbers]
    elif "," in match[1]:
        choices = match[1].split(",")
    else:
        raise UsageError(f"{{{match[1]}}} in {pattern!r} is neither a range {{0..9}} nor a list {{a,b}}.")
    for choice in choices:
        yield from expand_braces(f"{before}{choice}{after}")
