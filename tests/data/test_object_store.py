"""Runs on an object store, at a real S3 server on loopback; `tests/stress/test_object_stores.py` kills its clients."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import fsspec
import pytest

from capfilt.data import leases
from capfilt.data.commit import commit_stage, read_commit_record, read_table
from capfilt.data.paths import exists, path_of, put, tag_of
from capfilt.data.rundir import RunDir
from capfilt.data.sealed import sealed_bytes
from capfilt.data.shards import read_samples
from capfilt.data.verify import verify_run
from capfilt.errors import CommittedError, CorruptionError, RunLockedError, StoreError, UsageError
from tests.data import conftest as small
from tests.object_stores import Way, environment_for, forget_clients, objects_of, use_server

FULL = bool(os.environ.get("CAPFILT_STRESS"))


def test_a_run_is_the_same_as_on_a_disk(address: str, tmp_path: Path) -> None:
    runs = [RunDir.create(tmp_path / "run"), RunDir.create(address)]
    for run in runs:
        small.commit_all(run)
        small.commit_captions(RunDir(run.path, "other"), seed=2)
    disk, store = runs
    for stage in ("shards", "captions", "clip", "itm", "manifest"):
        assert store.committed(stage) == disk.committed(stage) == ["00000", "00001"]
        for shard in disk.committed(stage):
            assert read_table(store.stage_file(stage, shard)) == read_table(disk.stage_file(stage, shard))
            mine, theirs = (read_commit_record(run.stage_file(stage, shard)) for run in runs)
            assert mine == theirs
    assert store.generations() == disk.generations() == ["other"]
    assert RunDir(store.path, "other").committed("captions") == ["00000", "00001"]
    assert list(read_samples(store, "00001")) == list(read_samples(disk, "00001"))
    found, expected = verify_run(store, deep=True), verify_run(disk, deep=True)
    assert (found.findings, found.unfinished, found.counts) == ([], expected.unfinished, expected.counts)


def test_what_is_no_run_or_cannot_be_asked(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="is not a run"):
        RunDir.open(address)
    for named in (
        "ftp://host/run",
        "s3://",
        "s3://bucket/",
        "s3:/bucket/run",
        "gs:run",
        "s3://bucket/a/../b",
        "file:///tmp/run",
    ):
        with pytest.raises(UsageError, match="no place for a run"):
            path_of(named)
    run = RunDir.create(address)
    small.commit_shard(run)
    assert RunDir.open(address.replace("/run", "//run") + "//").shard_names() == ["00000"]
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # nobody answers there: not "it is not there"
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    forget_clients()
    for asked in (run.shard_names, lambda: exists(run.stage_file("captions", "00000")), lambda: RunDir.open(address)):
        with pytest.raises(StoreError, match="cannot be reached"):
            asked()


def test_damage_is_found_and_mended(address: str) -> None:
    run = RunDir.create(address)
    small.commit_all(run)
    list(read_samples(run, "00000"))  # a good copy of the tar is in the cache now
    store, tar = fsspec.filesystem("s3"), run.tar_path("00000").path
    whole = store.cat_file(tar)
    store.pipe_file(tar, whole[:700] + bytes([whole[700] ^ 1]) + whole[701:])
    assert verify_run(run).exit_code == 0  # its size is right; to look into it is `--deep`
    assert verify_run(run, deep=True).exit_code == 5
    store.pipe_file(tar, whole[:-1])
    assert verify_run(run).exit_code == 5
    store.rm_file(tar)
    assert "gone" in verify_run(run).findings[0].problem
    store.rm_file(run.stage_file("shards", "00000").path)
    small.commit_shard(run, num_shards=2)
    assert verify_run(run, deep=True).exit_code == 0
    captions = run.stage_file("captions", "00000").path
    store.pipe_file(captions, store.cat_file(captions)[:-5])
    with pytest.raises(CorruptionError, match="captions of shard 00000"):
        read_table(run.stage_file("captions", "00000"))
    store.pipe_file(captions, b"")
    with pytest.raises(CorruptionError, match="captions of shard 00000"):
        read_commit_record(run.stage_file("captions", "00000"))


@pytest.mark.parametrize("left_by", ["death after the tar", "record removed", "another tar"])
def test_a_tar_without_a_record_is_given_its_own_or_goes(address: str, left_by: str) -> None:
    run = RunDir.create(address)
    small.commit_shard(run, num_samples=4)
    store, root = fsspec.filesystem("s3"), str(run.path).removeprefix("s3://")
    record, sha256 = run.stage_file("shards", "00000"), read_commit_record(run.stage_file("shards", "00000")).extra
    content = store.cat_file(record.path)
    store.rm_file(record.path)
    if left_by == "death after the tar":
        store.pipe_file(f"{root}/.pending/00000-{sha256['tar_sha256']}.parquet", content)
        with pytest.raises(CommittedError):  # the attempt that put the tar counts
            small.commit_shard(run, num_samples=3)
        assert store.cat_file(record.path) == content
    else:
        if left_by == "another tar":
            store.pipe_file(f"{root}/.pending/00000-{'0' * 64}.parquet", content)
        small.commit_shard(run, num_samples=3)
        assert read_commit_record(record).rows_kept == 3
    with run.lock():
        assert not [name for name in objects_of(address) if name.startswith(".pending")]
    assert verify_run(run, deep=True).exit_code == 0


def holder_elsewhere(run: RunDir, beats: int = 1) -> None:
    """What a command of another machine has put."""
    fsspec.filesystem("s3").pipe_file(
        (run.path / ".lock" / "00000007").path, json.dumps({"host": "there", "pid": 4, "beats": beats}).encode()
    )


def test_one_command_at_a_time(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "LEASE_SECONDS", 2.0)
    monkeypatch.setattr(leases, "BEAT_SECONDS", 0.2)
    run = RunDir.create(address)
    script = "import sys; from capfilt.data.rundir import RunDir\nwith RunDir.open(sys.argv[1]).lock(): pass"
    command = [sys.executable, "-c", script, address]
    with run.lock(), run.lock():
        refused = subprocess.run(command, capture_output=True, text=True, check=False)
        assert f"in use by process {os.getpid()}" in refused.stderr
        time.sleep(0.5)  # the lease is kept
        small.commit_shard(run)
    assert subprocess.run(command, check=False).returncode == 0  # it is free
    holder_elsewhere(run)
    began = time.monotonic()
    with run.lock():  # it gave no sign of life for the whole time
        assert time.monotonic() - began >= 2.0
        holder_elsewhere(run, beats=2)  # it awakes, and changes nothing: the higher number counts
        small.commit_captions(run)
    assert verify_run(run).findings == []


def test_a_holder_elsewhere_that_beats_is_not_disturbed(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "LEASE_SECONDS", 5.0)
    monkeypatch.setattr(leases, "BEAT_SECONDS", 0.2)
    monkeypatch.setattr(leases, "_machine", lambda: None)
    run = RunDir.create(address)
    script = (
        "import sys, time; from capfilt.data import leases; from capfilt.data.rundir import RunDir\n"
        "leases.BEAT_SECONDS, leases._machine = 0.2, lambda: None\n"
        "with RunDir.open(sys.argv[1]).lock():\n    print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", script, address], stdout=subprocess.PIPE)
    try:
        assert holder.stdout is not None
        holder.stdout.readline()
        with pytest.raises(RunLockedError, match=f"process {holder.pid} of"), run.lock():
            pass
    finally:
        holder.kill()
        holder.communicate()


@pytest.fixture
def way(s3_port: int, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Way]:
    """This process is a client by that way."""
    found = Way(s3_port)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    use_server(found.port, tmp_path / "cache", monkeypatch)
    yield found
    found.close()


def test_who_cannot_say_that_it_lives_publishes_nothing(
    address: str, way: Way, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "LEASE_SECONDS", 1.0)
    monkeypatch.setattr(leases, "BEAT_SECONDS", 0.2)
    run = RunDir.create(address)
    lease = leases.take_lock(run.path / ".lock")
    way.cut_after = 0
    time.sleep(1.2)
    with pytest.raises(RunLockedError, match="held by nobody yet, but the store was not reached"):
        lease.seconds_left()
    way.cut_after = None
    assert lease.seconds_left() > 0  # nobody had noticed
    lease.release()
    with run.lock():
        small.commit_shard(run)
        fsspec.filesystem("s3").pipe_file((run.path / ".lock" / "00000009").path, b'{"beats": 1}')
        time.sleep(0.5)
        with pytest.raises(RunLockedError, match=r"held by a later command \(00000009\)"):
            small.commit_captions(run)
    assert run.committed("captions") == []


def test_a_store_that_does_not_answer_is_no_damage(address: str, way: Way) -> None:
    run = RunDir.create(address)
    small.commit_all(run)
    way.cut_after = 0
    with pytest.raises(StoreError, match="cannot be reached"):
        verify_run(run)
    for view in (run, RunDir(run.path, "other")):
        with pytest.raises(StoreError, match="cannot be reached"):
            view.shard_names()


def test_answers_that_are_lost_make_no_difference(address: str, way: Way) -> None:
    """The put was done; asked again, the store says that it is there already."""
    disk_like = RunDir.create(f"{address}-whole")
    small.commit_all(disk_like, num_shards=1)
    expected = objects_of(f"{address}-whole")
    for number in range(0, 60, 4):
        place = f"{address}-{number}"
        way.lost_answer = number
        run = RunDir.create(place)
        with run.lock():
            small.commit_all(run, num_shards=1)
        assert way.lost_answer is None
        assert objects_of(place) == expected


def test_a_store_without_exclusive_puts_is_refused(address: str, way: Way) -> None:
    run = RunDir.create(address)
    way.replaced = {b"If-None-Match": b"X-Not-Matched"}
    with pytest.raises(UsageError, match="was replaced by a put that was to replace nothing"), run.lock():
        pass
    condition = b"<Condition>If-None-Match</Condition>"
    way.replaced = {condition: b" " * len(condition)}  # not every server says it
    with run.lock():
        small.commit_shard(run)
    with pytest.raises(CommittedError):
        small.commit_shard(run)


def test_a_put_that_takes_too_long_does_not_arrive_later(address: str, way: Way) -> None:
    run = RunDir.create(address)
    way.seconds_per_piece = 0.3
    with pytest.raises(StoreError, match="TimeoutError"):
        put(run.path / "late", bytes(1 << 20), mode="overwrite", seconds=0.5)
    way.seconds_per_piece = 0.0
    time.sleep(3)
    assert not exists(run.path / "late")


def test_a_record_is_replaced_where_it_is_the_one_that_was_seen(address: str) -> None:
    run = RunDir.create(address)
    small.commit_shard(run)
    small.commit_captions(run)
    path = run.stage_file("captions", "00000")
    tag = tag_of(path)
    small.commit_captions(run, seed=1, replace=True)
    with pytest.raises(FileExistsError):
        put(path, b"older", mode="overwrite", in_place_of=tag)
    assert read_commit_record(path).fields == {"seed": 1}


def test_a_cache_that_refuses_is_named(address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunDir.create(address)
    small.commit_shard(run)
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("CAPFILT_CACHE_DIR", str(tmp_path / "file" / "cache"))
    for work in (lambda: list(read_samples(run, "00000")), lambda: verify_run(run, deep=True)):
        with pytest.raises(StoreError, match="file/cache/tars, where tars of object stores are kept, refuses"):
            work()


def test_digests_of_a_record_are_digests(address: str) -> None:
    run = RunDir.create(address)
    small.commit_shard(run)
    path = run.stage_file("shards", "00000")
    rows, record = read_table(path), asdict(read_commit_record(path))
    for hostile in ({"tar_sha256": "/../../../victim"}, {"tar_sha256": 5}, {"quarantine_seal": "x"}):
        record["extra"] |= hostile
        fsspec.filesystem("s3").pipe_file(path.path, sealed_bytes(rows, record))
        with pytest.raises(CorruptionError, match="has a digest that is none"):
            read_commit_record(path)


def test_a_bucket_that_is_not_there_is_said(address: str) -> None:
    with pytest.raises(StoreError, match="lies in a bucket that is not there"):
        RunDir.open("s3://nobody-has-this-bucket/run")


def test_a_lease_that_comes_too_late_is_none(address: str) -> None:
    run = RunDir.create(address)
    store, lock = fsspec.filesystem("s3"), run.path / ".lock"
    store.pipe_file((lock / "00000009").path, b'{"free": true}')
    with pytest.raises(FileExistsError):
        leases.Lease(lock / "00000005", lock, 5)
    assert not exists(lock / "00000005")


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b"junk", b'{"pid": "x", "beats": 1, "host": "\\u001b[2J"}'])
def test_what_is_no_lease_is_waited_for_once(address: str, content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "LEASE_SECONDS", 0.6)
    monkeypatch.setattr(leases, "BEAT_SECONDS", 0.2)
    run = RunDir.create(address)
    for name in (".lock/00000003", ".lock/odd", ".workers/odd"):
        fsspec.filesystem("s3").pipe_file((run.path / name).path, content)
    with run.lock():
        small.commit_shard(run)
    assert run.shard_names() == ["00000"]


def test_generations_keep_to_their_own_quarantines(address: str) -> None:
    run = RunDir.create(address)
    small.commit_shard(run, "00000", num_shards=2)
    small.commit_shard(run, "00001", num_shards=2)
    for name in ("exp-00001", "exp"):
        for shard in ("00000", "00001"):
            small.commit_captions(RunDir(run.path, name), shard, replace=True)
    assert verify_run(run).findings == []


def test_the_next_command_waits_for_all_workers_of_a_dead_one(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "LEASE_SECONDS", 1.5)
    run = RunDir.create(address)
    for number in range(8):
        worker = run.path / ".workers" / f"worker-{number}"
        content = json.dumps({"host": "there", "pid": 4, "beats": 1}).encode()
        fsspec.filesystem("s3").pipe_file(worker.path, content)
    began = time.monotonic()
    with run.lock():
        assert 1.5 <= time.monotonic() - began < 6.0
        assert not exists(worker)


def test_a_stage_is_not_committed_twice_and_quarantines_follow_their_record(address: str) -> None:
    run = RunDir.create(address)
    small.commit_shard(run)
    small.commit_captions(run)
    with pytest.raises(CommittedError):
        small.commit_captions(run)
    with pytest.raises(CommittedError):
        small.commit_shard(run)
    small.commit_captions(run, seed=1, replace=True)
    assert len([name for name in objects_of(address) if name.startswith("quarantine/captions")]) == 1
    rows = read_table(run.stage_file("captions", "00000"))
    commit_stage(
        run, "captions", "00000", rows, fields={"seed": 2}, input_digest="x", rows_in=2, replace=True,
    )  # fmt: skip
    assert not [name for name in objects_of(address) if name.startswith("quarantine/captions")]


def test_the_cache_keeps_to_its_bound(address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunDir.create(address)
    for number in range(6):
        small.commit_shard(run, f"{number:05d}", num_samples=5, num_shards=6)
    sizes = [int(read_commit_record(run.stage_file("shards", name)).extra["tar_bytes"]) for name in run.shard_names()]
    monkeypatch.setenv("CAPFILT_CACHE_BYTES", str(sum(sizes[:3]) + 1))
    for _ in range(2):
        for shard in run.shard_names():
            assert len(list(read_samples(run, shard))) == 5
            kept = list((tmp_path / "cache" / "tars").glob("*.tar"))
            assert sum(path.stat().st_size for path in kept) <= sum(sizes[:3]) + 1
    for shard in run.shard_names():
        fsspec.filesystem("s3").rm_file(run.tar_path(shard).path)
    assert len(list(read_samples(run, "00005"))) == 5  # among the last that were read: not fetched again
    with pytest.raises(CorruptionError, match="00000.tar is damaged at byte 0: the file is gone"):
        list(read_samples(run, "00000"))
    monkeypatch.setenv("CAPFILT_CACHE_BYTES", "much")
    with pytest.raises(UsageError, match="number of bytes"):
        list(read_samples(run, "00001"))


def test_environment_of_a_client_is_all_that_a_process_needs(s3_port: int, address: str, tmp_path: Path) -> None:
    small.commit_shard(RunDir.create(address))
    script = "import sys; from capfilt.data.rundir import RunDir; print(RunDir.open(sys.argv[1]).shard_names())"
    environment = {**os.environ, **environment_for(s3_port, tmp_path / "other")}
    done = subprocess.run(
        [sys.executable, "-c", script, address], capture_output=True, text=True, check=True, env=environment
    )
    assert done.stdout.strip() == "['00000']"
