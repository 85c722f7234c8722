"""Large JSON files, read entry by entry: the same entries as `json.loads` gives, in little memory."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capfilt.data import json_lists
from capfilt.data.json_lists import as_id, read_entries
from capfilt.errors import UsageError

_text = st.text(st.characters(exclude_categories=["Cs"]))
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | _text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("xyz", max_size=3), inner, max_size=3),
    max_leaves=8,
)


@pytest.fixture(scope="module", autouse=True)
def _few_characters_at_once() -> Iterator[None]:
    """Pieces so small that every kind of value is cut somewhere."""
    usual, json_lists._PIECE_CHARS = json_lists._PIECE_CHARS, 3
    yield
    json_lists._PIECE_CHARS = usual


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("json") / "file.json"


@given(
    document=st.dictionaries(st.sampled_from("abcd"), st.lists(values, max_size=4) | values),
    indent=st.sampled_from([None, 0, 2]),
    is_ascii=st.booleans(),
)
def test_members_are_those_of_json(path: Path, document: dict[str, Any], indent: int | None, is_ascii: bool) -> None:
    path.write_text(json.dumps(document, indent=indent, ensure_ascii=is_ascii), encoding="utf-8")
    expected = []
    for name, value in document.items():
        if name in ("a", "b"):
            entries = enumerate(value) if isinstance(value, list) else [(-1, value)]
            expected += [(name, index, item) for index, item in entries]
    assert [(e.list_name, e.index, e.value) for e in read_entries(path, {"a", "b"})] == expected


@given(items=st.lists(values, max_size=6))
def test_an_outermost_list(path: Path, items: list[Any]) -> None:
    path.write_text(json.dumps(items), encoding="utf-8")
    assert [e.value for e in read_entries(path, {""})] == items


@given(text=st.text('[]{}":,0 1etn\\a-', max_size=12))
def test_what_json_refuses_is_refused(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    try:
        expected = json.loads(text)
    except ValueError:
        expected = None
    if isinstance(expected, list):
        assert [e.value for e in read_entries(path, {""})] == expected
    else:
        with pytest.raises(UsageError, match=r"file\.json"):
            list(read_entries(path, {""}))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'[1,\n2,\n"\xff"]', "line 2: it is not UTF-8|not UTF-8"),
        (b"[1,\n2,\nx]", "line 3: Expecting value"),
        (b"[1, 2", "the file ends too early"),
        (b"[1, 2]\n]", "line 2: something follows the end"),
        (b"", "begins with ''; expected JSON: a list"),
        (b'{"a": 1}', "expected JSON: a list"),
        (b"[" * 200_000, "nested too deeply|ends too early"),
        (b"[" + b"1" * 10_000 + b"]", "too many digits"),
    ],
)
def test_messages(path: Path, content: bytes, said: str) -> None:
    path.write_bytes(content)
    with pytest.raises(UsageError, match=said):
        list(read_entries(path, {""}))


def test_an_entry_without_end_is_given_up(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_lists, "MAX_ENTRY_CHARS", 1000)
    path.write_text('["' + "x" * 100_000, encoding="utf-8")
    with pytest.raises(UsageError, match="no value ends within 1,000 characters"):
        list(read_entries(path, {""}))


def test_memory_does_not_grow_with_the_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_lists, "_PIECE_CHARS", 1 << 16)
    path.write_text(json.dumps({"skipped": ["y" * 100] * 40_000, "a": [{"caption": "x" * 100}] * 40_000}))
    tracemalloc.start()
    num = sum(1 for _ in read_entries(path, {"a"}))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert num == 40_000
    assert path.stat().st_size > 8_000_000
    assert peak < 1_500_000


def test_fields_say_what_they_are(path: Path) -> None:
    path.write_text('{"a": [{"id": true, "t": 5, "s": "\\ud800", "l": {}}, 7]}', encoding="utf-8")
    first, second = read_entries(path, {"a"})
    for call, said in (
        (lambda: first.id("id"), r"a\[0\] has 'id' True; expected a whole number or a text"),
        (lambda: first.text("t"), r"a\[0\] has 't' 5; expected a text"),
        (lambda: first.text("s"), "half surrogate"),
        (lambda: first.list("l"), "expected a list"),
        (lambda: first.text("caption"), r"a\[0\] has no 'caption'; it has 'id', 't', 's', 'l'"),
        (lambda: second.text("caption"), r"a\[1\] is 7; expected an object with 'caption'"),
    ):
        with pytest.raises(UsageError, match=said):
            call()


def test_ids() -> None:
    assert [as_id(value) for value in (7, "7", "007", "0", "a.jpg", "٣")] == [7, 7, "007", 0, "a.jpg", "٣"]
    assert [as_id(value) for value in (None, True, 1.5, "", [])] == [None] * 5
