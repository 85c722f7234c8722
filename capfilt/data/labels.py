"""Files that say which texts are true of their image: labels of a run's pairs, and labelled pairs of any images.

In: a Parquet, CSV, TSV or JSONL file. Out: its rows, checked; a row that says nothing usable is a UsageError that names
its place in the file. A label is 0 or 1 (true, false).
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from capfilt.data.bounded_parquet import BoundedParquet
from capfilt.data.texts import clean_for_terminal, first_line
from capfilt.errors import UsageError

ENDINGS = (".parquet", ".csv", ".tsv", ".jsonl")

_BATCH_ROWS = 1 << 16
_TRUE, _FALSE = ("1", "1.0", "true"), ("0", "0.0", "false")


@dataclass(frozen=True, slots=True)
class PairLabel:
    """A label of a pair of a run, named by its caption's index or by its text."""

    key: str
    caption_index: int | None
    text: str | None
    """With an index too, the text that the caption must have."""
    is_true: bool
    where: str
    """The row's place in its file, for messages."""


@dataclass(frozen=True, slots=True)
class LabelledText:
    """A text of an image, labelled."""

    image: str | None
    """Path of a file below the folder of images; None where the image is a run's."""
    key: str | None
    """Key of a run's image; None where the image is a file."""
    text: str
    is_true: bool
    source: str | None
    """What the text comes from (web, synthetic, …), where the file says so."""
    where: str


def read_pair_labels(path: Path) -> list[PairLabel]:
    """Columns `key`, `label`, and `caption_index` or `text` or both. Raises UsageError."""
    labels = []
    for where, row in _rows(path, needed=("key", "label"), one_of=("caption_index", "text")):
        index, text = _index(where, row.get("caption_index")), _optional_text(where, row, "text")
        if index is None and text is None:
            raise UsageError(f"{where} has neither a caption_index nor a text. Give one of them.")
        labels.append(PairLabel(_text(where, row, "key"), index, text, _label(where, row), where))
    return labels


def read_labelled_texts(path: Path) -> list[LabelledText]:
    """Columns `image` or `key`, `text`, `label`, and `source` where it is known. Raises UsageError."""
    found = []
    for where, row in _rows(path, needed=("text", "label"), one_of=("image", "key")):
        image, key = _optional_text(where, row, "image"), _optional_text(where, row, "key")
        if (image is None) == (key is None):
            raise UsageError(f"{where} has {'neither' if image is None else 'both'} image and key. Give one of them.")
        source = _optional_text(where, row, "source")
        found.append(LabelledText(image, key, _text(where, row, "text"), _label(where, row), source, where))
    return found


# --- rows ---------------------------------------------------------------------------------------------------


def _rows(path: Path, needed: tuple[str, ...], one_of: tuple[str, ...]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every row with its place; UsageError for a file of another kind, without rows, or without the columns."""
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise UsageError(f"{path} ends in {path.suffix!r}; expected one of {', '.join(ENDINGS)}.")
    number = 0
    try:
        for number, row in enumerate(reader(path), 1):
            where = f"{path}, row {number}"
            if not isinstance(row, Mapping):
                raise UsageError(f"{where} is no object; expected one with {', '.join(needed)}.")
            if not all(name in row for name in needed) or not any(name in row for name in one_of):
                raise UsageError(
                    f"{where} has the columns {clean_for_terminal(', '.join(map(str, row)) or 'none')}; expected "
                    f"{', '.join(needed)} and {' or '.join(one_of)}."
                )
            yield where, row
    except (pa.ArrowException, csv.Error, ValueError, RecursionError) as error:
        raise UsageError(
            f"{path} cannot be read after row {number} ({first_line(error)}). Give a {path.suffix} file in UTF-8."
        ) from None
    if not number:
        raise UsageError(f"{path} has no rows; expected {', '.join(needed)} and {' or '.join(one_of)}.")


def _parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    with BoundedParquet(path) as file:
        wanted = {"key", "label", "caption_index", "text", "image", "source"}
        for batch in file.batches(_BATCH_ROWS, [name for name in file.schema.names if name in wanted]):
            yield from batch.to_pylist()


def _delimited_rows(delimiter: str) -> Callable[[Path], Iterator[dict[str, Any]]]:
    def read(path: Path) -> Iterator[dict[str, Any]]:
        with open(path, encoding="utf-8-sig", newline="") as file:
            yield from csv.DictReader(file, delimiter=delimiter, strict=True)

    return read


def _json_rows(path: Path) -> Iterator[Any]:
    with open(path, encoding="utf-8-sig") as file:
        for line in file:
            if line.strip():
                yield json.loads(line)


_READERS: dict[str, Callable[[Path], Iterator[Any]]] = dict(
    zip(ENDINGS, (_parquet_rows, _delimited_rows(","), _delimited_rows("\t"), _json_rows), strict=True)
)


# --- values -------------------------------------------------------------------------------------------------


def _label(where: str, row: Mapping[str, Any]) -> bool:
    said = str(row["label"]).strip().lower()
    if said not in (*_TRUE, *_FALSE):
        raise UsageError(f"{where} has the label {clean_for_terminal(said)!r}; expected 0 or 1.")
    return said in _TRUE


def _index(where: str, value: Any) -> int | None:
    if value is None or value == "":
        return None
    try:
        number = int(value)
        if not isinstance(value, bool) and (isinstance(value, str) or number == value):
            return number
    except (TypeError, ValueError, OverflowError):
        pass
    raise UsageError(f"{where} has the caption_index {clean_for_terminal(str(value))!r}; expected a whole number.")


def _text(where: str, row: Mapping[str, Any], name: str) -> str:
    value = row[name]
    if not isinstance(value, str):
        raise UsageError(f"{where} has the {name} {clean_for_terminal(str(value))!r}; expected a text.")
    return value


def _optional_text(where: str, row: Mapping[str, Any], name: str) -> str | None:
    return None if row.get(name) in (None, "") else _text(where, row, name)
