"""Sealed Parquet: any flipped bit and any cut is found; every other reader opens the file."""

from __future__ import annotations

import contextlib
from pathlib import Path

import duckdb
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capfilt.data.sealed import canonical_json, read_record, read_sealed, sealed_bytes
from capfilt.errors import CorruptionError, UsageError

TABLE = pa.table(
    {
        "key": [f"{n:05d}" for n in range(60)],
        "text": ["capfilt.seal" + "0" * 64, "ÄÖ 猫", None] * 20,
        "score": pa.array([n / 7 for n in range(60)], pa.float32()),
    }
)
RECORD = {"stage": "clip", "note": "capfilt.seal" + "0" * 70, "rows": 60}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "clip" / "00000.parquet"
    path.parent.mkdir()
    path.write_bytes(sealed_bytes(TABLE, RECORD))
    return path


def test_reads_back_and_is_the_same_each_time(path: Path) -> None:
    table, record, seal = read_sealed(path)
    assert table.equals(TABLE)
    assert record == RECORD
    assert read_record(path) == (RECORD, seal, 60)
    assert sealed_bytes(TABLE, RECORD) == path.read_bytes()
    assert read_sealed(path, ["score"])[0].column_names == ["score"]


def test_a_flip_anywhere_breaks_the_seal(path: Path) -> None:
    data = path.read_bytes()
    for position in range(0, len(data), 9):
        flipped = bytearray(data)
        flipped[position] ^= 1 << position % 8
        path.write_bytes(flipped)
        with pytest.raises(CorruptionError, match="clip of shard 00000"):
            read_sealed(path)


def test_a_flip_never_changes_the_record_in_silence(path: Path) -> None:
    data = path.read_bytes()
    for position in range(len(data) - 2500, len(data), 7):
        flipped = bytearray(data)
        flipped[position] ^= 1 << position % 8
        path.write_bytes(flipped)
        with contextlib.suppress(CorruptionError):
            assert read_record(path)[0] == RECORD


def test_every_cut_is_found(path: Path) -> None:
    data = path.read_bytes()
    for end in range(0, len(data), 41):
        path.write_bytes(data[:end])
        with pytest.raises(CorruptionError):
            read_sealed(path)
        with pytest.raises(CorruptionError):
            read_record(path)


def test_a_plain_parquet_file_has_no_record(path: Path) -> None:
    pd.DataFrame({"key": ["a"]}).to_parquet(path)
    with pytest.raises(CorruptionError):
        read_sealed(path)
    with pytest.raises(CorruptionError, match="no commit record"):
        read_record(path)


def test_other_readers_open_it(path: Path) -> None:
    assert duckdb.sql(f"select count(*), max(key) from '{path}'").fetchall() == [(60, "00059")]
    assert pd.read_parquet(path)["score"].tolist() == TABLE["score"].to_pylist()


def test_what_is_not_there_is_named(path: Path) -> None:
    with pytest.raises(UsageError, match="no column nothing; it has key, text, score"):
        read_sealed(path, ["nothing"])
    with pytest.raises(UsageError, match="no file"):
        read_record(path.with_name("00001.parquet"))


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=50, deadline=None)
@given(st.dictionaries(st.text(), JSON_VALUES, max_size=5))
def test_canonical_json_does_not_depend_on_order(value: dict[str, object]) -> None:
    assert canonical_json(value) == canonical_json(dict(reversed(value.items())))


def test_canonical_json_refuses_what_json_lacks() -> None:
    with pytest.raises(ValueError, match="JSON"):
        canonical_json({"a": float("nan")})
