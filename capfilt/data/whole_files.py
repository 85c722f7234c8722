"""A file that is written whole or not at all, and replaces no other one unless it may."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO
from uuid import uuid4

from capfilt.data.paths import refuse_address
from capfilt.errors import UsageError


@contextmanager
def whole_file(path: Path) -> Iterator[TextIO]:
    """A text file (UTF-8, line ends as they are written) that gets its name when the block ends without an error."""
    temporary = path.with_name(f".{path.name}-{uuid4().hex}")
    try:
        with open(temporary, "x", encoding="utf-8", newline="") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def refuse_existing(path: Path, *, overwrite: bool) -> None:
    """Raise UsageError where something of that name is there and may not be replaced, or its folder is missing."""
    refuse_address(path, "A file")
    if path.is_dir():
        raise UsageError(f"{path} is a directory; a file is written. Name a file.")
    if path.exists() and not overwrite:
        raise UsageError(f"{path} is there already. Name another file, or give --overwrite.")
    if not path.parent.is_dir():
        raise UsageError(f"There is no directory {path.parent} for {path.name}. Make it, or name another file.")
