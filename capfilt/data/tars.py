"""Tar files of our own shards: a deterministic writer and a strict reader of the plainest tar there is.

In: (name, content) members. Out: a ustar file of plain members (mode 0644, owner 0, time 0), which any tar
reader opens, and its index. Reading accepts such files only: a header of any other form, a cut, bytes behind
the end or padding that is not zero is a CorruptionError.
"""

from __future__ import annotations

import os
import re
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from capfilt.data.paths import AnyPath
from capfilt.errors import CorruptionError

BLOCK = 512
MAX_MEMBER_BYTES = 32 * 2**20
"""Longest member of a shard."""
MAX_KEY_CHARS = 90
"""Longest key: with its ending it fits a plain tar name of 100 bytes."""

_KEY = re.compile(r"(?:[A-Za-z0-9_=+@,~-][A-Za-z0-9_=+@,~.-]*/)*[A-Za-z0-9_=+@,~-]+")
_NAME = re.compile(rf"{_KEY.pattern}\.[a-z0-9_]+(?:\.[a-z0-9_]+)*")
_END = b"\0" * BLOCK


@dataclass(frozen=True, slots=True)
class TarMember:
    """Where one file lies in a tar."""

    name: str
    offset: int
    """First byte of the content."""
    length: int
    """Bytes of the content."""


def is_valid_key(key: str) -> bool:
    """Whether `key` can name the members of a shard: letters, digits, `_=+@,~-`, folders by `/`, no dot
    in the last part (webdataset splits a name at its first dot behind the folders)."""
    return len(key) <= MAX_KEY_CHARS and _KEY.fullmatch(key) is not None


def write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> list[TarMember]:
    """Write a new tar at `path`, durably, and give its index in order.

    The same members give the same bytes. Raises ValueError for a name, a size or a repetition that a shard
    may not have, FileExistsError when `path` exists.
    """
    index: list[TarMember] = []
    seen: set[str] = set()
    with open(path, "xb") as file:
        for name, content in members:
            if not _NAME.fullmatch(name) or len(name) > 100 or name in seen:
                raise ValueError(f"a shard may not have a member named {name!r} (or not twice)")
            if len(content) > MAX_MEMBER_BYTES:
                raise ValueError(f"{name} has {len(content):,} bytes; a member has {MAX_MEMBER_BYTES:,} at most")
            seen.add(name)
            file.write(_header(name, len(content)))
            index.append(TarMember(name, file.tell(), len(content)))
            file.write(content)
            file.write(b"\0" * (-len(content) % BLOCK))
        file.write(_END * 2)
        file.flush()
        os.fsync(file.fileno())
    return index


def index_tar(path: Path) -> Iterator[TarMember]:
    """Yield the members of a tar of ours; see `index_members`."""
    with open(path, "rb") as file:
        yield from index_members(file, path)


def index_members(file: BinaryIO, path: AnyPath) -> Iterator[TarMember]:
    """Yield the members of an open tar of ours, which is `path` to people, from its headers alone, skipping contents.

    Raises CorruptionError for anything but plain members, two zero blocks and the end of the file.
    """
    seen: set[str] = set()
    size = os.fstat(file.fileno()).st_size
    while (block := file.read(BLOCK)) != _END:
        name, length = parse_header(path, block, file.tell() - len(block))
        offset = file.tell()
        if name in seen:
            raise damaged_tar(path, offset - BLOCK, f"a second member named {name}")
        if offset + length + 2 * BLOCK > size:
            raise damaged_tar(path, offset, f"{name} reaches beyond the end of the file")
        seen.add(name)
        yield TarMember(name, offset, length)
        file.seek(length, os.SEEK_CUR)
        if file.read(-length % BLOCK).strip(b"\0"):
            raise damaged_tar(path, offset + length, "padding that is not zero")
    if file.read() != _END:
        raise damaged_tar(path, size, "not exactly two zero blocks at the end")


def parse_header(path: AnyPath, block: bytes, position: int) -> tuple[str, int]:
    """Give (name, length) of a plain member's header; `path` and `position` are for the message."""
    try:
        info = tarfile.TarInfo.frombuf(block, "ascii", "strict")
    except (tarfile.HeaderError, ValueError) as error:
        raise damaged_tar(path, position, f"no valid member header ({error})") from None
    if not _NAME.fullmatch(info.name) or len(info.name) > 100 or not 0 <= info.size <= MAX_MEMBER_BYTES:
        raise damaged_tar(path, position, f"a member that no shard has: {info.name[:100]!r}, {info.size:,} bytes")
    if block != _header(info.name, info.size):  # types, owners, dates, and the slack that readers allow
        raise damaged_tar(path, position, f"the header of {info.name} is not as capfilt writes it")
    return info.name, info.size


def read_member(file: BinaryIO, path: AnyPath, name: str, offset: int, length: int) -> bytes:
    """Read one member whose place is known, after checking that its header says the same."""
    file.seek(offset - BLOCK)
    found = parse_header(path, file.read(BLOCK), offset - BLOCK)
    if found != (name, length):
        raise damaged_tar(path, offset - BLOCK, f"{found[0]}, {found[1]} bytes; {name}, {length} bytes expected")
    content = file.read(length)
    if len(content) != length:
        raise damaged_tar(path, offset, f"{name} is cut after {len(content)} of {length} bytes")
    return content


def damaged_tar(path: AnyPath, position: int, what: str) -> CorruptionError:
    """The error for a shard's tar that is not what was committed."""
    return CorruptionError(
        f"{path} is damaged at byte {position:,}: {what}. Restore {path.name} and {path.stem}.parquet from a "
        f"copy, or remove {path.stem}.parquet and download or import again."
    )


def _header(name: str, length: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = length
    return info.tobuf(tarfile.USTAR_FORMAT, "ascii", "strict")
