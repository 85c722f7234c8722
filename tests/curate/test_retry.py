"""Addresses tried again: only those that failed, into the same run, and every count agrees afterwards."""

from __future__ import annotations

import http.server
import io
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from capfilt.curate.download import download
from capfilt.curate.import_shards import import_shards
from capfilt.curate.retry import retry
from capfilt.data.commit import read_commit_record, read_table
from capfilt.data.retries import RETRY_OF, planned_shards, retry_shards, superseded_keys
from capfilt.data.rundir import RunDir
from capfilt.data.sealed import read_sealed, sealed_bytes
from capfilt.data.shards import read_samples
from capfilt.data.verify import verify_run
from capfilt.errors import CapfiltError, UsageError
from capfilt.report.stats import compute_stats
from capfilt.settings import DownloadSettings
from tests import factories
from tests.cli.conftest import capfilt
from tests.curate.test_import_shards import write_foreign

SETTINGS = DownloadSettings(
    allow_private_addresses=True, samples_per_shard=6, num_processes=1, num_threads=4, timeout_seconds=3.0
)
NUM_ROWS = 20


class Site:
    """Rows 0, 3, 6, … are there; 1, 4, 7, … are busy until they are mended; 2, 5, 8, … are not found."""

    def __init__(self) -> None:
        self.mended = 0
        """Rows below it are no longer busy."""
        self.asked: Counter[int] = Counter()
        site, picture = self, io.BytesIO()
        factories.draw_picture(3).save(picture, "JPEG")

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                number = int(self.path.strip("/"))
                site.asked[number] += 1
                status = {0: 200, 1: 200 if number < site.mended else 503, 2: 404}[number % 3]
                self.send_response(status)
                self.send_header("Content-Length", str(len(picture.getvalue()) if status == 200 else 0))
                self.end_headers()
                self.wfile.write(picture.getvalue() if status == 200 else b"")

            def log_message(self, *_: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def write_table(self, path: Path) -> Path:
        port = self.server.server_address[1]
        columns = {
            "url": [f"http://127.0.0.1:{port}/{number}" for number in range(NUM_ROWS)],
            "text": [f"caption {number}" for number in range(NUM_ROWS)],
            "score": [number / 8 for number in range(NUM_ROWS)],
        }
        pq.write_table(pa.table(columns), path)
        return path


@pytest.fixture
def site() -> Iterator[Site]:
    site = Site()
    yield site
    site.server.shutdown()
    site.server.server_close()


BUSY = [n for n in range(NUM_ROWS) if n % 3 == 1]
MISSING = [n for n in range(NUM_ROWS) if n % 3 == 2]


def numbers_with(run: RunDir, shards: list[str]) -> dict[int, str | None]:
    """Number of each address in these shards → reason."""
    rows = [row for shard in shards for row in read_table(run.stage_file("shards", shard)).to_pylist()]
    return {int(row["url"].rpartition("/")[2]): row["reason"] for row in rows}


def test_only_what_failed_is_tried_and_every_count_agrees(site: Site, tmp_path: Path) -> None:
    run, table = RunDir.create(tmp_path / "run"), site.write_table(tmp_path / "urls.parquet")
    download(str(table), run, SETTINGS)
    planned = run.shard_names()
    before = {path: path.read_bytes() for path in (run.path / "shards").iterdir()}
    site.mended, site.asked = 12, Counter()
    first = retry(run, ["server_error"], SETTINGS)
    assert set(site.asked) == set(BUSY)
    assert (first.num_tried, first.num_succeeded) == (len(BUSY), 4)
    assert first.failures == {"server_error": len(BUSY) - 4}
    assert numbers_with(run, retry_shards(run)) == {n: None if n < 12 else "server_error" for n in BUSY}
    assert planned_shards(run) == planned
    assert all(path.read_bytes() == content for path, content in before.items()), "shards are never rewritten"
    report = verify_run(run, deep=True)
    assert (report.findings, report.unfinished) == ([], [])

    site.mended, site.asked = NUM_ROWS, Counter()
    second = retry(run, [], SETTINGS)
    assert set(site.asked) == {n for n in BUSY if n >= 12}
    assert second.num_succeeded == second.num_tried == len(BUSY) - 4
    stats = compute_stats(run)
    assert (stats.download.num_rows, stats.download.num_images) == (NUM_ROWS, NUM_ROWS - len(MISSING))
    assert stats.download.by_reason == stats.quarantine["shards"] == {"not_found": len(MISSING)}
    assert "Nothing to try again" in retry(run, [], SETTINGS).line()
    again = download(str(table), run, SETTINGS)
    assert (again.num_new_shards, again.num_succeeded) == (0, NUM_ROWS - len(MISSING))
    assert again.failures == {"not_found": len(MISSING)}
    assert verify_run(run, deep=True).exit_code == 0


def test_a_retried_row_has_the_content_of_its_row(site: Site, tmp_path: Path) -> None:
    run = RunDir.create(tmp_path / "run")
    download(str(site.write_table(tmp_path / "urls.parquet")), run, SETTINGS)
    site.mended = NUM_ROWS
    retry(run, [], SETTINGS)
    url_of = {
        row["key"]: row["url"] for shard in planned_shards(run)
        for row in read_table(run.stage_file("shards", shard)).to_pylist()
    }  # fmt: skip
    (shard,) = {name[:5] for name in retry_shards(run)[:1]}
    for row in read_table(run.stage_file("shards", shard)).to_pylist():
        number = int(row["url"].rpartition("/")[2])
        assert (row["caption"], row["score"]) == (f"caption {number}", number / 8)
        assert url_of[row[RETRY_OF]] == row["url"]
        assert row["key"] not in url_of
    assert {sample.key for sample in read_samples(run, shard)} <= set(numbers_by_key(run, shard))
    assert superseded_keys(run) == {key for key, url in url_of.items() if int(url.rpartition("/")[2]) in BUSY}


def numbers_by_key(run: RunDir, shard: str) -> dict[str, int]:
    rows = read_table(run.stage_file("shards", shard)).to_pylist()
    return {row["key"]: int(row["url"].rpartition("/")[2]) for row in rows}


def test_what_was_interrupted_is_tried_by_the_same_command(site: Site, tmp_path: Path) -> None:
    """Of an attempt of two shards one is taken away, as if it had not been committed."""
    run = RunDir.create(tmp_path / "run")
    download(str(site.write_table(tmp_path / "urls.parquet")), run, SETTINGS)
    site.mended = NUM_ROWS
    retry(run, [], SETTINGS)
    first, second = retry_shards(run)
    for path in (run.stage_file("shards", first), run.tar_path(first)):
        path.unlink()
    assert verify_run(run, deep=True).exit_code == 0, "what an attempt has not done was never promised"
    done = set(numbers_with(run, [second]))
    site.asked = Counter()
    assert retry(run, [], SETTINGS).num_succeeded == len(BUSY) - len(done)
    assert set(site.asked) == set(BUSY) - done
    assert verify_run(run, deep=True).exit_code == 0


def test_a_retry_of_what_had_not_failed_is_found(site: Site, tmp_path: Path) -> None:
    run = RunDir.create(tmp_path / "run")
    download(str(site.write_table(tmp_path / "urls.parquet")), run, SETTINGS)
    site.mended = NUM_ROWS
    retry(run, [], SETTINGS)
    shard = retry_shards(run)[0]
    path = run.stage_file("shards", shard)
    table, record, _ = read_sealed(path)
    rows = table.to_pylist()
    rows[0][RETRY_OF] = read_table(run.stage_file("shards", "00000"))["key"].to_pylist()[0]
    path.write_bytes(sealed_bytes(pa.Table.from_pylist(rows, schema=table.schema), record))
    (finding,) = verify_run(run).findings
    assert (finding.shard, "which had not failed" in finding.problem) == (shard, True)


def test_settings_of_the_pictures_are_the_runs(site: Site, tmp_path: Path) -> None:
    run = RunDir.create(tmp_path / "run")
    download(str(site.write_table(tmp_path / "urls.parquet")), run, replace(SETTINGS, image_size_px=16, num_shards=3))
    site.mended = NUM_ROWS
    retry(run, [], SETTINGS)
    rows = [row for s in retry_shards(run) for row in read_table(run.stage_file("shards", s)).to_pylist()]
    assert {min(row["width"], row["height"]) for row in rows} == {16}
    assert read_commit_record(run.stage_file("shards", retry_shards(run)[0])).fields["image_size_px"] == 16


def test_what_cannot_be_tried(site: Site, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no reason 'time-out'\. Did you mean timeout"):
        retry(RunDir.create(tmp_path / "empty"), ["time-out"], SETTINGS)
    with pytest.raises(UsageError, match="No shards"):
        retry(RunDir.create(tmp_path / "empty"), [], SETTINGS)
    picture = io.BytesIO()
    factories.draw_picture(0).save(picture, "PNG")
    write_foreign(tmp_path / "a.tar", [("1.png", picture.getvalue()), ("1.txt", b"a dog")])
    imported = RunDir.create(tmp_path / "imported")
    import_shards([str(tmp_path / "a.tar")], imported)
    with pytest.raises(UsageError, match="was imported, not downloaded"):
        retry(imported, [], SETTINGS)
    run = RunDir.create(tmp_path / "run")
    download(str(site.write_table(tmp_path / "urls.parquet")), run, SETTINGS)
    run.stage_file("shards", "00001").unlink()
    with pytest.raises(CapfiltError, match="3 of 4 shards are there"):
        retry(run, [], SETTINGS)


def test_from_the_command_line(site: Site, tmp_path: Path) -> None:
    table, run = site.write_table(tmp_path / "urls.parquet"), tmp_path / "run"
    options = ("--allow-private-addresses", "--num-processes", 1, "--timeout", 3)
    assert capfilt("download", table, run, "--samples-per-shard", 10, *options).code == 0
    site.mended = NUM_ROWS
    done = capfilt("retry", run, "--reason", "server_error", "--reason", "timeout", *options)
    assert done.code == 0, done.err
    assert f"Tried {len(BUSY)} URLs again: {len(BUSY)} succeeded, in 1 new shard" in done.out
    assert f"Next: capfilt run capfilt {run}" in done.err
    found = capfilt("retry", run, *options, "--json").json()
    assert (found["num_tried"], found["num_new_shards"]) == (0, 0)
    assert capfilt("verify", run, "--deep").code == 0
    assert capfilt("retry", run, "--reason", "nonsense").code == 2
