"""The lists of a large JSON file, entry by entry: what annotation files of millions of entries are read with.

In: a file whose outermost value is a list, or an object that holds lists. Out: their entries in order, with typed
access whose errors name file, entry and what was expected. Only one entry and a piece of the file are in memory.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from capfilt.errors import UsageError

MAX_ENTRY_CHARS = 16 << 20
"""Longest entry, and longest value beside the lists, that is read."""

_PIECE_CHARS = 1 << 20
_SPACE = " \t\n\r"
_MAX_ID_DIGITS = 18
_UNDECIDED_CHARS = 4
"""A number that is followed by fewer characters, such as `1` by `e+`, may go on in what was not read yet."""

Id = int | str
"""Of an image or question; text that is a plain whole number is that number, as files differ in it."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry of a list, or (index -1) a value that stands beside the lists."""

    path: Path
    list_name: str
    index: int
    value: Any

    @property
    def where(self) -> str:
        """File and place, for messages: `captions.json, annotations[12]`."""
        return f"{self.path}, {self.list_name if self.index < 0 else f'{self.list_name}[{self.index}]'}"

    def get(self, name: str) -> Any:
        """The field `name`; UsageError where the entry is no object or does not have it."""
        if not isinstance(self.value, dict):
            raise UsageError(f"{self.where} is {_shown(self.value)}; expected an object with {name!r}.")
        if name not in self.value:
            raise UsageError(f"{self.where} has no {name!r}; it has {', '.join(map(repr, list(self.value)[:8]))}.")
        return self.value[name]

    def text(self, name: str) -> str:
        """The field `name`, which must be text that can be encoded."""
        return self.checked_text(name, self.get(name))

    def optional_text(self, name: str) -> str | None:
        """As `text`; None where the field is not there or null."""
        found = self.value.get(name) if isinstance(self.value, dict) else None
        return None if found is None else self.checked_text(name, found)

    def id(self, name: str) -> Id:
        """The field `name`, which must be a whole number or text that is not empty."""
        found = as_id(self.get(name))
        if found is None:
            raise self.unexpected(name, self.get(name), "a whole number or a text")
        return found

    def list(self, name: str) -> list[Any]:
        """The field `name`, which must be a list."""
        found = self.get(name)
        if not isinstance(found, list):
            raise self.unexpected(name, found, "a list")
        return found

    def part(self, name: str, index: int, value: Any) -> Entry:
        """An entry of one of this entry's own lists."""
        return Entry(self.path, f"{self.list_name}[{self.index}].{name}", index, value)

    def checked_text(self, name: str, value: Any) -> str:
        """`value` where it is text that can be encoded; half a surrogate pair cannot."""
        if not isinstance(value, str):
            raise self.unexpected(name, value, "a text")
        if not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError:
                raise self.unexpected(name, value, "text without half surrogate pairs") from None
        return value

    def unexpected(self, name: str, value: Any, expected: str) -> UsageError:
        """The error for a field that is something else."""
        return UsageError(f"{self.where} has {name!r} {_shown(value)}; expected {expected}.")


def as_id(value: Any) -> Id | None:
    """The id that a JSON value means; None where it means none."""
    if isinstance(value, bool) or not isinstance(value, int | str) or value == "":
        return None
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) <= _MAX_ID_DIGITS:
        return int(value) if value[0] != "0" or value == "0" else value
    return value


def parse_value(text: str, where: str) -> Any:
    """The value of a JSON text, such as a line. UsageError, which begins with `where`, for anything else."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where} is not JSON ({getattr(error, 'msg', error)}): {_shown(text.strip())}.") from None


def read_entries(path: Path, wanted: Collection[str]) -> Iterator[Entry]:
    """The entries of the lists named `wanted`, in the order of the file; "" is an outermost list.

    A wanted value that is no list comes as it is, with the index -1; all others are passed over.

    Raises UsageError where the file is not JSON in UTF-8, or its outermost value is not what is wanted.
    """
    with open(path, encoding="utf-8-sig", newline="") as file:
        scanner = _Scanner(file, path)
        opening = scanner.peek()
        if opening == "[" and "" in wanted:
            yield from _elements(scanner, "", wanted)
        elif opening == "{" and set(wanted) - {""}:
            yield from _members(scanner, wanted)
        else:
            names = " and ".join(repr(name) for name in sorted(wanted) if name)
            expected = f"an object with {names}" if names else ""
            expected = " or ".join(filter(None, ["a list" if "" in wanted else "", expected]))
            raise UsageError(f"{path} begins with {opening!r}; expected JSON: {expected}.")
        if scanner.peek():
            raise scanner.damaged("something follows the end")


def _members(scanner: _Scanner, wanted: Collection[str]) -> Iterator[Entry]:
    scanner.take("{")
    while scanner.peek() != "}":
        name = scanner.value()
        if not isinstance(name, str):
            raise scanner.damaged(f"a field is named {_shown(name)}")
        scanner.take(":")
        if scanner.peek() == "[":
            yield from _elements(scanner, name, wanted)
        else:
            value = scanner.value()
            if name in wanted:
                yield Entry(scanner.path, name, -1, value)
        if not scanner.goes_on("}"):
            break
    scanner.take("}")


def _elements(scanner: _Scanner, name: str, wanted: Collection[str]) -> Iterator[Entry]:
    scanner.take("[")
    index = 0
    while scanner.peek() != "]":
        value = scanner.value()
        if name in wanted:
            yield Entry(scanner.path, name, index, value)
        index += 1
        if not scanner.goes_on("]"):
            break
    scanner.take("]")


class _Scanner:
    """A place in a JSON text of which only a piece is in memory."""

    def __init__(self, file: TextIO, path: Path) -> None:
        self.path = path
        self._file = file
        self._decoder = json.JSONDecoder()
        self._text, self._place, self._line = "", 0, 1
        self._ended = False

    def peek(self) -> str:
        """The next character that is no space, "" at the end of the file."""
        while True:
            while self._place < len(self._text):
                if self._text[self._place] not in _SPACE:
                    return self._text[self._place]
                self._place += 1
            if self._ended:
                return ""
            self._read_on()

    def take(self, expected: str) -> None:
        """Go past the character `expected`."""
        found = self.peek()
        if found != expected:
            raise self.damaged(f"{found!r} where {expected!r} is expected" if found else "the file ends too early")
        self._place += 1

    def goes_on(self, closing: str) -> bool:
        """Whether a comma and a further value follow; goes past the comma."""
        if self.peek() != ",":
            return False
        self.take(",")
        if self.peek() == closing:
            raise self.damaged(f"a comma before {closing!r}")
        return True

    def value(self) -> Any:
        """The value that begins here."""
        self.peek()
        while True:
            problem = "the file ends too early"
            try:
                value, end = self._decoder.raw_decode(self._text, self._place)
                if end + _UNDECIDED_CHARS <= len(self._text) or self._ended:
                    self._place = end
                    return value
            except (ValueError, RecursionError) as error:
                problem = getattr(error, "msg", None) or "values are nested too deeply or have too many digits"
            if self._ended:
                raise self.damaged(problem)
            if len(self._text) - self._place > MAX_ENTRY_CHARS:
                raise self.damaged(f"no value ends within {MAX_ENTRY_CHARS:,} characters ({problem})")
            self._read_on()

    def damaged(self, problem: str) -> UsageError:
        line = self._line + self._text.count("\n", 0, self._place)
        return UsageError(f"{self.path} cannot be read as JSON, line {line}: {problem}. Fetch or write it again.")

    def _read_on(self) -> None:
        self._line += self._text.count("\n", 0, self._place)
        rest = self._text[self._place :]
        self._text, self._place = rest, 0
        try:
            piece = self._file.read(max(_PIECE_CHARS, len(rest)))
        except UnicodeDecodeError as error:
            raise self.damaged(f"it is not UTF-8 ({error.reason})") from None
        self._text += piece
        self._ended = not piece


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:59]}…"
