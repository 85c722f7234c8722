"""Where the encoded bytes of an image come from: a file of a folder, or a sample of a run's shard.

In: a folder and the name that an annotation file gives, or a run. Out: sources that are read one at a time.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from capfilt.data.rundir import RunDir
from capfilt.data.shards import read_located, sample_rows
from capfilt.errors import UsageError
from capfilt.progress import counted

MAX_FILE_BYTES = 256 << 20
"""Largest image file that is read; a larger one counts as unreadable."""


class ImageSource(Protocol):
    """An image whose bytes are read when they are asked for."""

    @property
    def name(self) -> str:
        """For people: its path, or its key."""
        ...

    def read(self) -> bytes:
        """The encoded bytes. OSError where they cannot be had, CorruptionError for a damaged shard."""
        ...


@dataclass(frozen=True, slots=True)
class ImageFile:
    """An image file."""

    path: Path

    @property
    def name(self) -> str:
        return str(self.path)

    def read(self) -> bytes:
        """Raises OSError for what is no plain file (a pipe would never end) or too large."""
        descriptor = os.open(self.path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            facts = os.fstat(descriptor)
            if not stat.S_ISREG(facts.st_mode):
                raise OSError(errno.EINVAL, "it is no plain file", self.name)
            if facts.st_size > MAX_FILE_BYTES:
                raise OSError(errno.EFBIG, f"it has more than {MAX_FILE_BYTES:,} bytes", self.name)
            with open(descriptor, "rb", closefd=False) as file:
                return file.read(MAX_FILE_BYTES)
        finally:
            os.close(descriptor)


@dataclass(frozen=True, slots=True)
class ShardImage:
    """A sample of a committed shard; its bytes are checked against the shard's rows when they are read."""

    run: RunDir
    shard: str
    key: str
    row: dict[str, Any] = field(repr=False, compare=False)

    @property
    def name(self) -> str:
        return self.key

    def read(self) -> bytes:
        return read_located(self.run, self.shard, self.row).image


def refuse_missing(sources: Sequence[ImageSource]) -> None:
    """UsageError that counts the image files which are not there: before hours of work, not after."""
    missing = [source.name for source in sources if isinstance(source, ImageFile) and not source.path.is_file()]
    if missing:
        raise UsageError(
            f"{counted(len(missing), 'image')} of {len(sources):,} cannot be found: {', '.join(missing[:3])}"
            f"{', …' if len(missing) > 3 else ''}. Fetch what lacks, or take it out of the file."
        )


def find_image(images_dir: Path | None, names: Iterable[str], where: str) -> ImageFile | None:
    """The first of `names` that is there below `images_dir`, else the first of them; None without a folder.

    Raises UsageError, which begins with `where`, for a name that could lead out of the folder. What links inside the
    folder point to is the user's affair.
    """
    if images_dir is None:
        return None
    paths = [join_name(images_dir, name, where) for name in names]
    return ImageFile(next((path for path in paths if len(paths) == 1 or path.is_file()), paths[0]))


def join_name(folder: Path, name: str, where: str) -> Path:
    """`folder`/`name` for a relative name without `..`; UsageError for any other."""
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts or "\0" in name:
        raise UsageError(f"{where} names the image {name!r}; expected a path below the folder of images.")
    return folder.joinpath(*parts)


def check_images_dir(images_dir: Path | None) -> Path | None:
    """The folder itself. Raises UsageError where it is none."""
    if images_dir is not None and not images_dir.is_dir():
        raise UsageError(f"{images_dir} is no folder. Give the folder of the images: --images DIR.")
    return images_dir


def iterate_shard_images(run: RunDir, shard: str) -> Iterator[ShardImage]:
    """The samples of a committed shard, in order, not yet read."""
    for row in sample_rows(run, shard):
        yield ShardImage(run, shard, row["key"], row)
