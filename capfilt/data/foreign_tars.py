"""Strict, streaming reading of tars that others wrote: img2dataset, webdataset, GNU tar, Python's tarfile.

In: a binary stream. Out: plain members with their content, problems (a link, a device, a name that leaves the
folder, a member too large …), and at the end exactly one of: nothing, where the tar is whole, or a problem
`damaged_tar`, where it stops being one. Nothing is extracted, nothing is skipped in silence but folders. A
cut, a broken header and data behind the end are damage: the standard reader takes all three as the end.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from capfilt.data.tars import BLOCK, MAX_MEMBER_BYTES
from capfilt.data.texts import clean_for_terminal

MAX_HEADER_BYTES = 64 * 1024
"""Longest PAX or GNU long-name header that is read."""

_ZEROS = b"\0" * BLOCK
_PIECE = 1 << 20
_GZIP, _XZ, _ZSTD, _BZIP2 = b"\x1f\x8b", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd", b"BZh"
_COMPRESSED = (_GZIP, _XZ, _ZSTD, _BZIP2)
_WITHOUT_CONTENT = (tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE)
_PAX_RECORD = re.compile(rb"(\d{1,6}) ([^=\n]{1,100})=")


class Readable(Protocol):
    """A binary file, or what reads like one."""

    def read(self, size: int = -1, /) -> bytes:
        """Up to `size` bytes; none at the end."""
        ...


@dataclass(frozen=True, slots=True)
class ForeignMember:
    """One member of a foreign tar."""

    name: str
    """Path within the tar, cleaned of a leading `./`; empty when it cannot be read."""
    content: bytes
    """The file; empty with a problem."""
    reason: str | None = None
    """None, or the reason code of why it cannot be used: bad_member, member_too_large, damaged_tar."""
    detail: str = ""
    """What was found."""


class _Damage(Exception):  # noqa: N818 - ends the reading, never leaves this file
    pass


def read_foreign_tar(stream: Readable) -> Iterator[ForeignMember]:
    """Yield every member of the tar in `stream` in order; memory holds one member of at most 32 MB.

    Never raises for what the tar contains; OSError of the stream passes.
    """
    reader = _Reader(stream)
    try:
        yield from reader.members()
    except _Damage as damage:
        where = f"at byte {reader.position:,}: {damage}"
        yield ForeignMember("", b"", "damaged_tar", where)


class _Reader:
    def __init__(self, stream: Readable) -> None:
        self._stream = stream
        self.position = 0

    def members(self) -> Iterator[ForeignMember]:
        overrides: dict[str, str] = {}
        while True:
            header = self._read(BLOCK)
            if header == _ZEROS:
                self._expect_end()
                return
            if self.position == BLOCK and header.startswith(_COMPRESSED):
                raise _Damage("it is compressed; expand it first (gunzip, unxz, unzstd) and import the plain tar")
            info = self._parse(header)
            if info.type in (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE):
                records = _parse_pax(self._read_header_content(info))
                # A global header carries a comment at most; a path for all members makes no sense.
                overrides |= records if info.type != tarfile.XGLTYPE else {}
            elif info.type == tarfile.GNUTYPE_LONGNAME:
                overrides["path"] = _decode(self._read_header_content(info).split(b"\0")[0])
            elif info.type == tarfile.GNUTYPE_LONGLINK:
                self._read_header_content(info)
            else:
                member = self._member(info, overrides)
                overrides = {}
                if member is not None:
                    yield member

    def _member(self, info: tarfile.TarInfo, overrides: dict[str, str]) -> ForeignMember | None:
        """Read or skip one member; None for a folder."""
        name = overrides.get("path", info.name)
        size = info.size
        if "size" in overrides:
            if not overrides["size"].isascii() or not overrides["size"].isdigit():
                raise _Damage("a PAX size that is not a number")
            size = int(overrides["size"])
        if info.type == tarfile.DIRTYPE or (info.type == tarfile.AREGTYPE and name.endswith("/")):
            self._skip(size if info.type != tarfile.DIRTYPE else 0)
            return None
        is_file = info.type in (tarfile.REGTYPE, tarfile.AREGTYPE)
        is_sparse = any(key.startswith("GNU.sparse") for key in overrides)
        problem = _name_problem(name)
        if not is_file or is_sparse:
            problem = f"a link, device, sparse or other special member (type {info.type!r})"
        clean_name = "" if _name_problem(name) else name.removeprefix("./")
        if info.type in _WITHOUT_CONTENT:
            size = 0
        if problem or size > MAX_MEMBER_BYTES:
            self._skip(size)
            reason = "bad_member" if problem else "member_too_large"
            detail = f"{clean_for_terminal(name, 80)}: {problem or f'{size:,} bytes'}"
            return ForeignMember(clean_name, b"", reason, detail)
        content = self._read(size)
        self._read(-size % BLOCK)
        return ForeignMember(clean_name, content)

    def _parse(self, header: bytes) -> tarfile.TarInfo:
        try:
            info = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
        except (tarfile.HeaderError, ValueError) as error:
            raise _Damage(f"no valid member header ({error})") from None
        if info.size < 0:
            raise _Damage(f"a member of {info.size} bytes")
        return info

    def _read_header_content(self, info: tarfile.TarInfo) -> bytes:
        if info.size > MAX_HEADER_BYTES:
            raise _Damage(f"an extended header of {info.size:,} bytes; at most {MAX_HEADER_BYTES:,} are read")
        content = self._read(info.size)
        self._read(-info.size % BLOCK)
        return content

    def _read(self, size: int) -> bytes:
        pieces = []
        while size:
            piece = self._stream.read(min(size, _PIECE))
            if not piece:
                raise _Damage("the file ends within a member or without the end mark of a tar")
            self.position += len(piece)
            size -= len(piece)
            pieces.append(piece)
        return b"".join(pieces)

    def _skip(self, size: int) -> None:
        left = size + -size % BLOCK
        while left:
            left -= len(self._read(min(left, _PIECE)))

    def _expect_end(self) -> None:
        """Behind the first zero block only zeros may stand: one block more, or a whole record of padding."""
        while piece := self._stream.read(_PIECE):
            if piece.strip(b"\0"):
                raise _Damage("data behind the end mark: a damaged header, or two tars in one file")
            self.position += len(piece)


def _parse_pax(content: bytes) -> dict[str, str]:
    """Parse PAX records `LENGTH KEY=VALUE\\n`; only what places a member is kept."""
    records: dict[str, str] = {}
    position = 0
    while position < len(content) and content[position] != 0:
        match = _PAX_RECORD.match(content, position)
        end = position + int(match[1]) if match else 0
        if match is None or not match.end() < end <= len(content) or content[end - 1 : end] != b"\n":
            raise _Damage("a PAX header that is not a list of records")
        key = _decode(match[2])
        if key in ("path", "size") or key.startswith("GNU.sparse"):
            records[key] = _decode(content[match.end() : end - 1])
        position = end
    return records


def _decode(text: bytes) -> str:
    return text.decode("utf-8", "surrogateescape")


def _name_problem(name: str) -> str | None:
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return "a name that is not UTF-8"
    parts = name.removeprefix("./").split("/")
    if not name or name.startswith("/") or ".." in parts or "" in parts:
        return "a name that is absolute, empty or leaves the folder"
    if any(ord(char) < 32 or ord(char) == 127 for char in name):
        return "a name with control characters"
    return None
