"""Row 10: Parquet that is damaged, of another kind, or far larger than it looks."""

from __future__ import annotations

import contextlib
import functools
import json
import random
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from capfilt.curation.url_table import open_url_table
from capfilt.data.bounded_parquet import BoundedParquet, OversizedError
from capfilt.data.commit import read_table
from capfilt.data.labels import read_pair_labels
from capfilt.data.rundir import RunDir
from capfilt.data.sealed import read_record, read_sealed, sealed_bytes
from capfilt.data.verify import verify_run
from capfilt.errors import CorruptionError, UsageError
from tests.data.conftest import commit_captions, commit_shard
from tests.stress.conftest import FULL, Figure
from tests.stress.lives import COMMITS

BAD = "00000"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    run = RunDir.create(tmp_path_factory.mktemp("run"))
    for commit in COMMITS.values():
        commit(run, BAD)
    return run


def test_no_flip_goes_unseen(run: RunDir, tmp_path: Path, figure: Figure) -> None:
    rng, num, plain_silent = random.Random(0), 400 if FULL else 60, 0
    path = run.stage_file("manifest", BAD)
    whole, table = path.read_bytes(), read_table(path)
    copy = tmp_path / "manifest" / path.name
    copy.parent.mkdir()
    for _ in range(num):
        flipped = bytearray(whole)
        flipped[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        copy.write_bytes(flipped)
        with pytest.raises(CorruptionError, match=f"manifest of shard {BAD}"):
            read_table(copy)
        with contextlib.suppress(OSError, ValueError, pa.ArrowException):
            plain_silent += not pq.read_table(copy).replace_schema_metadata(None).equals(table)
    figure(10, f"{num} of {num} flipped bits found (plain pyarrow reads {plain_silent} of them wrong without a word)")


def test_no_cut_goes_unseen(run: RunDir, tmp_path: Path, figure: Figure) -> None:
    whole = run.stage_file("captions", BAD).read_bytes()
    copy = tmp_path / "captions" / f"{BAD}.parquet"
    copy.parent.mkdir()
    ends = range(0, len(whole), 1 if FULL else 37)
    for end in ends:
        copy.write_bytes(whole[:end])
        with pytest.raises(CorruptionError):
            read_sealed(copy)
        with pytest.raises(CorruptionError):
            read_record(copy)
    figure(10, f"{len(ends):,} of {len(ends):,} cuts found")


class Secret(pa.ExtensionType):
    """A type of another program's."""

    def __init__(self) -> None:
        super().__init__(pa.string(), "tests.secret")

    def __arrow_ext_serialize__(self) -> bytes:
        return b""

    @classmethod
    def __arrow_ext_deserialize__(cls, _storage: pa.DataType, _serialized: bytes) -> Secret:
        return cls()


def as_extension(table: pa.Table) -> pa.Table:
    array = pa.ExtensionArray.from_storage(Secret(), table["text"].combine_chunks())
    return table.set_column(table.schema.get_field_index("text"), "text", array)


OTHER_TABLES: dict[str, Callable[[pa.Table], pa.Table]] = {
    "a column less": lambda table: table.drop_columns("text"),
    "a column more": lambda table: table.append_column("more", table["key"]),
    "columns exchanged": lambda table: table.select(table.column_names[::-1]),
    "numbers for texts": lambda table: table.set_column(2, "text", pa.array(range(table.num_rows))),
    "another width of numbers": lambda table: table.set_column(
        1, "caption_index", table["caption_index"].cast("int64")
    ),
    "large strings": lambda table: table.set_column(2, "text", table["text"].cast(pa.large_string())),
    "a dictionary": lambda table: table.set_column(2, "text", table["text"].dictionary_encode()),
    "lists": lambda table: table.set_column(2, "text", pa.array([[text] for text in table["text"].to_pylist()])),
    "no rows": lambda table: table.slice(0, 0),
    "no columns": lambda table: table.select([]),
}


@pytest.mark.parametrize("case", OTHER_TABLES)
def test_other_columns_under_a_right_seal_are_found(run: RunDir, tmp_path: Path, case: str, figure: Figure) -> None:
    other = RunDir.create(tmp_path / "run")
    for commit in (commit_shard, commit_captions):
        commit(other, BAD)
    path = other.stage_file("captions", BAD)
    table, record, _ = read_sealed(path)
    changed = OTHER_TABLES[case](table)
    record["extra"]["table_rows"] = changed.num_rows
    path.write_bytes(sealed_bytes(changed, record))
    report = verify_run(other)
    assert [finding.shard for finding in report.findings] == [BAD]
    figure(10, f"tables of another kind: {len(OTHER_TABLES)} of {len(OTHER_TABLES)} named by verify")


def test_a_type_of_another_program_is_read_as_what_it_is_stored_as(run: RunDir, tmp_path: Path) -> None:
    table, record, _ = read_sealed(run.stage_file("captions", BAD))
    copy = tmp_path / "captions" / f"{BAD}.parquet"
    copy.parent.mkdir()
    copy.write_bytes(sealed_bytes(as_extension(table), record))
    assert read_table(copy).equals(table)


# --- more than it looks ---------------------------------------------------------------------------------


def test_large_strings_are_bounded_and_categories_are_read(tmp_path: Path) -> None:
    """Whatever type the file says that its texts have; categories of numbers, as pandas writes them, are no texts."""
    one = pa.DictionaryArray.from_arrays(pa.array([0] * 2_000, pa.int32()), pa.array(["x" * 1_000_000]))
    path, schema = tmp_path / "a.parquet", pa.schema([("text", pa.large_string())])
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for start in range(0, 2_000, 100):
            writer.write_table(pa.table({"text": one.slice(start, 100).dictionary_decode().cast(pa.large_string())}))
    with BoundedParquet(path) as file:
        sizes = [batch.num_rows for batch in file.batches(1 << 16)]
        assert file.schema.field("text").type == pa.large_string()
    assert sum(sizes) == 2_000
    assert max(sizes) <= 67, "64 MiB of texts"
    labels = {"key": ["a", "b"], "caption_index": [0, 1], "label": pa.array([1, 0]).dictionary_encode()}
    pq.write_table(pa.table(labels), tmp_path / "labels.parquet")
    assert [one.is_true for one in read_pair_labels(tmp_path / "labels.parquet")] == [True, False]
    pq.write_table(pa.table({"text": [["a"], ["b"]]}), tmp_path / "nested.parquet")
    with BoundedParquet(tmp_path / "nested.parquet") as file, pytest.raises(OversizedError, match="text is nested"):
        next(file.batches(10))


def write_dictionary_bomb(path: Path, columns: tuple[str, ...], rows: int, text_bytes: int) -> None:
    """Rows that all have one long text, which stands in the file once."""
    one = pa.DictionaryArray.from_arrays(pa.array([0] * (rows // 10), pa.int32()), ["x" * text_bytes])
    schema = pa.schema([(name, one.type) for name in columns])
    with pq.ParquetWriter(path, schema, compression="zstd", store_schema=False) as writer:
        for _ in range(10):
            writer.write_table(pa.table(dict.fromkeys(columns, one)))


COLUMNS = ("url", "text", "key", "label")
NUM_ROWS, TEXT_BYTES = 20_000, 10_000_000
NUM_BATCHES = 40
READERS = {
    "sealed": (
        "from capfilt.data.sealed import read_sealed; read_sealed(path)",
        r"CorruptionError: .*its rows take more than [\d,]+ bytes",
    ),
    "labels": (
        "from capfilt.data.labels import read_pair_labels; read_pair_labels(path)",
        r"UsageError: .*row 1 has the label 'x+….*expected 0 or 1",
    ),
    "URL table": (
        "from capfilt.curation.url_table import open_url_table; "
        "table = open_url_table(str(path), 'url', 'text', path.parent); "
        f"found = [batch.num_rows for batch, _ in zip(table.batches(), range({NUM_BATCHES}))]; "
        "result = f'{table.num_rows} rows, of them {sum(found)} in {len(found)} batches'",
        rf"{NUM_ROWS} rows, of them 80 in {NUM_BATCHES} batches",
    ),
}
"""Name → what reads the file, and what comes of it: an error, or rows."""
PEAK = r"""
import json, re, sys
from pathlib import Path
path = Path(sys.argv[1])
import pyarrow, pyarrow.parquet, capfilt.curation.url_table, capfilt.data.labels
peak = lambda: int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])
before, result = peak(), "read"
try:
    {code}
except Exception as error:
    result = f"{type(error).__name__}: {error}"
print(json.dumps([result, peak() - before]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
@pytest.mark.parametrize("reader", READERS)
def test_memory_is_bounded_whatever_a_file_stands_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reader: str, figure: Figure
) -> None:
    """Twenty thousand rows of 10 MB in each of four columns are 800 GB; the file has a few megabytes at most."""
    path = tmp_path / "captions" / "00000.parquet"
    path.parent.mkdir()
    write_dictionary_bomb(path, COLUMNS, NUM_ROWS, TEXT_BYTES)
    if reader == "sealed":
        with pq.ParquetFile(path, read_dictionary=list(COLUMNS)) as file:
            plain = functools.partial(pq.ParquetWriter, store_schema=False)  # its columns read as texts then
            monkeypatch.setattr("capfilt.data.sealed.pq.ParquetWriter", plain)
            path.write_bytes(sealed_bytes(file.read(), {"stage": "captions"}))
    code, expected = READERS[reader]
    done = subprocess.run(
        [sys.executable, "-c", PEAK.replace("{code}", code), path], capture_output=True, text=True, check=True
    )
    result, grown_kib = json.loads(done.stdout)
    growth = grown_kib >> 10
    assert path.stat().st_size < 5_000_000
    assert growth < (2600 if reader == "sealed" else 1000), "a table of a shard may have 2 GB"
    assert re.search(expected, result), result
    stands_for = len(COLUMNS) * NUM_ROWS * TEXT_BYTES // 10**9
    figure(10, f"a file of {path.stat().st_size >> 10:,} KiB that stands for {stands_for} GB, as {reader}: {growth:,} "
               "MiB more at most")  # fmt: skip


def test_what_is_spelled_out_is_what_pyarrow_reads(tmp_path: Path) -> None:
    table = pa.table({
        "n": pa.array([1, None, 3] * 50, pa.int32()), "text": ["a", None, "ü" * 300] * 50,
        "bytes": pa.array([b"\xff", b"", None] * 50, pa.binary()), "large": pa.array(["x"] * 150, pa.large_string()),
        "kind": pa.array(["web", "web", "synthetic"] * 50).dictionary_encode(),
    })  # fmt: skip
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=40)
    with BoundedParquet(tmp_path / "a.parquet") as file:
        assert file.read(1 << 30).equals(table)
        assert file.read(1 << 30, ["text", "n"]).equals(table.select(["text", "n"]))
        with pytest.raises(OversizedError, match="more than 100 bytes"):
            file.read(100)


def test_what_is_no_parquet_is_named(tmp_path: Path) -> None:
    for number, content in enumerate((b"", b"PAR1", b"PAR1" + b"\xff" * 64 + b"PAR1", b"<html>" * 100)):
        path = tmp_path / f"{number}.parquet"
        path.write_bytes(content)
        with pytest.raises(UsageError, match=path.name):
            open_url_table(str(path), "url", "text", tmp_path)
        with pytest.raises(UsageError, match=path.name):
            read_pair_labels(path)
