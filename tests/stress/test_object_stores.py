"""Runs on an object store, at a real S3 server on loopback: clients killed, and taken for dead; slow and broken ways.

The figures are of row 2's kind: death before every call that changes the store, and of row 1's: at random moments.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from capfilt.data.rundir import RunDir
from capfilt.data.verify import verify_run
from capfilt.errors import CapfiltError
from tests.cli.conftest import capfilt_process
from tests.cli.test_on_object_stores import rows_of_stages, write_tars
from tests.curation.small_runs import save_models
from tests.object_stores import Way, forget_clients, objects_of, use_server
from tests.stress.conftest import FULL, Figure
from tests.stress.store_lives import DIED, REFUSED, live

NUM_KILLS = 20 if FULL else 3
STOPPED_CALLS = range(16) if FULL else (1, 2, 3)


def life(address: str, call: int, what: str, num_samples: int = 3) -> list[str]:
    """The command that lives it, in a process of its own."""
    return [sys.executable, "-m", "tests.stress.store_lives", address, str(call), what, str(num_samples)]


def test_killed_before_any_call_it_goes_on_to_the_same_run(address: str, figure: Figure) -> None:
    live(RunDir.create(f"{address}-whole"))
    expected = objects_of(f"{address}-whole")
    num_points = 0
    for call in range(0, 100, 1 if FULL else 3):
        ended = subprocess.run(life(f"{address}-{call}", call, "kill"), check=False).returncode
        assert ended in (0, DIED)
        if ended == 0:
            break
        num_points += 1
        live(RunDir.create(f"{address}-{call}"))  # at once: the dead process was of this machine
        run = RunDir.open(f"{address}-{call}")
        assert objects_of(f"{address}-{call}") == expected, call
        assert verify_run(run, deep=True).exit_code == 0
    assert num_points > (12 if FULL else 4)
    figure("on S3", f"death before {num_points} of the calls that change the store: the same run, object by object")


def test_clients_taken_for_dead_that_awake_do_no_harm(address: str, figure: Figure) -> None:
    """Each was stopped amid its commits; another did all of them meanwhile, with another tar."""
    for call in STOPPED_CALLS:
        place = f"{address}-{call}"
        stopped = subprocess.Popen(life(place, call, "stop", num_samples=4))
        assert os.WIFSTOPPED(os.waitpid(stopped.pid, os.WUNTRACED)[1])
        assert subprocess.run(life(place, 0, "patient", num_samples=3), check=False).returncode == 0
        before = objects_of(place)
        stopped.send_signal(signal.SIGCONT)
        # before its tar was put it had another one to publish; later it may find all of it done
        assert stopped.wait() in ([REFUSED] if 0 < call < 4 else [0, REFUSED])
        report = verify_run(RunDir.open(place), deep=True)
        assert (report.findings, report.unfinished) == ([], [])
        after = objects_of(place)
        assert {name: after.get(name) for name in before} == before
    figure("on S3", f"{len(STOPPED_CALLS)} clients stopped, taken for dead, and continued: nothing changed by them")


def test_a_slow_way_and_one_that_breaks(
    s3_port: int, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, figure: Figure
) -> None:
    live(RunDir.create(f"{address}-whole"))
    expected = objects_of(f"{address}-whole")
    way = Way(s3_port)
    try:
        use_server(way.port, tmp_path / "cache", monkeypatch)
        way.seconds_per_piece = 0.02
        live(RunDir.create(address))
        assert objects_of(address) == expected
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
        forget_clients()
        way.seconds_per_piece, way.cut_after = 0.0, 3_000  # in the middle of a tar
        with pytest.raises(CapfiltError, match="cannot be reached"):
            live(RunDir.create(f"{address}-broken"))
        assert way.num_cut > 1  # it was tried again
        way.cut_after = None
        live(RunDir.create(f"{address}-broken"))
        assert objects_of(f"{address}-broken") == expected
        figure(
            "on S3", f"{way.num_cut} uploads cut in the middle, every 64 kB 20 ms late: the same run, object by object"
        )
    finally:
        way.close()


def test_killed_at_any_time_it_goes_on_to_the_same_manifest(address: str, tmp_path: Path, figure: Figure) -> None:
    write_tars(tmp_path)
    (tmp_path / "small.toml").write_text(save_models(tmp_path / "models").recipe(num_captions=3))
    rng, num_killed = random.Random(0), 0
    for words in (("import", tmp_path / "*.tar"), ("run", tmp_path / "small.toml")):
        began = time.monotonic()
        process = capfilt_process(*words, tmp_path / "run")
        _, said = process.communicate()
        assert process.returncode == 0, said
        seconds, left = time.monotonic() - began, NUM_KILLS
        while True:
            process = capfilt_process(*words, address)
            try:
                _, said = process.communicate(timeout=rng.uniform(0.4, 1.4) * seconds if left else 100)
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
                left, num_killed = left - 1, num_killed + 1
                continue
            assert process.returncode == 0, said
            break
    assert num_killed > 0
    assert rows_of_stages(address) == rows_of_stages(tmp_path / "run")
    assert verify_run(RunDir.open(address), deep=True).exit_code == 0
    assert not [name for name in objects_of(address) if name.startswith(".")]
    figure("on S3", f"{num_killed} SIGKILLs of import and curation: the rows of an undisturbed run on a disk")
