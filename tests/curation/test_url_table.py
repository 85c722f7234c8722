"""URL tables in every format: what is read, what is carried along, and what is said about a bad one."""

from __future__ import annotations

import datetime
import gzip
import json
from decimal import Decimal
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from capfilt.curation.parts import plan_shards, write_parts
from capfilt.curation.url_table import open_url_table
from capfilt.errors import UsageError

ROWS = [
    ("http://a.example/1,2.jpg", "a cat, a dog"),
    ("http://b.example/2.jpg", 'say "two"\nlines'),
    ("x", ""),
]


def _read(path: object, staging: Path, url: str = "url", caption: str = "text") -> list[dict[str, Any]]:
    table = open_url_table(str(path), url, caption, staging)
    rows = pa.Table.from_batches(list(table.batches()), table.schema).to_pylist()
    assert len(rows) == table.num_rows
    return rows


def _pairs(rows: list[dict[str, Any]]) -> list[tuple[str | None, str]]:
    return [(row["url"], row["caption"]) for row in rows]


def _csv(delimiter: str) -> bytes:
    quoted = [delimiter.join('"' + value.replace('"', '""') + '"' for value in row) for row in ROWS]
    return "\n".join([delimiter.join(["url", "text"]), *quoted, ""]).encode()


def _jsonl() -> bytes:
    return b"".join(json.dumps({"url": url, "text": text}).encode() + b"\n" for url, text in ROWS)


def _json() -> bytes:
    return json.dumps([{"url": url, "text": text} for url, text in ROWS]).encode()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("ending", "content"), [("csv", _csv(",")), ("tsv", _csv("\t")), ("jsonl", _jsonl()), ("json", _json())]
)
def test_text_formats(tmp_path: Path, ending: str, content: bytes, packed: bool) -> None:
    path = tmp_path / (f"t.{ending}.gz" if packed else f"t.{ending}")
    path.write_bytes(gzip.compress(content) if packed else content)
    staging = tmp_path / "staging"
    staging.mkdir()
    assert _pairs(_read(path, staging)) == ROWS


def test_parquet_carries_plain_columns_and_notes_the_others(tmp_path: Path) -> None:
    now = datetime.datetime(2024, 1, 1)
    columns = {
        "URL": pa.array(["http://a", None]).dictionary_encode(),
        "TEXT": pa.array(["x", None], pa.large_string()),
        "score": pa.array([0.5, float("nan")]),
        "n": pa.array([1, None], pa.int16()),
        "safe": [True, False],
        "lang": ["en", "de"],
        "at": [now, now],
        "price": [Decimal("1.50"), Decimal("2.00")],
        "raw": [b"\xff", b""],
        "tags": [["a"], []],
        "width": [1, 2],
    }
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    table = open_url_table(str(tmp_path / "t.parquet"), "URL", "TEXT", tmp_path)
    assert list(table.extra) == ["score", "n", "safe", "lang"]
    assert sorted(note.split("'")[1] for note in table.notes) == ["at", "price", "raw", "tags", "width"]
    rows = pa.Table.from_batches(list(table.batches()), table.schema).to_pylist()
    assert _pairs(rows) == [("http://a", "x"), (None, "")]
    assert rows[0]["n"] == 1
    assert rows[0]["reason"] is None


def test_txt_has_addresses_only(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_bytes(b"\xef\xbb\xbfhttp://a/1,2\n\n  http://b \r\nhttp://\xff\n")
    rows = _read(tmp_path / "t.txt", tmp_path, "link", "words")
    assert _pairs(rows) == [("http://a/1,2", ""), ("http://b", ""), (None, "")]
    assert rows[2]["reason"] == "bad_row"


def test_bad_rows_are_kept_with_a_reason(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(b"url,text\nhttp://a,x\nhttp://b\nhttp://c,\xe4\nhttp://d,1,2\n")
    rows = _read(tmp_path / "t.csv", tmp_path)
    assert [row["reason"] for row in rows] == [None, "bad_caption", "bad_row", "bad_row"]
    lines = [
        '{"url":"http://a","text":"x","n":1}',
        "nonsense",
        "[1]",
        '{"url":["b"]}',
        '{"url":"c","text":"\\ud800"}',
    ]
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    rows = _read(tmp_path / "t.jsonl", tmp_path)
    assert [row["reason"] for row in rows] == [None, "bad_row", "bad_row", "bad_row", "bad_row"]
    assert rows[1]["detail"] == "line 2 is not JSON"


def test_json_columns_have_one_type_or_are_left_out(tmp_path: Path) -> None:
    rows = [
        {"url": "a", "text": "x", "n": 1, "m": "s", "o": {}},
        {"url": "b", "text": None, "n": 2.5, "big": 2**70},
    ]
    (tmp_path / "t.json").write_text(json.dumps(rows))
    table = open_url_table(str(tmp_path / "t.json"), "url", "text", tmp_path)
    assert table.extra == {"n": pa.float64(), "m": pa.string()}
    assert [note.split("'")[1] for note in table.notes] == ["o", "big"]


def test_folders_globs_and_remote_files(tmp_path: Path) -> None:
    folder = tmp_path / "tables"
    folder.mkdir()
    for name in ("b", "a"):
        pq.write_table(pa.table({"url": [name], "text": [name], name: [1]}), folder / f"{name}.parquet")
    (folder / "README.md").write_text("not a table")
    assert _pairs(_read(folder, tmp_path)) == [("a", "a"), ("b", "b")]
    assert _pairs(_read(folder / "[b].parquet", tmp_path)) == [("b", "b")]
    memory = fsspec.filesystem("memory")
    memory.pipe("/far/t.csv", _csv(","))
    assert _pairs(_read("memory://far/t.csv", tmp_path)) == ROWS
    same = open_url_table(str(folder), "url", "text", tmp_path)
    assert same.extra == {}
    assert all("differs between files" in note for note in same.notes)


def test_digest_is_that_of_the_bytes(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(_csv(","))
    (tmp_path / "b.csv").write_bytes(_csv(","))
    (tmp_path / "c.csv").write_bytes(_csv(",") + b"http://new,text\n")
    digests = [open_url_table(str(tmp_path / f"{n}.csv"), "url", "text", tmp_path).sha256 for n in "abc"]
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "t.csv",
            b"link,alt\na,b\n",
            "no column 'url' and 'text'. Columns found: link, alt. Did you mean --url-column link --caption-column alt",
        ),
        ("t.csv", b"url,alt\na,b\n", "no column 'text'.*--caption-column"),
        ("t.csv", b"", "cannot be read as CSV"),
        ("t.csv", b"url,text\n", "has no rows"),
        ("t.csv", b"url,text,url\na,b,c\n", "no column 'url'"),
        ("t.parquet", b"url,text\n", "cannot be read as Parquet"),
        ("t.json", b'{"url": "a"}', "expected an array of objects"),
        ("t.json", b'{"url": "a"}\n{"url": "b"}', "name the file .jsonl"),
        ("t.jsonl", b'{"link": "a"}\n', "no column 'url'"),
        ("t.csv.gz", b"url,text\n", "cannot be read"),
        ("t.xlsx", b"", "not of one known format"),
        ("t.parquet.gz", b"", "not of one known format"),
    ],
)
def test_unusable_tables_say_what_mends_them(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=message):
        _read(tmp_path / name, tmp_path)


def test_missing_things_say_what_mends_them(tmp_path: Path) -> None:
    pq.write_table(pa.table({"url": [1, 2], "text": ["a", "b"]}), tmp_path / "n.parquet")
    for path, message in (
        (tmp_path / "none.parquet", "No table at"),
        (tmp_path / "n.parquet", "holds int64; expected text"),
        ("odd://bucket/t.csv", "odd"),
    ):
        with pytest.raises(UsageError, match=message):
            _read(path, tmp_path)


@pytest.mark.skipif(find_spec("s3fs") is not None, reason="s3fs is installed")
def test_missing_package_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="pip install s3fs"):
        _read("s3://bucket/t.csv", tmp_path)


def test_shards_are_planned_as_asked() -> None:
    assert plan_shards(10, 4, None) == [4, 4, 2]
    assert plan_shards(8, 4, None) == [4, 4]
    assert plan_shards(10, 1000, 4) == [3, 3, 2, 2]
    assert plan_shards(3, 1000, 9) == [1, 1, 1]


@pytest.mark.parametrize(("num_shards", "missing"), [(None, {0, 1, 2, 3, 4}), (None, {3}), (4, {1, 3}), (7, {0, 6})])
def test_parts_hold_the_rows_of_their_shards(tmp_path: Path, num_shards: int | None, missing: set[int]) -> None:
    urls = [f"u{i}" for i in range(23)]
    pq.write_table(pa.table({"url": urls, "text": urls}), tmp_path / "t.parquet")
    table = open_url_table(str(tmp_path / "t.parquet"), "url", "text", tmp_path)
    sizes = plan_shards(23, 5, num_shards)
    seen: set[int] = set()
    for part in write_parts(table, sizes, missing, tmp_path):
        first = sum(sizes[: part.numbers[0]])
        count = sum(sizes[number] for number in part.numbers)
        assert pq.read_table(part.path)["url"].to_pylist() == urls[first : first + count]
        assert len({sizes[number] for number in part.numbers}) == 1
        seen.update(part.numbers)
    assert seen >= missing


@pytest.mark.parametrize("ending", ["csv", "tsv"])
def test_bytes_that_are_no_utf8_cost_their_rows_and_no_others(tmp_path: Path, ending: str) -> None:
    """In a value, in a row of the wrong number of fields, in the name of a column; at the edge of a piece too."""
    mark = "," if ending == "csv" else "\t"
    rows = [
        b"url,text,n\xff\xfe",
        b"http://a/,good,1",
        b"http://b/,caf\xe9,2",
        b"http://c/,one,two,\xe9",
        b"http://d/,good,4",
    ]
    rows += [b"http://e/,\xf0\x9f\x99\x82" + "ü".encode() * 700_000 + b",5", b"http://f/,good,\xf0\x9f\x99"]
    path = tmp_path / f"t.{ending}"
    path.write_bytes(b"\n".join(rows).replace(b",", mark.encode()))
    staging = tmp_path / "staging"
    staging.mkdir()
    table = open_url_table(str(path), "url", "text", staging)
    found = [row for batch in table.batches() for row in batch.to_pylist()]
    assert table.num_rows == len(found) == 6
    by_url = {row["url"]: row for row in found}
    assert [by_url[f"http://{name}/"]["caption"] for name in "ad"] == ["good", "good"]
    assert by_url["http://b/"]["reason"] == "bad_caption"
    assert by_url["http://e/"]["caption"] == "🙂" + "ü" * 700_000
    assert [row["reason"] for row in found if row["url"] is None] == ["bad_row"]


@pytest.mark.parametrize("rows", [["http://a/1"], ["http://a/1", "http://a/2", "http://a/3"]], ids=["fewer", "more"])
def test_a_table_that_has_other_rows_than_it_says_is_refused(tmp_path: Path, rows: list[str]) -> None:
    """Here it is another one by the time it is read; what a damaged file says of itself may be wrong as well."""
    path = tmp_path / "t.csv"
    path.write_text("url,text\nhttp://a/1,x\nhttp://a/2,y\n")
    table = open_url_table(str(path), "url", "text", tmp_path)
    path.write_text("".join(["url,text\n", *(f"{url},x\n" for url in rows)]))
    with pytest.raises(UsageError, match=f"was to have 2 rows, and {len(rows)} could be read"):
        list(table.batches())
