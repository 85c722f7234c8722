"""Sums of downloaded rows, beside counts made one row at a time with Python's own parser of addresses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from urllib.parse import urlsplit

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from capfilt.data.schemas import SCHEMAS
from capfilt.report import download_sums
from capfilt.report.download_sums import ASPECT_NAMES, COLUMNS, DownloadSums

HOSTS = ("a.example", "A.Example", "b.example", "[::1]", "127.0.0.1")
ROWS = st.lists(
    st.tuples(
        st.sampled_from(["http", "https", "HTTPS"]), st.sampled_from(["", "user@", "user:w@"]), st.sampled_from(HOSTS),
        st.sampled_from(["", ":80", ":8080"]), st.sampled_from(["", "/", "/a@b?c#d", "?x=http://z/"]),
        st.sampled_from([None, "timeout", "not_found"]),
    ),
    max_size=30,
)  # fmt: skip


def table_of(rows: Sequence[dict[str, object]]) -> pa.Table:
    names = COLUMNS
    return pa.Table.from_pylist(list(rows), schema=pa.schema([SCHEMAS["shards"].field(name) for name in names]))


def failed(url: str | None, reason: str | None) -> dict[str, object]:
    return {"url": url, "status": "failed_to_download" if reason else "skipped", "reason": reason}


@given(ROWS, st.integers(0, 30))
def test_hosts_and_their_failures(rows: list[tuple[str, str, str, str, str, str | None]], cut: int) -> None:
    urls = [(f"{scheme}://{user}{host}{port}{path}", reason) for scheme, user, host, port, path, reason in rows]
    sums, other = DownloadSums(), DownloadSums()
    for part, into in ((urls[:cut], sums), (urls[cut:], other)):
        into.add(table_of([failed(url, reason) for url, reason in part]))
    sums.merge(other)
    by_host: dict[str, Counter[str | None]] = {}
    for url, reason in urls:
        by_host.setdefault(urlsplit(url).netloc.rpartition("@")[2].lower().removesuffix(":80").removesuffix(":8080"),
                           Counter())[reason] += 1  # fmt: skip
    assert sums.hosts.num_hosts() == len(by_host)
    found = {host: (num, reasons) for host, num, reasons in sums.hosts.worst(100)}
    assert found == {
        host: (counts.total(), {reason: times for reason, times in counts.items() if reason})
        for host, counts in by_host.items() if counts.keys() - {None}
    }  # fmt: skip
    failures = [sum(reasons.values()) for _, _, reasons in sums.hosts.worst(100)]
    assert failures == sorted(failures, reverse=True)


def test_rows_without_a_host_and_many_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download_sums, "_MOST_LOOSE_ROWS", 3)
    sums = DownloadSums()
    for number in range(20):
        sums.add(table_of([failed(f"http://h{number % 7}/x", "timeout"), failed(None, "timeout"), failed("x", "gone")]))
    assert sums.hosts.num_hosts() == 7
    assert sums.hosts.worst(2) == [("h0", 3, {"timeout": 3}), ("h1", 3, {"timeout": 3})]
    assert sums.reason == {"timeout": 40, "gone": 20}


def test_shapes_and_formats() -> None:
    sizes = [(10, 100), (40, 100), (60, 100), (70, 100), (100, 100), (130, 100), (170, 100), (250, 100), (300, 100)]
    sums = DownloadSums()
    rows = [{"url": "", "status": "success", "width": w, "height": h, "image_ext": "png"} for w, h in sizes]
    sums.add(table_of(rows))
    assert sums.aspects.tolist() == [1] * len(ASPECT_NAMES)
    assert sums.formats == {"png": 9}
    assert sums.shorter_edges.sum() == 9
