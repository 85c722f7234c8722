"""Row 5: the processes that download are killed, crash, run out of memory or are stopped: retried, or failed in 30 s.

Each is done once, and the shards are whole; and whenever a worker is at work, and the command fails and says why.
"""

from __future__ import annotations

import os
import resource
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from capfilt.data.rundir import RunDir
from capfilt.data.verify import verify_run
from capfilt.errors import CapfiltError
from capfilt.settings import DownloadSettings
from capfilt.world.site import SiteSettings, Truth, WorldSite
from tests.curation.downloads import Download, children_of, rows_of, wait_for, workers_of
from tests.stress.conftest import FULL, Figure

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="processes are found in Linux's /proc")

SETTINGS = DownloadSettings(
    allow_private_addresses=True, num_shards=2, num_processes=2, num_threads=8, timeout_seconds=3.0
)
LONGEST_SECONDS = 30.0 if FULL else 120.0
"""The goal; where other tests compute beside it, only that it ends."""


def send(number: int) -> Callable[[int], None]:
    return lambda pid: os.kill(pid, number)


def take_memory(pid: int) -> None:
    """No allocation of this process succeeds from now on."""
    resource.prlimit(pid, resource.RLIMIT_AS, (1 << 20, 1 << 20))


HARMS = {
    "SIGKILL": send(signal.SIGKILL), "SIGSEGV": send(signal.SIGSEGV), "no memory": take_memory,
    "SIGSTOP": send(signal.SIGSTOP),
}  # fmt: skip
SAMPLE = list(HARMS) if FULL else ["SIGSEGV", "no memory"]


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, list[Truth]]]:
    """A site some of whose answers never come, so that a shard takes a while."""
    with WorldSite(SiteSettings(num_urls=40, behaviour_shares={"hang": 0.1})) as site:
        yield site.write_table(tmp_path_factory.mktemp("slow") / "t.parquet"), list(site.rows())


def wait_until_at_work(run: RunDir, number: int) -> list[int]:
    wait_for(lambda: len(list(run.path.glob(".staging/*/*/current"))) >= number)
    return workers_of(os.getpid())


def check_whole(run: RunDir, truth: list[Truth]) -> None:
    assert [row["reason"] for row in rows_of(run)] == [row.reason for row in truth]
    assert verify_run(run, deep=True).exit_code == 0
    assert not any((run.path / ".staging").iterdir())


@pytest.mark.parametrize("harm", SAMPLE)
def test_a_worker_once(slow: tuple[Path, list[Truth]], tmp_path: Path, harm: str, figure: Figure) -> None:
    run = RunDir.create(tmp_path / "run")
    work = Download(slow[0], run, SETTINGS)
    HARMS[harm](wait_until_at_work(run, 2)[0])
    began = time.monotonic()
    work.join(timeout=120)
    seconds = time.monotonic() - began
    assert work.error is None
    check_whole(run, slow[1])
    assert seconds < LONGEST_SECONDS
    figure(5, f"{harm} of a worker: its shard was downloaded again, {seconds:.0f} s later all was there")


@pytest.mark.parametrize("harm", SAMPLE)
def test_every_worker(slow: tuple[Path, list[Truth]], tmp_path: Path, harm: str, figure: Figure) -> None:
    run = RunDir.create(tmp_path / "run")
    work = Download(slow[0], run, replace(SETTINGS, num_shards=1, num_processes=1))
    harmed: set[int] = set()
    began = time.monotonic()
    while work.is_alive():
        if list(run.path.glob(".staging/*/*/current")):
            for pid in set(workers_of(os.getpid())) - harmed:
                with suppress(ProcessLookupError):
                    HARMS[harm](pid)
                if not harmed:
                    began = time.monotonic()
                harmed.add(pid)
        time.sleep(0.02)
        assert time.monotonic() - began < 120
    seconds = time.monotonic() - began
    if harm == "no memory" and work.error is None:  # what they held was enough: no picture may be called bad
        check_whole(run, slow[1])
        return
    assert isinstance(work.error, CapfiltError)
    assert work.error.exit_code == 1
    assert "1 of 1 shards could not be downloaded" in str(work.error)
    assert run.shard_names() == []
    assert seconds < LONGEST_SECONDS
    figure(5, f"{harm} of every worker: failed with exit code 1 after {seconds:.0f} s")
    again = Download(slow[0], run, replace(SETTINGS, num_shards=1, num_processes=1))
    again.join(timeout=120)
    assert again.error is None
    check_whole(run, slow[1])


@pytest.mark.parametrize("harm", ["SIGKILL", "SIGSTOP"] if FULL else ["SIGKILL"])
def test_the_process_that_starts_workers(
    slow: tuple[Path, list[Truth]], tmp_path: Path, harm: str, figure: Figure
) -> None:
    """Killed, its workers end with it; stopped, it is found out as soon as a worker is wanted of it.

    The worker often ends first: then the next one is asked of a process that is ending, which is no attempt.
    """
    run = RunDir.create(tmp_path / "run")
    work = Download(slow[0], run, SETTINGS)
    worker = wait_until_at_work(run, 2)[0]
    HARMS[harm](children_of(os.getpid())[0])
    began = time.monotonic()
    with suppress(ProcessLookupError):
        os.kill(worker, signal.SIGKILL)
    work.join(timeout=120)
    seconds = time.monotonic() - began
    assert work.error is None
    check_whole(run, slow[1])
    assert seconds < LONGEST_SECONDS
    figure(5, f"{harm} of the process that starts workers, and of a worker: all was there {seconds:.0f} s later")
