"""Lines of a text file that a user names, one at a time and none longer than is expected.

In: a file in UTF-8. Out: its lines with their numbers; UsageError names the line that is too long.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from capfilt.errors import UsageError

MAX_LINE_CHARS = 1 << 20


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines that are not blank, numbered from 1 in the file, without their ends."""
    with open(path, encoding="utf-8-sig", newline="\n") as file:
        try:
            number = 0
            while line := file.readline(MAX_LINE_CHARS):
                number += 1
                if len(line) == MAX_LINE_CHARS:
                    raise UsageError(f"{path}, line {number} has {MAX_LINE_CHARS:,} characters or more.")
                if line.strip():
                    yield number, line.rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise UsageError(f"{path} is not text in UTF-8 ({error.reason}). Convert it: `iconv -t utf-8`.") from None
