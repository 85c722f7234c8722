"""Tars of others: what is plain comes out, what is not is named, and where a tar ends is never guessed."""

from __future__ import annotations

import io
import tarfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capfilt.data.foreign_tars import ForeignMember, read_foreign_tar
from tests.hostile_tars import BAD_MEMBERS, DAMAGED, END, GOOD, WHOLE, info, packed

NAMES = st.from_regex(r"[a-zA-Z0-9_ äö]{1,60}(/[a-zA-Z0-9_ äö]{1,60}){0,2}\.[a-z]{2,4}", fullmatch=True)


def read(data: bytes) -> list[ForeignMember]:
    return list(read_foreign_tar(io.BytesIO(data)))


@settings(max_examples=40, deadline=None)
@given(
    st.dictionaries(NAMES, st.binary(max_size=1200), max_size=5),
    st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
)
def test_all_that_python_writes_is_read(files: dict[str, bytes], kind: int) -> None:
    if kind == tarfile.USTAR_FORMAT:
        files = {name: content for name, content in files.items() if len(name.encode()) <= 100}
    data = packed(*[(info(name, len(content), mtime=1.5), content) for name, content in files.items()], kind=kind)
    assert [(m.name, m.content, m.reason) for m in read(data)] == [(n, c, None) for n, c in files.items()]


@pytest.mark.parametrize("case", BAD_MEMBERS)
def test_a_member_that_is_not_a_plain_file_is_named_and_the_rest_read(case: str) -> None:
    kind = tarfile.PAX_FORMAT if "PAX" in case else tarfile.GNU_FORMAT
    members = read(packed(BAD_MEMBERS[case], GOOD, kind=kind))
    assert [member.reason for member in members] == ["bad_member", None]
    assert members[1] == ForeignMember("good.jpg", b"abc")
    assert members[0].content == b""
    assert "\x1b" not in members[0].detail
    assert "\n" not in members[0].detail


def test_folders_are_passed_over_and_a_leading_dot_slash_is_dropped() -> None:
    data = packed((info("./a", 0, tarfile.DIRTYPE), b""), (info("./a/b.jpg", 2), b"xy"))
    assert read(data) == [ForeignMember("a/b.jpg", b"xy")]


def test_a_member_too_large_is_skipped() -> None:
    size = (32 << 20) + 1
    members = read(packed((info("a.jpg", size), bytes(size)), GOOD))
    assert [(m.reason, m.name) for m in members] == [("member_too_large", "a.jpg"), (None, "good.jpg")]


@pytest.mark.parametrize("case", DAMAGED)
def test_damage_ends_the_tar_and_is_said(case: str) -> None:
    members = read(DAMAGED[case])
    assert members[-1].reason == "damaged_tar"
    assert members[-1].detail.startswith("at byte ")
    assert not any(member.reason for member in members[:-1])


def test_every_cut_is_damage_and_what_stands_before_it_is_read() -> None:
    for end in range(0, END + 1, 64):
        members = read(WHOLE[:end])
        assert members[-1].reason == "damaged_tar", end
        assert len(members) - 1 == (end >= 512 * 3) + (end >= END)


def test_every_flip_in_a_header_is_damage_or_changes_nothing_that_counts() -> None:
    for start in (0, 512 * 3):
        for position in range(512):
            flipped = bytearray(WHOLE)
            flipped[start + position] ^= 0x04
            members = read(bytes(flipped))
            assert members[-1].reason == "damaged_tar" or members == read(WHOLE)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, len(WHOLE) - 1), st.integers(0, 255)), max_size=8),
    st.binary(max_size=600),
)
def test_nothing_is_ever_raised(changes: list[tuple[int, int]], tail: bytes) -> None:
    mutated = bytearray(WHOLE)
    for position, value in changes:
        mutated[position] = value
    for member in read(bytes(mutated) + tail):
        assert member.reason in (None, "bad_member", "member_too_large", "damaged_tar")
