"""Rows 1, 2 and 21: killed anywhere, and again while it goes on; two commands at one run.

Row 1: SIGKILL at random moments of curation, which is one process; the manifest is that of an undisturbed run, byte by
byte. Row 2: death before every call that touches the disk, and in the resumption again.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import random
import shutil
import signal
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import psutil
import pytest
import torch

from capfilt.curation.annotate import annotate
from capfilt.data.commit import file_sha256
from capfilt.data.rundir import RunDir
from capfilt.data.verify import verify_run
from capfilt.errors import RunLockedError
from capfilt.progress import NullProgress, Progress
from tests.curation.small_runs import Models, make_run, save_models
from tests.data.test_commit import die_at, in_child
from tests.stress.conftest import FULL, Figure
from tests.stress.lives import COMMITS

ALL = ("captions", "clip", "itm", "manifest")
ENDED, DIED = 0, 9
"""Status of a child that did its work, and of one that `die_at` ended."""
NUM_KILLS, NUM_SHARDS, NUM_SAMPLES = (200, 20, 50) if FULL else (12, 4, 10)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return save_models(tmp_path_factory.mktemp("models"))


class StopsInTheMiddle(NullProgress):
    """Stops its own process, as SIGSTOP does, once the first images are done."""

    def __init__(self) -> None:
        self._stopped = False

    def advance(self, n: int = 1, /, *, already: bool = False, **fields: object) -> None:
        """Stops there."""
        if not self._stopped:
            self._stopped = True
            os.kill(os.getpid(), signal.SIGSTOP)


def work(path: Path, models: Models, progress: Progress | None = None) -> None:
    torch.set_num_threads(1)  # the parent's threads are not in the child
    caption = models.caption(num_captions=2, min_length=3, max_length=6, batch_size=8)
    settings = caption, models.rank(batch_size=8), models.filter(batch_size=8)
    annotate(RunDir.open(path), ALL, *settings, progress=progress)


def start(path: Path, models: Models, progress: Progress | None = None) -> BaseProcess:
    child = multiprocessing.get_context("fork").Process(target=work, args=(path, models, progress))
    child.start()
    return child


def stage_files(path: Path) -> dict[str, str]:
    return {str(file.relative_to(path)): file_sha256(file) for file in sorted(path.glob("*/*.parquet"))}


def test_killed_at_random_moments(models: Models, tmp_path: Path, figure: Figure) -> None:
    rng = random.Random(1)
    template = make_run(tmp_path / "template", num_shards=NUM_SHARDS, num_samples=NUM_SAMPLES)
    undisturbed = Path(shutil.copytree(template.path, tmp_path / "undisturbed"))
    began = time.monotonic()
    child = start(undisturbed, models)
    child.join()
    assert child.exitcode == 0
    seconds, expected = time.monotonic() - began, stage_files(undisturbed)
    num_killed = num_runs = 0
    while num_killed < NUM_KILLS:
        path = Path(shutil.copytree(template.path, tmp_path / f"run{num_runs}"))
        num_runs += 1
        for _ in range(10):
            child = start(path, models)
            child.join(rng.uniform(0, seconds / 3))
            assert child.exitcode is not None or not psutil.Process(child.pid).children(recursive=True)
            child.kill()
            child.join()
            num_killed += child.exitcode == -signal.SIGKILL
        work(path, models)
        assert stage_files(path) == expected
        assert not any((path / ".staging").iterdir())
        assert verify_run(RunDir.open(path), deep=True).exit_code == 0
        shutil.rmtree(path)
    figure(1, f"{num_killed} SIGKILLs in {num_runs} runs of {NUM_SHARDS} shards x {NUM_SAMPLES}: equal byte by byte")


@pytest.mark.parametrize("stage", COMMITS)
def test_death_at_every_call_and_again_in_the_resumption(tmp_path: Path, stage: str, figure: Figure) -> None:
    before = RunDir.create(tmp_path / "before")
    for _, commit in itertools.takewhile(lambda item: item[0] != stage, COMMITS.items()):
        commit(before)
    whole = RunDir(Path(shutil.copytree(before.path, tmp_path / "whole")))
    COMMITS[stage](whole)
    expected = stage_files(whole.path)

    def go_on(run: RunDir) -> None:
        with run.lock():
            if not run.stage_file(stage, "00000").exists():
                COMMITS[stage](run)

    num_deaths = 0
    for first in itertools.count(step=1 if FULL else 5):
        for second in itertools.count(step=4 if FULL else 9):
            run = RunDir(Path(shutil.copytree(before.path, tmp_path / "run")))
            statuses = [
                in_child(lambda run=run: go_on(run), lambda n=number: die_at(n, halfway=False))
                for number in (first, second)
            ]
            assert set(statuses) <= {ENDED, DIED}, "an error is neither"
            died, again = (status == DIED for status in statuses)
            num_deaths += died + again
            go_on(run)
            assert stage_files(run.path) == expected
            report = verify_run(run, deep=True)
            unfinished = {finding.stage for finding in report.unfinished}
            assert (report.findings, unfinished) == ([], {"manifest"} if stage == "itm" else set()), "which is due then"
            shutil.rmtree(run.path)
            if not again:
                break
        if not died:
            break
    assert num_deaths > 10
    figure(2, f"{stage}: {num_deaths:,} deaths before calls that touch the disk, at work and resuming: all recovered")


def test_two_commands_at_one_run(models: Models, tmp_path: Path, figure: Figure) -> None:
    run = make_run(tmp_path / "run", num_shards=3, num_samples=12)
    first = start(run.path, models, StopsInTheMiddle())
    process = psutil.Process(first.pid)
    try:
        deadline = time.monotonic() + 60
        while process.status() != psutil.STATUS_STOPPED and time.monotonic() < deadline:
            time.sleep(0.005)
        assert process.status() == psutil.STATUS_STOPPED
        with pytest.raises(RunLockedError, match=f"in use by process {first.pid}"):
            work(run.path, models)
    finally:
        process.resume()
        first.join()
    assert first.exitcode == 0
    assert verify_run(run, deep=True).exit_code == 0
    figure(21, "a second command was refused with the first one's process id; the run is whole")
