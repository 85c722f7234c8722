"""Downloads from real servers on loopback, with worker processes that are killed, stopped and orphaned."""

from __future__ import annotations

import functools
import http.server
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from capfilt.curation import supervision
from capfilt.curation.download import download, download_fields
from capfilt.curation.supervision import Attempts
from capfilt.data.commit import read_commit_record, read_quarantine
from capfilt.data.rundir import RunDir
from capfilt.data.shards import read_samples
from capfilt.errors import CapfiltError, FingerprintMismatchError, RunLockedError, UsageError
from capfilt.settings import DownloadSettings
from capfilt.world.scenes import render
from capfilt.world.site import SiteSettings, Truth, WorldSite
from capfilt.world.web_servers import BEHAVIOURS
from tests.curation.downloads import Download, command_of, rows_of, wait_for, workers_of

SETTINGS = DownloadSettings(
    allow_private_addresses=True, samples_per_shard=50, num_processes=1, num_threads=8, timeout_seconds=3.0
)
ALL_BEHAVIOURS = SiteSettings(
    num_urls=120, behaviour_shares={**dict.fromkeys(BEHAVIOURS, 1 / 30), "hang": 1 / 120, "drip": 1 / 120}
)
SLOW = SiteSettings(num_urls=40, behaviour_shares={"hang": 0.1})


# --- one download of everything -----------------------------------------------------------------------------


class _Done:
    """A finished download of a site with every behaviour, looked at by many tests."""

    def __init__(self, folder: Path) -> None:
        with WorldSite(ALL_BEHAVIOURS) as site:
            self.truth = list(site.rows())
            rows = [(row.url, row.web_caption) for row in self.truth] + [
                (None, "no address"),
                ("ftp://x/y", "odd"),
            ]
            self.table = folder / "urls.parquet"
            columns = {
                "url": [url for url, _ in rows],
                "text": pa.array([text for _, text in rows], pa.string()),
                "score": [float("nan"), *np.linspace(0, 1, len(rows) - 1)],
                "at": pa.array([0] * len(rows), pa.timestamp("ms")),
            }
            pq.write_table(pa.table(columns), self.table)
            self.run = RunDir.create(folder / "run")
            self.summary = download(str(self.table), self.run, SETTINGS)
        self.rows = rows_of(self.run)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> _Done:
    return _Done(tmp_path_factory.mktemp("download"))


def test_every_row_is_accounted_for_with_the_right_reason(done: _Done) -> None:
    expected = [row.reason for row in done.truth] + ["bad_url", "bad_scheme"]
    assert [row["reason"] for row in done.rows] == expected
    assert [row["url"] for row in done.rows] == [row.url for row in done.truth] + [None, "ftp://x/y"]
    assert [row["key"] for row in done.rows[:2]] == ["0000000", "0000001"]
    assert [row["key"] for row in done.rows[50:52]] == ["0000100", "0000101"]  # img2dataset's keys
    assert done.run.shard_names() == ["00000", "00001", "00002"]
    for row in done.rows:
        assert (row["status"] == "success") == (row["reason"] is None) == (row["error_message"] is None)
    assert done.summary.num_rows == len(done.rows)
    assert done.summary.num_succeeded == expected.count(None)
    assert done.summary.failures == Counter(reason for reason in expected if reason is not None)
    assert f"{expected.count(None)} of 122 URLs in 3 shards" in done.summary.line()


def test_failures_are_in_quarantine_too(done: _Done) -> None:
    quarantined = [
        row for name in done.run.shard_names() for row in read_quarantine(done.run, "shards", name).to_pylist()
    ]
    failed = [row for row in done.rows if row["reason"] is not None]
    assert [(row["key"], row["reason"]) for row in quarantined] == [(row["key"], row["reason"]) for row in failed]
    for row in quarantined:
        assert row["detail"]
        assert (row["bytes"] is not None) == (row["reason"] in ("truncated_image", "not_an_image"))
    for name in done.run.shard_names():
        record = read_commit_record(done.run.stage_file("shards", name))
        assert record.rows_in == record.rows_kept + record.rows_quarantined


def test_captions_and_carried_columns_come_along(done: _Done) -> None:
    assert [row["caption"] for row in done.rows[:120]] == [row.web_caption or "" for row in done.truth]
    assert [row["score"] for row in done.rows[:2]] == [None, 0.0]
    assert done.summary.notes == (
        "column 'at' is left out: it holds timestamp[ms]; text, numbers and truth values are carried",
    )
    assert "at" not in done.rows[0]


def test_pictures_are_upright_and_right(done: _Done) -> None:
    truth = {row.url: row for row in done.truth}
    seen: Counter[str] = Counter()
    for name in done.run.shard_names():
        for sample in read_samples(done.run, name):
            row = truth[sample.url]
            picture = Image.open(io.BytesIO(sample.image))
            assert (picture.format, picture.mode, picture.getexif().get(0x0112)) == ("JPEG", "RGB", None)
            assert picture.size == (sample.width, sample.height) == (row.width_px, row.height_px)
            painted = Image.fromarray(render(row.scene, row.width_px, row.height_px))
            coarse = (np.asarray(i.resize((12, 12), Image.Resampling.BOX), dtype=int) for i in (picture, painted))
            assert np.abs(np.subtract(*coarse)).mean() < 5, row.behaviour
            seen[row.behaviour] += 1
    assert {"plain", "redirect", "rotated", "deep", "cmyk", "palette", "alpha", "wrong_type"} <= set(seen)


def test_plain_jpegs_keep_their_bytes(done: _Done) -> None:
    site = WorldSite(ALL_BEHAVIOURS, port=int(done.truth[0].url.split(":")[2].split("/")[0]))
    truth = {row.url: row for row in done.truth}
    kept = 0
    for sample in read_samples(done.run, "00000"):
        row = truth[sample.url]
        if row.behaviour in ("plain", "redirect", "wrong_type") and row.ending == "jpg":
            assert sample.image == site.picture(row)
            kept += 1
    assert kept > 5


def test_tars_are_as_img2dataset_writes_them(done: _Done) -> None:
    succeeded = [row for row in done.rows if row["status"] == "success"]
    names: list[str] = []
    for name in done.run.shard_names():
        with tarfile.open(done.run.tar_path(name)) as tar:
            names += tar.getnames()
            first = tar.extractfile(names[-1])
            assert first is not None
            meta = json.load(first)
            row = next(row for row in succeeded if row["key"] == meta["key"])
            assert {column: row[column] for column in meta} == meta
            assert {
                "url",
                "caption",
                "key",
                "status",
                "error_message",
                "width",
                "original_height",
                "score",
            } <= set(meta)
    assert names == [f"{row['key']}.{ending}" for row in succeeded for ending in ("jpg", "txt", "json")]


def test_second_run_does_nothing_and_says_so(done: _Done) -> None:
    before = {path: path.stat().st_mtime_ns for path in done.run.path.rglob("*.parquet")}
    summary = download(str(done.table), done.run, replace(SETTINGS, num_processes=2, timeout_seconds=9.0))
    assert summary.num_new_shards == 0
    assert summary.line().startswith("Nothing to download: ")
    assert summary.failures == done.summary.failures
    after = {path: path.stat().st_mtime_ns for path in done.run.path.rglob("*.parquet")}
    assert after == before


def test_other_table_or_settings_are_refused(done: _Done, tmp_path: Path) -> None:
    with pytest.raises(FingerprintMismatchError, match="image_size_px 512 -> 64"):
        download(str(done.table), done.run, replace(SETTINGS, image_size_px=64))
    with pytest.raises(FingerprintMismatchError, match="samples_per_shard 50 -> None"):
        download(str(done.table), done.run, replace(SETTINGS, num_shards=3))
    other = tmp_path / "other.parquet"
    pq.write_table(pq.read_table(done.table).slice(1), other)
    with pytest.raises(FingerprintMismatchError, match="table_sha256"):
        download(str(other), done.run, SETTINGS)


@pytest.mark.parametrize("name", ["max_body_bytes", "max_pixels", "max_aspect_ratio", "max_caption_bytes"])
def test_other_limits_are_another_download(name: str) -> None:
    other = replace(SETTINGS, **{name: getattr(SETTINGS, name) + 1})
    assert download_fields("0", other) != download_fields("0", SETTINGS)


def test_private_addresses_stay_open_to_the_end(done: _Done, tmp_path: Path) -> None:
    run = RunDir.open(shutil.copytree(done.run.path, tmp_path / "run"))
    run.stage_file("shards", "00001").unlink()
    with pytest.raises(UsageError, match="was begun with private addresses .* --allow-private-addresses again"):
        download(str(done.table), run, replace(SETTINGS, allow_private_addresses=False))
    assert run.shard_names() == ["00000", "00002"]


def test_usage_errors_come_before_any_work(done: _Done, tmp_path: Path) -> None:
    run = RunDir.create(tmp_path / "run")
    with pytest.raises(UsageError, match="Columns found: url, text, score, at.*--caption-column"):
        download(str(done.table), run, replace(SETTINGS, caption_column="alt"))
    with pytest.raises(UsageError, match="No table at"):
        download(str(tmp_path / "none.csv"), run, SETTINGS)
    assert run.shard_names() == []
    assert not list((run.path / ".staging").glob("*"))


# --- processes that die -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, list[Truth]]]:
    """The table of a site some of whose answers never come, and the truth about it."""
    with WorldSite(SLOW) as site:
        yield site.write_table(tmp_path_factory.mktemp("slow") / "t.jsonl"), list(site.rows())


def test_killed_and_stopped_workers_are_replaced(
    slow: tuple[Path, list[Truth]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervision, "SILENCE_SECONDS", 4.0)
    table, truth = slow
    run = RunDir.create(tmp_path / "run")
    work = Download(table, run, replace(SETTINGS, num_shards=2, image_size_px=60, num_processes=2))
    wait_for(lambda: len(list(run.path.glob(".staging/*/*/current"))) == 2)
    killed, stopped = workers_of(os.getpid())
    os.kill(killed, signal.SIGKILL)
    os.kill(stopped, signal.SIGSTOP)
    work.join(timeout=200)
    assert work.error is None
    assert not command_of(stopped)
    assert not list((run.path / ".staging").glob("*"))
    found = rows_of(run)
    assert [row["reason"] for row in found] == [row.reason for row in truth]
    assert [read_commit_record(run.stage_file("shards", name)).rows_in for name in run.shard_names()] == [
        20,
        20,
    ]
    for row, entry in zip(truth, found, strict=True):
        if row.reason is None:  # pictures above the size asked for are scaled down to it, aspect kept
            assert (entry["original_width"], entry["original_height"]) == (row.width_px, row.height_px)
            assert min(entry["width"], entry["height"]) == min(row.width_px, row.height_px, 60)
            assert entry["width"] / entry["height"] == pytest.approx(row.width_px / row.height_px, rel=0.03)


def test_shard_that_kills_every_worker_fails(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path / "run")
    # no answer ever comes: a picture that both workers were decoding would be blamed, and the shard go on without it
    with WorldSite(SiteSettings(num_urls=8, behaviour_shares={"hang": 1.0})) as site:
        work = Download(site.write_table(tmp_path / "t.jsonl"), run, SETTINGS)
        for attempt in range(2):
            wait_for(lambda attempt=attempt: list(run.path.glob(f".staging/*/*-{attempt}/current")))
            for worker in workers_of(os.getpid()):  # one of them may be of the attempt before, and just ending
                os.kill(worker, signal.SIGKILL)
        work.join(timeout=200)
    assert isinstance(work.error, CapfiltError)
    assert work.error.exit_code == 1
    assert "1 of 1 shards could not be downloaded" in str(work.error)
    assert "ended with signal SIGKILL" in str(work.error)
    assert run.shard_names() == []


_POISON = """
import os, signal
from PIL import Image
def poisoned_open(file, *arguments, open=Image.open, **options):
    if b"poison" in file.getvalue():
        os.kill(os.getpid(), signal.SIGSEGV)
    return open(file, *arguments, **options)
Image.open = poisoned_open
"""


def test_picture_that_kills_its_decoder_costs_its_row_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The workers' Python is given a decoder that dies on one picture, as a flaw in a real one would."""
    (tmp_path / "sitecustomize.py").write_text(_POISON)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    for name, comment in (("a", b""), ("b", b"poison"), ("c", b"")):
        Image.new("RGB", (20, 20)).save(tmp_path / f"{name}.jpg", comment=comment)
    handler = functools.partial(_QuietFiles, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        lines = "".join(f"http://127.0.0.1:{server.server_port}/{name}.jpg\n" for name in "abc")
        (tmp_path / "t.txt").write_text(lines)
        run = RunDir.create(tmp_path / "run")
        summary = download(str(tmp_path / "t.txt"), run, replace(SETTINGS, num_threads=1))
        server.shutdown()
    assert [row["reason"] for row in rows_of(run)] == [None, "worker_failed", None]
    assert summary.num_succeeded == 2


class _QuietFiles(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


_SCRIPT = """
import sys
from capfilt.curation.download import download
from capfilt.data.rundir import RunDir
from capfilt.settings import DownloadSettings
import json
download(sys.argv[1], RunDir.create(sys.argv[2]), DownloadSettings(**json.loads(sys.argv[3])))
"""


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGINT])
def test_no_orphan_outlives_the_parent(slow: tuple[Path, list[Truth]], tmp_path: Path, ending: int) -> None:
    table, truth = slow
    settings = {
        "allow_private_addresses": True,
        "samples_per_shard": 20,
        "num_processes": 2,
        "timeout_seconds": 3.0,
    }
    root = str(Path(supervision.capfilt.__file__).parents[1])
    parent = subprocess.Popen(
        [sys.executable, "-c", _SCRIPT, str(table), str(tmp_path / "run"), json.dumps(settings)],
        env={**os.environ, "PYTHONPATH": root},
        stderr=subprocess.DEVNULL,
    )
    try:
        run_path = tmp_path / "run"
        wait_for(lambda: list(run_path.glob(".staging/*/*/current")))
        workers = workers_of(parent.pid)
        assert len(workers) == 2
        os.kill(workers[0], signal.SIGSTOP)  # not even a stopped one may stay
        with pytest.raises(RunLockedError, match=str(parent.pid)):
            download(str(table), RunDir.open(run_path), DownloadSettings(**settings))
    finally:
        parent.send_signal(ending)
        assert parent.wait(timeout=20) != 0
    wait_for(lambda: not any(command_of(pid) for pid in workers), seconds=5)
    if ending == signal.SIGKILL:
        run = RunDir.open(run_path)
        download(str(table), run, DownloadSettings(**settings))
        assert [row["reason"] for row in rows_of(run)] == [row.reason for row in truth]
        assert not list((run_path / ".staging").glob("*"))


def test_a_row_that_kills_two_workers_is_blamed(tmp_path: Path) -> None:
    def attempt(row: int) -> Path:
        folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        (folder / "current").write_bytes(row.to_bytes(8, "little", signed=True))
        return folder

    poisoned = Attempts()
    poisoned.add("SIGSEGV", attempt(7))
    assert (poisoned.blamed_rows, poisoned.is_hopeless) == ([], False)
    poisoned.add("SIGSEGV", attempt(7))
    assert (poisoned.blamed_rows, poisoned.is_hopeless) == ([7], False)
    poisoned.add("SIGKILL", attempt(-1))
    assert not poisoned.is_hopeless
    poisoned.add("SIGKILL", tmp_path)
    assert poisoned.is_hopeless
    unlucky = Attempts()
    unlucky.add("SIGKILL", attempt(3))
    unlucky.add("SIGKILL", attempt(4))
    assert unlucky.is_hopeless
