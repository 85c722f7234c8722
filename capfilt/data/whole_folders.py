"""A folder that is there whole or not at all, and replaces none but one that was written in the same way.

It grows in a staging place beside the one it is for. What a crash left there is removed by the next one for that place.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from capfilt.data.disk import new_staging, remove_dead_staging, sync_directory
from capfilt.data.paths import refuse_address
from capfilt.errors import UsageError


@contextmanager
def whole_folder(path: Path, mark: str, *, overwrite: bool = False) -> Iterator[Path]:
    """An empty folder to fill, which gets its name, durably, when the block ends without an error.

    The block writes the file `mark` too; a folder that has it may be replaced. Killed at the moment of replacing, the
    old one is gone and the new one is not there.

    Raises UsageError where `path` may not be written to.
    """
    refuse_place(path, mark, overwrite=overwrite)
    path = Path(os.path.abspath(path))  # `.` has no name
    root = path.with_name(f".{path.name}.staging")
    remove_dead_staging(root)
    try:
        with new_staging(root) as staging:
            folder = staging / "new"
            folder.mkdir()
            yield folder
            os.sync()  # of many small files at once
            refuse_place(path, mark, overwrite=overwrite)  # another may have come meanwhile
            if path.exists() and any(path.iterdir()):
                os.rename(path, staging / "old")
            os.rename(folder, path)
            sync_directory(path.parent)
    finally:
        with suppress(OSError):  # another attempt is at work in it
            root.rmdir()


def refuse_place(path: Path, mark: str, *, overwrite: bool) -> None:
    """Raise UsageError where a folder may not be written: another is there, or there is none to hold it."""
    refuse_address(path, "A folder")
    if path.exists() and not path.is_dir():
        raise UsageError(f"{path} is a file; a folder is written. Name another place.")
    if path.exists() and path.samefile(Path.cwd()):
        raise UsageError(
            f"{path} is the folder you are in; a folder that is there only when it is whole is written. Name another."
        )
    if path.is_dir() and any(path.iterdir()):
        if not overwrite:
            raise UsageError(f"{path} is there already. Name another folder, or give --overwrite.")
        if not (path / mark).is_file():
            raise UsageError(
                f"{path} holds other files: it has no {mark}, as what it may replace has. Name another folder."
            )
    if not path.absolute().parent.is_dir():
        raise UsageError(f"There is no directory {path.parent} for {path.name}. Make it, or name another folder.")


def write_json(path: Path, value: object) -> None:
    """A new small JSON file."""
    with open(path, "x", encoding="utf-8") as file:
        json.dump(value, file, ensure_ascii=False, allow_nan=False, indent=2)
        file.write("\n")
