"""The manifest across shards and runs, and in the tools that people open it with."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import duckdb
import pandas as pd
import polars
import pytest
from pyspark.sql import SparkSession

from capfilt.data.manifest import SCHEMAS, iterate_manifest, read_manifest
from capfilt.data.rundir import RunDir
from capfilt.errors import CapfiltError, UsageError
from tests.train.small_models import save_run


def test_all_rows_of_all_runs(make_run: Callable[..., RunDir]) -> None:
    runs = [make_run(2, 3, name="one"), make_run(1, 4, name="two")]
    table = read_manifest(runs)
    assert table.schema.equals(SCHEMAS["manifest"])
    assert table.num_rows == (2 * 2 + 3) * 4
    assert read_manifest([run.path for run in runs]).equals(table)
    kept = read_manifest(runs, ["key", "text"], kept_only=True)
    assert kept.column_names == ["key", "text"]
    assert kept.num_rows == sum(table["kept"].to_pylist())
    shards = [(run.path.name, shard) for run, shard, _ in iterate_manifest(runs)]
    assert shards == [("one", "00000"), ("one", "00001"), ("two", "00000")]


def test_duckdb_and_pandas_open_it(make_run: Callable[..., RunDir]) -> None:
    run = make_run(2, 3)
    table = read_manifest([run])
    files = run.path / "manifest" / "*.parquet"
    num_kept = sum(table["kept"].to_pylist())
    query = f"select count(*), sum(kept::int), max(clip_score) from '{files}' where drop_reason is null"
    assert duckdb.sql(query).fetchall() == [(num_kept, num_kept, 0.75)]
    frame = pd.read_parquet(run.path / "manifest")
    assert list(frame.columns) == SCHEMAS["manifest"].names
    assert len(frame) == table.num_rows
    assert frame["kept"].dtype == bool


def test_polars_opens_it(make_run: Callable[..., RunDir]) -> None:
    run = make_run(2, 3)
    table = read_manifest([run])
    frame = polars.scan_parquet(run.path / "manifest" / "*.parquet")
    assert frame.collect_schema().names() == SCHEMAS["manifest"].names
    counts = frame.group_by("drop_reason").len().collect()
    assert dict(counts.iter_rows()) == Counter(table["drop_reason"].to_pylist())
    best = frame.filter(polars.col("kept")).sort("shard", "key", "caption_index").select("key", "text").collect()
    assert best.rows(named=True) == table.filter(table["kept"]).select(["key", "text"]).to_pylist()


@pytest.mark.skipif(shutil.which("java") is None, reason="Spark runs on Java")
def test_spark_queries_it(make_run: Callable[..., RunDir], monkeypatch: pytest.MonkeyPatch) -> None:
    """In one process, without its pages, bound to this machine."""
    monkeypatch.setenv("SPARK_LOCAL_IP", "127.0.0.1")
    run = make_run(2, 3)
    table = read_manifest([run])
    session = SparkSession.builder.master("local[1]").config("spark.ui.enabled", "false")
    spark = session.config("spark.sql.shuffle.partitions", "1").getOrCreate()
    try:
        frame = spark.read.parquet(str(run.path / "manifest"))
        assert frame.columns == SCHEMAS["manifest"].names
        frame.createOrReplaceTempView("pairs")
        counts = spark.sql("SELECT drop_reason, COUNT(*), MAX(itm_score) FROM pairs GROUP BY drop_reason").collect()
        assert {row[0]: row[1] for row in counts} == Counter(table["drop_reason"].to_pylist())
        kept = spark.sql("SELECT key, text FROM pairs WHERE kept ORDER BY shard, key, caption_index").collect()
        assert [row.asDict() for row in kept] == table.filter(table["kept"]).select(["key", "text"]).to_pylist()
    finally:
        spark.stop()


def test_what_is_missing_is_said(make_run: Callable[..., RunDir], stages: SimpleNamespace, tmp_path) -> None:
    run = make_run(2, 3)
    with pytest.raises(UsageError, match="no column uid; it has shard, key"):
        read_manifest([run], ["uid"])
    stages.manifest(run, "00001", threshold=0.95, replace=True)
    with pytest.raises(CapfiltError, match="mixes 2 selections"):
        read_manifest([run])
    run.stage_file("manifest", "00001").unlink()
    with pytest.raises(CapfiltError, match="lacks 1 of 2 shards"):
        read_manifest([run])
    run.stage_file("manifest", "00000").unlink()
    with pytest.raises(UsageError, match="no manifest yet"):
        read_manifest([run])
    with pytest.raises(UsageError, match="No shards"):
        read_manifest([RunDir.create(tmp_path / "empty")])


def test_pairs_selected_anew_while_they_are_read_are_refused(
    make_run: Callable[..., RunDir], stages: SimpleNamespace
) -> None:
    run = make_run(2, 3)
    tables = iterate_manifest([run])
    next(tables)
    for shard in run.shard_names():
        stages.manifest(run, shard, threshold=0.95, replace=True)
    with pytest.raises(CapfiltError, match="selected anew while they were read"):
        next(tables)


def test_a_run_alone_is_a_list_of_one(tmp_path: Path) -> None:
    run = save_run(tmp_path / "run", [4])
    expected = read_manifest([run])
    assert expected.num_rows > 0
    for one in (run, run.path, str(run.path)):
        assert read_manifest(one).equals(expected)
