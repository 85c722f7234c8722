"""The run directory: paths, generations, the lock between processes, staging that dies with its process."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from capfilt.data.rundir import RunDir
from capfilt.errors import CorruptionError, RunLockedError, UsageError

HOLD = """
import sys, time
from capfilt.data.rundir import RunDir
run = RunDir.open(sys.argv[1])
with run.lock(), run.new_staging() as staging:
    (staging / "half").write_text("half of a file")
    print("held", flush=True)
    time.sleep(60)
"""


def test_create_is_repeatable_and_open_says_what_is_wrong(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path / "a" / "b")
    made = (run.path / "run.json").read_text()
    assert RunDir.create(run.path).path == run.path
    assert (run.path / "run.json").read_text() == made
    with pytest.raises(UsageError, match="no run.json"):
        RunDir.open(tmp_path)
    with pytest.raises(UsageError, match="there is no such folder"):
        RunDir.open(tmp_path / "none")
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="is a file; expected a run, which is a folder"):
        RunDir.open(tmp_path / "file")
    (run.path / "run.json").write_text(json.dumps({"format_version": 99}))
    with pytest.raises(UsageError, match="format version 99"):
        RunDir.open(run.path)
    (run.path / "run.json").write_text("{")
    with pytest.raises(CorruptionError, match="is damaged") as damage:
        RunDir.open(run.path)
    found = re.search(r"write (\{.*\}) into it", str(damage.value))
    assert found
    (run.path / "run.json").write_text(found[1])
    assert RunDir.open(run.path).path == run.path, "as it is advised"
    with pytest.raises(UsageError, match="is a file"):
        RunDir.create(tmp_path / "file")


@pytest.mark.parametrize("name", ["", "a/b", "..", ".x", "a b", "ä", "x" * 65])
def test_generation_names_are_plain(tmp_path: Path, name: str) -> None:
    RunDir.create(tmp_path)
    with pytest.raises(UsageError, match="generation"):
        RunDir.open(tmp_path, generation=name)


def test_a_generation_reads_what_it_lacks_from_the_default(
    make_run: Callable[..., RunDir], stages: SimpleNamespace
) -> None:
    run = make_run(1)
    other = RunDir.open(run.path, generation="warm")
    assert other.stage_file("shards", "00000") == run.stage_file("shards", "00000")
    assert other.read_file("captions", "00000") == run.stage_file("captions", "00000")
    assert other.read_file("manifest", "00000") != run.stage_file("manifest", "00000")
    assert (other.committed("clip"), other.committed("manifest")) == (["00000"], [])
    stages.captions(other, seed=1)
    assert other.read_file("captions", "00000").parent.name == "captions@warm"
    assert other.read_quarantine_file("captions", "00000").name == "captions@warm-00000.parquet"
    assert run.generations() == ["warm"]


def test_scores_of_other_captions_are_not_read_with_those_of_a_generation(
    make_run: Callable[..., RunDir], stages: SimpleNamespace
) -> None:
    run = make_run(2)
    other = RunDir.open(run.path, generation="warm")
    stages.captions(other, "00000", seed=1)
    assert (other.committed("clip"), other.committed("itm")) == (["00001"], ["00001"])
    assert not other.read_file("clip", "00000").exists()
    stages.clip(other, "00000")
    assert (other.committed("clip"), other.committed("itm")) == (["00000", "00001"], ["00001"])
    assert other.read_file("clip", "00001") == run.stage_file("clip", "00001")


def test_the_second_process_is_refused_and_named_the_first(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path / "run")
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(run.path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(RunLockedError, match=f"process {holder.pid}"), run.lock():
            pass
        attempts = list((run.path / ".staging").iterdir())
        assert len(attempts) == 1
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        assert holder.stdout is not None
        holder.stdout.close()
    assert attempts[0].exists()
    with run.lock():
        assert (run.path / ".lock").read_text() == f"{os.getpid()}\n"
        assert not attempts[0].exists()
        with run.lock():  # a command may lock again in its parts
            pass
        assert (run.path / ".lock").read_text() == f"{os.getpid()}\n"


def test_staging_of_the_living_is_left_alone(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path / "run")
    with run.new_staging() as staging:
        (staging / "file").touch()
        with run.lock():
            assert (staging / "file").exists()
    assert not staging.exists()


def test_only_numbered_files_are_shards(make_run: Callable[..., RunDir]) -> None:
    run = make_run(2)
    for name in ("x.parquet", "00002.tar", "00003_stats.json", "12.parquet"):
        (run.path / "shards" / name).touch()
    (run.path / "shards" / "100000.parquet").touch()
    assert run.shard_names() == ["00000", "00001", "100000"]
