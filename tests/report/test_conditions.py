"""Conditions in SQL: what they may say, and that they reach nothing but the pairs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from capfilt.data.schemas import SCHEMAS
from capfilt.errors import UsageError
from capfilt.report.conditions import Condition


@pytest.fixture
def pairs() -> pa.Table:
    rows = [
        {"key": f"k{n}", "source": "web" if n % 2 else "synthetic", "text": f"it's {n}", "itm_score": n / 10, "rank": n}
        for n in range(9)
    ]
    return pa.Table.from_pylist([*rows, {"key": "null"}], schema=SCHEMAS["manifest"])


def test_conditions_hold_where_they_are_true(pairs: pa.Table) -> None:
    itm = pairs["itm_score"].to_pylist()
    for sql, expected in (
        ("itm_score between 0.35 and 0.65", [x is not None and 0.35 <= x <= 0.65 for x in itm]),
        ("source = 'web' and not rank = 3", [n % 2 == 1 and n != 3 for n in range(10)]),
        ("text = 'it''s 4' -- a remark", [n == 4 for n in range(10)]),
        ("itm_score is null", [x is None for x in itm]),
        ("length(text) > 3 or kept", [x is not None for x in itm]),
        ("key in ('k1', 'k2') /* two */", [n in (1, 2) for n in range(10)]),
    ):
        if sql.startswith("source"):
            expected[9] = False
        np.testing.assert_array_equal(Condition(sql).holds(pairs), expected, err_msg=sql)


@pytest.mark.parametrize(
    "sql",
    [
        "key in (select column0 from read_csv('/etc/passwd'))", "exists (select * from read_text('/etc/passwd'))",
        "exists (select * from '/etc/passwd')", "exists (select * from glob('/etc/*'))",
        "exists (select * from read_parquet('FILE'))", "exists (select * from 'FILE')",
        "1 = 1; copy (select 1) to 'WRITTEN'", "true; attach 'WRITTEN' as other", "attach 'WRITTEN'",
        "1 = 1) union all (select 1", "true; set enable_external_access = true", "true; install httpfs",
        "exists (copy (select 1) to 'WRITTEN')", "true; export database 'WRITTEN'", "true; load 'WRITTEN'",
        "exists (select * from read_blob('https://example.com/x'))", "(select count(*) from numbered) > 0",
        "getenv('HOME') is not null", "true; drop table manifest", "", " ", "nope > 1", "true, false", "$1",
        "sum(rank) > 1", "itm_score >", "text",
    ],
)  # fmt: skip
def test_anything_else_is_refused(sql: str, pairs: pa.Table, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    pq.write_table(pairs, tmp_path / "there.parquet")
    written = tmp_path / "written"
    asked = sql.replace("FILE", str(tmp_path / "there.parquet")).replace("WRITTEN", str(written))
    with pytest.raises(UsageError, match="The columns are shard, key, url"):
        Condition(asked).holds(pairs)
    assert [path.name for path in tmp_path.iterdir()] == ["there.parquet"]


def test_without_duckdb_it_names_the_command_that_installs_it() -> None:
    code = (
        "import sys; sys.modules['duckdb'] = None\n"
        "from capfilt.report.conditions import Condition\n"
        "try: Condition('true')\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("MissingPackageError --where needs the package duckdb")
    assert "pip install 'capfilt[sql]'" in done.stdout
