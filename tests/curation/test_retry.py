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

from capfilt.curation.annotate import annotate
from capfilt.curation.download import download
from capfilt.curation.import_shards import import_shards
from capfilt.curation.retry import retry
from capfilt.curation.selection import reselect
from capfilt.data import retries
from capfilt.data.commit import read_commit_record, read_table
from capfilt.data.manifest import read_manifest
from capfilt.data.retries import (
    RETRY_OF,
    LastAttempts,
    is_retry,
    needs_stages,
    planned_shards,
    retry_shards,
    stage_shards,
)
from capfilt.data.rundir import RunDir
from capfilt.data.sealed import read_sealed, sealed_bytes
from capfilt.data.shards import read_samples
from capfilt.data.verify import verify_run
from capfilt.errors import CapfiltError, UsageError
from capfilt.report.stats import compute_stats
from capfilt.settings import DownloadSettings
from tests import factories
from tests.cli.conftest import capfilt
from tests.curation.small_runs import make_run, save_models
from tests.curation.test_import_shards import write_foreign

SETTINGS = DownloadSettings(
    allow_private_addresses=True, samples_per_shard=6, num_processes=1, num_threads=4, timeout_seconds=3.0
)
NUM_ROWS = 20


class Site:
    """Rows 0, 3, 6, … are there; 1, 4, 7, … fail until they are mended; 2, 5, 8, … are not found."""

    def __init__(self) -> None:
        self.mended = 0
        """Rows below it no longer fail."""
        self.asked: Counter[int] = Counter()
        site, picture = self, io.BytesIO()
        factories.draw_picture(3).save(picture, "JPEG")

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                number = int(self.path.strip("/"))
                site.asked[number] += 1
                status = {0: 200, 1: 200 if number < site.mended else 500, 2: 404}[number % 3]
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
    last = LastAttempts(run)
    for shard in run.shard_names():
        rows = read_table(run.stage_file("shards", shard))
        left, others = (numbers_of(table) for table in (last.of(shard, rows), last.others(shard, rows)))
        assert others == [n for n in numbers_of(rows) if shard in planned_shards(run) and n in BUSY]
        assert sorted(left + others) == sorted(numbers_of(rows))


def test_planned_shards_are_known_by_few_records(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same as by reading all of them: with attempts, in the middle of a download, without the first shard."""
    run = RunDir.create(tmp_path / "run")
    download(str(site.write_table(tmp_path / "urls.parquet")), run, SETTINGS)
    retry(run, ["server_error"], SETTINGS)
    retry(run, ["server_error"], SETTINGS)
    assert len(retry_shards(run)) >= 2
    for removed in ("", "00001", "00000"):
        if removed:
            run.stage_file("shards", removed).unlink()
        records = {name: read_commit_record(run.stage_file("shards", name)) for name in run.shard_names()}
        of_attempts = [name for name, record in records.items() if is_retry(record)]
        assert retry_shards(run) == of_attempts
        assert planned_shards(run) == [name for name in records if name not in of_attempts]
        assert stage_shards(run) == [name for name, record in records.items() if needs_stages(record)]
    run = make_run(tmp_path / "long", num_shards=30, num_samples=1)
    read = Counter[str]()
    monkeypatch.setattr(
        retries, "read_commit_record", lambda path: read.update([path.stem]) or read_commit_record(path)
    )
    assert len(stage_shards(run)) == 30
    assert read.total() == 1


def numbers_of(rows: pa.Table) -> list[int]:
    return [int(url.rpartition("/")[2]) for url in rows["url"].to_pylist()]


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


def test_a_shard_downloaded_anew_leaves_out_what_was_retried(site: Site, tmp_path: Path) -> None:
    """Its rows that succeed now would else be in the run twice."""
    run, table = RunDir.create(tmp_path / "run"), site.write_table(tmp_path / "urls.parquet")
    download(str(table), run, SETTINGS)
    site.mended = NUM_ROWS
    retry(run, ["server_error"], SETTINGS)
    for path in (run.stage_file("shards", "00001"), run.tar_path("00001")):
        path.unlink()
    site.asked = Counter()
    again = download(str(table), run, SETTINGS)
    assert set(site.asked) == {n for n in range(6, 12) if n not in BUSY}
    assert list(numbers_with(run, ["00001"]).values()) == [None, "retried", "not_found"] * 2
    assert (again.num_succeeded, again.failures) == (NUM_ROWS - len(MISSING), {"not_found": len(MISSING)})
    report = verify_run(run, deep=True)
    assert (report.findings, report.unfinished) == ([], [])

    for shard in retry_shards(run):  # and where those are lost, they are tried again
        for path in (run.stage_file("shards", shard), run.tar_path(shard)):
            path.unlink()
    assert retry(run, [], SETTINGS).num_succeeded == len(BUSY)
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


def test_ports_are_the_runs(site: Site, tmp_path: Path) -> None:
    run, table = RunDir.create(tmp_path / "run"), tmp_path / "urls.txt"
    table.write_text("http://127.0.0.1:8081/a.jpg\nhttp://127.0.0.1:82/a.jpg\n")
    settings = replace(SETTINGS, allow_private_addresses=False, ports=(8081,))
    download(str(table), run, settings)
    tried = retry(run, ["blocked_address", "bad_port"], replace(settings, ports=(80, 443)))
    assert tried.failures == {"blocked_address": 1, "bad_port": 1}


def test_what_an_attempt_left_without_a_record_is_removed(site: Site, tmp_path: Path) -> None:
    run = RunDir.create(tmp_path / "run[1]")  # no pattern
    download(str(site.write_table(tmp_path / "urls.parquet")), run, SETTINGS)
    site.mended = NUM_ROWS
    retry(run, [], SETTINGS)
    first, second = retry_shards(run)
    run.stage_file("shards", first).unlink()
    assert verify_run(run).exit_code == 1
    done = len(numbers_with(run, [second]))
    assert retry(run, [], SETTINGS).num_succeeded == len(BUSY) - done
    assert not run.tar_path(first).exists()
    assert verify_run(run, deep=True).exit_code == 0


def test_a_run_stays_whole_where_nothing_succeeds(site: Site, tmp_path: Path) -> None:
    """The attempt's shards have no image, and need no captions and scores."""
    run, models = RunDir.create(tmp_path / "run"), save_models(tmp_path / "models")
    download(str(site.write_table(tmp_path / "urls.parquet")), run, SETTINGS)
    stages = {"caption": models.caption(), "rank": models.rank(), "filter": models.filter()}
    annotate(run, ["captions", "clip", "itm", "manifest"], **stages)
    num_pairs = read_manifest([run]).num_rows
    assert retry(run, ["server_error"], SETTINGS).num_succeeded == 0
    stats = compute_stats(run)
    assert stats.expected_by_stage == stats.shards_by_stage  # as `verify` says: complete
    assert read_manifest([run]).num_rows == num_pairs > 0
    reselect(run, threshold=0.3)
    assert verify_run(run, deep=True).exit_code == 0
    site.mended = NUM_ROWS
    retry(run, ["server_error"], SETTINGS)
    with pytest.raises(CapfiltError, match="lacks 2 of 6 shards"):
        read_manifest([run])
    annotate(run, ["captions", "clip", "itm"], **stages)
    reselect(run, threshold=0.3)
    assert read_manifest([run]).num_rows > num_pairs
    assert verify_run(run, deep=True).exit_code == 0


def test_what_cannot_be_tried(site: Site, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no reason 'time-out'\. Did you mean timeout"):
        retry(RunDir.create(tmp_path / "empty"), ["time-out"], SETTINGS)
    with pytest.raises(UsageError, match="bad_caption fail again"):
        retry(RunDir.create(tmp_path / "empty"), ["timeout", "bad_caption"], SETTINGS)
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
    with pytest.raises(UsageError, match="Give --allow-private-addresses again"):
        retry(run, [], replace(SETTINGS, allow_private_addresses=False))
    run.stage_file("shards", "00001").unlink()
    half = capfilt("stats", run.path)
    assert "shards 3/4" in half.out
    assert "The download has not ended" in half.err
    with pytest.raises(CapfiltError, match="3 of 4 shards are there"):
        retry(run, [], SETTINGS)


def test_from_the_command_line(site: Site, tmp_path: Path) -> None:
    table, run = site.write_table(tmp_path / "urls.parquet"), tmp_path / "run"
    options = ("--allow-private-addresses", "--num-processes", 1, "--timeout", 3)
    done = capfilt("download", table, run, "--samples-per-shard", 10, *options)
    assert done.code == 0, done.err
    assert f"{len(BUSY)} failures may pass: capfilt retry {run} --allow-private-addresses asks again." in done.err
    site.mended = NUM_ROWS
    done = capfilt("retry", run, "--reason", "server_error", "--reason", "timeout", *options)
    assert done.code == 0, done.err
    assert f"Tried {len(BUSY)} URLs again: {len(BUSY)} succeeded, in 1 new shard" in done.out
    assert f"Next: capfilt run RECIPE {run}" in done.err
    found = capfilt("retry", run, *options, "--json").json()
    assert (found["num_tried"], found["num_new_shards"]) == (0, 0)
    assert capfilt("verify", run, "--deep").code == 0
    assert capfilt("retry", run, "--reason", "nonsense").code == 2
