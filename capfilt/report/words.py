"""Words of many captions at once: how many each caption has, and how many captions have each word.

In: Arrow columns of texts. Out: numpy counts, or a table of words. A word is a run of letters with their marks (Hindi's
vowels, accents), digits and apostrophes in lower case. Texts in ASCII, nearly all, are taken byte by byte by a table;
the others by a regular expression.
"""

from __future__ import annotations

from unicodedata import category

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

_SPACE = ord(" ")
_TABLE = bytes(
    ord(char.lower()) if (char := chr(byte)).isalnum() or char == "'" or byte > 127 else _SPACE for byte in range(256)
)
"""Byte of ASCII → the byte that stands for it in a plain text; other bytes stay, and with them the UTF-8."""

_SEPARATORS = r"^\p{M}[^\p{L}\p{N}']*|[^\p{L}\p{M}\p{N}'][^\p{L}\p{N}']*"
"""A mark belongs to the letter before it; that of a symbol is part of no word."""
_MANY_TEXTS = 1_000
"""From which on Arrow's expression is worth the milliseconds that it takes to be made ready."""
_MOST_LOOSE_ROWS = 500_000


def plain_texts(texts: pa.ChunkedArray | pa.Array) -> pa.StringArray:
    """The texts in lower case, with a space for whatever is part of no word; nulls become empty texts."""
    array = texts.combine_chunks() if isinstance(texts, pa.ChunkedArray) else texts
    array = pc.fill_null(array, "") if array.null_count else array
    offsets, data = _buffers(array)
    translated = pa.py_buffer(data.tobytes().translate(_TABLE))
    plain = pa.StringArray.from_buffers(len(array), pa.py_buffer(offsets - offsets[0]), translated)
    is_foreign = pc.invert(pc.string_is_ascii(array))
    if not pc.any(is_foreign).as_py():
        return plain
    foreign = pc.replace_substring(pc.utf8_lower(array.filter(is_foreign)), "\u2019", "'")
    if len(foreign) < _MANY_TEXTS:
        words = pa.array(map(_words_of, foreign.to_pylist()), pa.string())
    else:
        words = pc.replace_substring_regex(foreign, _SEPARATORS, " ")
    return pc.replace_with_mask(plain, is_foreign, words)


def _words_of(text: str) -> str:
    """As _SEPARATORS makes it."""
    chars, is_word = [], False
    for char in text:
        is_word = char.isalnum() or char == "'" or (is_word and category(char)[0] == "M")
        chars.append(char if is_word else " ")
    return "".join(chars)


def count_words(plain: pa.StringArray) -> np.ndarray:
    """Words of each plain text, (N,) int64."""
    offsets, data = _buffers(plain)
    starts = offsets - offsets[0]
    is_word = data != _SPACE
    begins = is_word.copy()
    begins[1:] &= ~is_word[:-1]
    has_any = starts[1:] > starts[:-1]
    first = starts[:-1][has_any]
    begins[first] = is_word[first]  # a text begins a word of its own
    counts = np.zeros(len(plain), np.int64)
    counts[has_any] = np.add.reduceat(begins, first, dtype=np.int64) if len(first) else 0
    return counts


def distinct(values: np.ndarray) -> np.ndarray:
    """Each of (N,) whole numbers once, in order. By sorting: several times as fast as numpy's own, which hashes."""
    ordered = np.sort(values)
    return ordered[np.flatnonzero(np.diff(ordered, prepend=ordered[:1] - 1))]


class WordCounts:
    """Word → captions that have it, summed up while captions come in; memory grows with the vocabulary alone."""

    def __init__(self) -> None:
        self._tables: list[pa.Table] = []

    def add(self, plain: pa.StringArray) -> None:
        """Count the words of plain texts, each once for a text."""
        lists = pc.ascii_split_whitespace(plain)
        encoded = lists.flatten().dictionary_encode()
        words, codes = encoded.dictionary, encoded.indices.to_numpy(zero_copy_only=False)
        texts = pc.list_parent_indices(lists).to_numpy(zero_copy_only=False)
        once = distinct(texts.astype(np.int64) * max(len(words), 1) + codes)
        counts = np.bincount(once % max(len(words), 1), minlength=len(words))
        table = pa.table({"word": words, "captions": counts})
        self._take(table.filter(pc.not_equal(table["word"], "")))

    def merge(self, other: WordCounts) -> None:
        """Add what another one has counted."""
        for table in other._tables:
            self._take(table)

    def num_words(self) -> int:
        """Different words."""
        self._condense()
        return self._tables[0].num_rows if self._tables else 0

    def top(self, num: int) -> dict[str, int]:
        """The most frequent words, then by the alphabet."""
        self._condense()
        if not self._tables:
            return {}
        order = [("captions", "descending"), ("word", "ascending")]
        best = self._tables[0].take(pc.select_k_unstable(self._tables[0], num, order))
        return dict(zip(best["word"].to_pylist(), best["captions"].to_pylist(), strict=True))

    def _take(self, table: pa.Table) -> None:
        self._tables.append(table)
        if len(self._tables) > 1 and sum(one.num_rows for one in self._tables[1:]) > _MOST_LOOSE_ROWS:
            self._condense()

    def _condense(self) -> None:
        if len(self._tables) > 1:
            summed = pa.concat_tables(self._tables).group_by("word").aggregate([("captions", "sum")])
            self._tables = [summed.rename_columns(["word", "captions"])]


def _buffers(array: pa.StringArray) -> tuple[np.ndarray, np.ndarray]:
    """(offsets (N + 1,), bytes from the first text's on) of an array without nulls."""
    _, offset_buffer, data_buffer = array.buffers()
    if offset_buffer is None or not len(array):
        return np.zeros(len(array) + 1, np.int32), np.zeros(0, np.uint8)
    offsets = np.frombuffer(offset_buffer, np.int32)[array.offset : array.offset + len(array) + 1]
    data = np.frombuffer(data_buffer, np.uint8) if data_buffer is not None else np.zeros(0, np.uint8)
    return offsets, data[offsets[0] : offsets[-1]]
