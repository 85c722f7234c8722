"""Files of labels in every format, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from capfilt.data.labels import ENDINGS, read_labelled_texts, read_pair_labels
from capfilt.errors import UsageError

ROWS = [
    {"key": "00007", "caption_index": -1, "text": None, "label": 1},
    {"key": "00007", "caption_index": None, "text": 'a "red", round\nball', "label": 0},
    {"key": "é8", "caption_index": 2, "text": "two cats", "label": 1},
]


def write(path: Path, rows: list[dict]) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n\n" for row in rows), encoding="utf-8")
    else:
        import csv

        with open(path, "w", encoding="utf-8-sig", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="," if path.suffix == ".csv" else "\t")
            writer.writeheader()
            writer.writerows(rows)
    return path


@pytest.mark.parametrize("ending", ENDINGS)
def test_labels_are_the_same_in_every_format(ending: str, tmp_path: Path) -> None:
    found = read_pair_labels(write(tmp_path / f"labels{ending}", ROWS))
    assert [(one.key, one.caption_index, one.text, int(one.is_true)) for one in found] == [
        tuple(row.values()) for row in ROWS
    ]
    assert found[1].where.endswith(f"labels{ending}, row 2")


@pytest.mark.parametrize("ending", ENDINGS)
def test_labelled_texts_of_files_and_keys(ending: str, tmp_path: Path) -> None:
    rows = [
        {"image": "a/b.jpg", "key": None, "text": "a dog", "label": 1, "source": "web", "more": 5},
        {"image": None, "key": "00001", "text": "a cat", "label": 0, "source": None, "more": 6},
    ]
    found = read_labelled_texts(write(tmp_path / f"pairs{ending}", rows))
    assert [(one.image, one.key, one.text, one.is_true, one.source) for one in found] == [
        ("a/b.jpg", None, "a dog", True, "web"),
        (None, "00001", "a cat", False, None),
    ]


@pytest.mark.parametrize(
    ("label", "is_true"), [(True, True), (False, False), (1.0, True), ("TRUE", True), (" 0", False)]
)
def test_ways_to_write_a_label(label: object, is_true: bool, tmp_path: Path) -> None:
    path = write(tmp_path / "labels.jsonl", [{"key": "1", "caption_index": 0, "label": label}])
    assert read_pair_labels(path)[0].is_true is is_true


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"key": "1", "caption_index": 0, "label": 2}, "row 1 has the label '2'; expected 0 or 1"),
        ({"key": "1", "caption_index": 0, "label": None}, "row 1 has the label 'none'"),
        ({"key": "1", "caption_index": "first", "label": 1}, "caption_index 'first'; expected a whole number"),
        ({"key": "1", "caption_index": 0.7, "label": 1}, "caption_index '0.7'; expected a whole number"),
        ({"key": "1", "caption_index": True, "label": 1}, "caption_index 'True'; expected a whole number"),
        ({"key": "1", "caption_index": math.inf, "label": 1}, "caption_index 'inf'; expected a whole number"),
        ({"key": 1, "caption_index": 0, "label": 1}, "row 1 has the key '1'; expected a text"),
        ({"key": "1", "label": 1}, "columns key, label; expected key, label and caption_index or text"),
        ({"key": "1", "text": "", "label": 1}, "neither a caption_index nor a text"),
        (["1", 0, 1], "row 1 is no object"),
    ],
)
def test_rows_that_say_nothing(row: object, message: str, tmp_path: Path) -> None:
    path = tmp_path / "labels.jsonl"
    path.write_text(json.dumps(row), encoding="utf-8")
    with pytest.raises(UsageError, match=message):
        read_pair_labels(path)


@pytest.mark.parametrize("row", [{"image": "a", "key": "b"}, {"image": None, "key": None}])
def test_an_image_is_a_file_or_a_key(row: dict, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="(both|neither) image and key"):
        read_labelled_texts(write(tmp_path / "pairs.jsonl", [{**row, "text": "a dog", "label": 1}]))


@pytest.mark.parametrize("ending", ENDINGS)
def test_files_that_are_something_else(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"labels{ending}"
    path.write_bytes(b"\xff\xfe\x00 nothing of the kind \x80\n" * 3)
    with pytest.raises(UsageError, match=r"cannot be read|has the columns"):
        read_pair_labels(path)
    path.write_bytes(b"")
    with pytest.raises(UsageError, match=r"has no rows|cannot be read"):
        read_pair_labels(path)
    with pytest.raises(UsageError, match=r"ends in '\.txt'; expected one of \.parquet"):
        read_pair_labels(tmp_path / "labels.txt")
