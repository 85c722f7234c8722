"""Row 4: the downloading process is killed and its command given again at once, many times over.

What the dead one left (worker processes, half-written shards, a lock) must not meet what the next one does.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from capfilt.data.rundir import RunDir
from capfilt.data.shards import read_samples
from capfilt.data.verify import verify_run
from capfilt.world.site import SiteSettings, WorldSite
from tests.cli.conftest import capfilt_process
from tests.curation.downloads import command_of, rows_of, wait_for, workers_of
from tests.stress.conftest import FULL, Figure

NUM_RESTARTS, NUM_URLS = (20, 2400) if FULL else (2, 240)
ROWS_OF_A_SHARD = 12

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="processes are found in Linux's /proc")


def stop_amid(process: subprocess.Popen[str], is_amid: Callable[[], Any]) -> None:
    """Stop a process in the next moment in which it is amid something; where it ended first, the test fails."""
    while True:
        wait_for(is_amid)
        os.kill(process.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        assert process.poll() is None, "the download was over before it could be killed"
        if is_amid():
            return
        os.kill(process.pid, signal.SIGCONT)


def test_killed_and_restarted_at_once(tmp_path: Path, figure: Figure) -> None:
    rng, path = random.Random(4), tmp_path / "run"
    with WorldSite(SiteSettings(num_urls=NUM_URLS, behaviour_shares={"not_found": 0.1, "truncated": 0.1})) as site:
        table, truth = site.write_table(tmp_path / "urls.parquet"), list(site.rows())
        command = (
            "download", table, path, "--samples-per-shard", ROWS_OF_A_SHARD, "--num-threads", 2,
            "--allow-private-addresses",
        )  # fmt: skip
        num_orphans = num_half_done = 0
        for _ in range(NUM_RESTARTS):
            parent = capfilt_process(*command)
            at_work = f".staging/{parent.pid}-*/*/current"  # of this parent, not of one killed before
            wait_for(lambda at_work=at_work: list(path.glob(at_work)))
            time.sleep(rng.uniform(0, 0.3))
            stop_amid(parent, lambda at_work=at_work: list(path.glob(at_work)))
            workers = workers_of(parent.pid)
            os.kill(parent.pid, signal.SIGKILL)  # its workers are in the middle of a shard
            num_orphans += any(command_of(pid) for pid in workers)
            assert parent.wait() == -signal.SIGKILL
            num_half_done += bool(list(path.glob(at_work)))
            parent.communicate()
        last = capfilt_process(*command)
        _, said = last.communicate(timeout=300)
        assert last.returncode == 0, said
    run = RunDir.open(path)
    found = rows_of(run)
    assert [(row["url"], row["reason"]) for row in found] == [(row.url, row.reason) for row in truth]
    assert verify_run(run, deep=True).exit_code == 0
    assert not any((path / ".staging").iterdir())
    num_pictures = sum(1 for name in run.shard_names() for _ in read_samples(run, name))
    assert num_pictures == sum(row.reason is None for row in truth)
    assert num_half_done == NUM_RESTARTS
    figure(4, f"killed {NUM_RESTARTS} times ({num_half_done} amid shards, {num_orphans} times workers were still alive "
              f"right after) and restarted at once: {num_pictures:,} of {num_pictures:,} pictures "
              "read, 0 corrupt")  # fmt: skip
