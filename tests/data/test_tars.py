"""Our tars: what is written reads back anywhere; what is not exactly that is refused."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capfilt.data.tars import BLOCK, index_tar, is_valid_key, write_tar
from capfilt.errors import CorruptionError

KEYS = st.from_regex(r"(?:[A-Za-z0-9_+=,-]{1,8}/)?[A-Za-z0-9_+=@,~-]{1,20}", fullmatch=True)
MEMBERS = st.dictionaries(
    st.tuples(KEYS, st.sampled_from(["jpg", "png", "webp", "txt", "json"])).map(".".join),
    st.binary(max_size=1500),
    max_size=8,
)


@settings(max_examples=25, deadline=None)
@given(MEMBERS)
def test_round_trip_through_our_index_and_the_standard_reader(
    tmp_path_factory: pytest.TempPathFactory, members
) -> None:
    folder = tmp_path_factory.mktemp("tar")
    index = write_tar(folder / "a.tar", members.items())
    data = (folder / "a.tar").read_bytes()
    assert list(index_tar(folder / "a.tar")) == index
    assert {m.name: data[m.offset : m.offset + m.length] for m in index} == members
    with tarfile.open(folder / "a.tar") as standard:
        assert {m.name: standard.extractfile(m).read() for m in standard} == members  # type: ignore[union-attr]
        assert all((m.mtime, m.uid, m.gid, m.uname, m.mode) == (0, 0, 0, "", 0o644) for m in standard)
    assert write_tar(folder / "b.tar", members.items()) == index
    assert (folder / "b.tar").read_bytes() == data


@pytest.fixture
def good(tmp_path: Path) -> Path:
    path = tmp_path / "good.tar"
    write_tar(path, [(f"{n:03d}.{ext}", bytes([n]) * 700) for n in range(4) for ext in ("jpg", "txt")])
    return path


def test_every_cut_at_a_block_is_detected(good: Path) -> None:
    data = good.read_bytes()
    for end in range(0, len(data), BLOCK):
        good.write_bytes(data[:end])
        with pytest.raises(CorruptionError):
            list(index_tar(good))


def test_every_flipped_header_byte_is_detected(good: Path) -> None:
    members = list(index_tar(good))[:3]
    with open(good, "r+b", buffering=0) as file:
        for number, member in enumerate(members):
            for position in range(number, BLOCK, 3):
                place = member.offset - BLOCK + position
                byte = os.pread(file.fileno(), 1, place)
                os.pwrite(file.fileno(), bytes([byte[0] ^ 0x10]), place)
                with pytest.raises(CorruptionError):
                    list(index_tar(good))
                os.pwrite(file.fileno(), byte, place)


def test_bytes_behind_the_end_and_dirty_padding_are_detected(good: Path) -> None:
    data = good.read_bytes()
    good.write_bytes(data + bytes(BLOCK))
    with pytest.raises(CorruptionError, match="two zero blocks"):
        list(index_tar(good))
    good.write_bytes(data)
    first = next(index_tar(good))
    dirty = bytearray(data)
    dirty[first.offset + first.length + 3] = 1
    good.write_bytes(dirty)
    with pytest.raises(CorruptionError, match="padding"):
        list(index_tar(good))


def hostile(
    name: str = "a.jpg",
    kind: bytes = tarfile.REGTYPE,
    kind_of_tar: int = tarfile.GNU_FORMAT,
    **fields: object,
) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=kind_of_tar) as tar:
        info = tarfile.TarInfo(name)
        info.type, info.size = kind, 3 if kind == tarfile.REGTYPE else 0
        for field, value in fields.items():
            setattr(info, field, value)
        tar.addfile(info, io.BytesIO(b"x" * info.size))
    return buffer.getvalue()


HOSTILE = {
    "parent": hostile("../a.jpg"),
    "absolute": hostile("/a.jpg"),
    "hidden": hostile(".a.jpg"),
    "no ending": hostile("a"),
    "escape in the name": hostile("a\x1b[31m.jpg"),
    "not ASCII": hostile("ä.jpg"),
    "long name": hostile("a" * 150 + ".jpg"),
    "link": hostile(kind=tarfile.SYMTYPE, linkname="/etc/passwd"),
    "hard link": hostile(kind=tarfile.LNKTYPE, linkname="b.jpg"),
    "device": hostile(kind=tarfile.CHRTYPE),
    "pipe": hostile(kind=tarfile.FIFOTYPE),
    "folder": hostile("a", kind=tarfile.DIRTYPE),
    "records of padding": hostile(),
    "PAX": hostile(kind_of_tar=tarfile.PAX_FORMAT, mtime=1.5),
    "gzip": b"\x1f\x8b" + bytes(1022),
    "empty": b"",
    "zeros": bytes(3 * BLOCK),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_tar_that_is_not_ours_is_refused(tmp_path: Path, case: str) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(HOSTILE[case])
    with pytest.raises(CorruptionError, match=r"a\.tar is damaged"):
        list(index_tar(path))


@pytest.mark.parametrize("key", ["a", "000000001", "n01/x_2", "a.b/c", "A-b_c=+@,~d"])
def test_valid_keys(key: str) -> None:
    assert is_valid_key(key)


@pytest.mark.parametrize("key", ["", "a.b", "/a", "a//b", "../a", "./a", "a/", "a b", "ä", "a\n", "a\x1b", "x" * 91])
def test_invalid_keys(key: str) -> None:
    assert not is_valid_key(key)


def test_a_member_twice_or_too_large_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not twice"):
        write_tar(tmp_path / "a.tar", [("a.jpg", b""), ("a.jpg", b"")])
    with pytest.raises(ValueError, match="at most"):
        write_tar(tmp_path / "b.tar", [("a.jpg", bytes(33 << 20))])
