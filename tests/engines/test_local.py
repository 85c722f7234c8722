"""Work on this machine: every shard once, in order, and few ahead of what was taken."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from capfilt.cli.engines import engine_from
from capfilt.curation.annotate import annotate
from capfilt.curation.selection import reselect
from capfilt.data.verify import verify_run
from capfilt.engines.base import SHARDS
from capfilt.engines.local import LocalEngine
from capfilt.errors import CapfiltError, UsageError
from capfilt.export.pairs import export_pairs
from capfilt.progress import Progress
from capfilt.report.stats import compute_stats
from tests.curation.downloads import wait_for
from tests.curation.small_runs import make_run, save_models
from tests.engines.works import UNITS, Sleeps, Tally

NAMES = [f"{number:05d}" for number in range(40)]


@pytest.mark.parametrize("is_light", [False, True])
def test_every_shard_once_and_in_order(is_light: bool) -> None:
    tally, unit = Tally(), SHARDS if is_light else "images"
    found = list(LocalEngine(3).run(Sleeps(40, is_light=is_light, unit=unit), NAMES, tally))
    assert found == [(name, os.getpid()) for name in NAMES]
    assert (tally.title, tally.done, tally.finished) == ("sleep", 40 if is_light else 40 * UNITS, 1)


def test_the_first_error_ends_it() -> None:
    taken = list[tuple[str, int]]()
    with pytest.raises(UsageError, match="00007 is refused"):
        taken.extend(LocalEngine(2).run(Sleeps(40, refused="00007", is_light=True), NAMES))
    assert [name for name, _ in taken] == NAMES[:7]


@dataclass
class Counting:
    """Knows how many shards were begun."""

    total = 40
    unit, is_light, has_models, title = SHARDS, True, False, "count"
    begun: int = 0

    def __post_init__(self) -> None:
        self.threads = set[str]()

    def open(self) -> Counting:
        return self

    def __call__(self, _shard: str, _progress: Progress) -> None:
        self.begun += 1
        self.threads.add(threading.current_thread().name)


def test_few_are_ahead_of_what_was_taken() -> None:
    work = Counting()
    results = LocalEngine(2).run(work, NAMES)
    for _ in range(5):
        next(results)
    assert 5 <= work.begun <= 5 + 4
    results.close()
    assert work.begun <= 5 + 4
    assert len(work.threads) <= 2


def test_many_shards_of_light_work_by_processes() -> None:
    """In order; an error of the work is raised as it is, and ends them."""
    tally, names = Tally(), [f"{number:05d}" for number in range(300)]
    engine = LocalEngine(2, processes=True)
    found = list(engine.run(Sleeps(300, is_light=True, unit=SHARDS), names, tally))
    assert [name for name, _ in found] == names
    assert len({pid for _, pid in found}) == 2
    assert os.getpid() not in dict(found).values()
    assert (tally.title, tally.done, tally.finished) == ("sleep", 300, 1)
    taken = []
    with pytest.raises(UsageError, match="^00150 is refused$"):
        taken.extend(engine.run(Sleeps(300, refused="00150", is_light=True, unit=SHARDS), names))
    assert [name for name, _ in taken] == names[:150]
    assert not any(is_worker(one) for one in psutil.Process().children())


def test_a_process_that_is_killed_is_said() -> None:
    names = [f"{number:05d}" for number in range(300)]
    with pytest.raises(CapfiltError, match="ended from outside") as failure:
        list(LocalEngine(2, processes=True).run(Sleeps(300, deadly="00150", is_light=True, unit=SHARDS), names))
    assert failure.value.exit_code == 1


def test_processes_end_with_their_command(tmp_path: Path) -> None:
    """Killed by SIGKILL, it leaves none at work."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = subprocess.Popen([sys.executable, script], env={**os.environ, "PYTHONPATH": os.getcwd()})
    own = psutil.Process(command.pid)
    workers = wait_for(lambda: found if len(found := [one for one in own.children() if is_worker(one)]) == 2 else None)
    command.kill()
    command.wait()
    gone, alive = psutil.wait_procs(workers, timeout=30)
    assert (len(gone), alive) == (2, [])


def is_worker(process: psutil.Process) -> bool:
    """Not the one that multiprocessing counts resources by."""
    return any("spawn_main" in word for word in process.cmdline())


SCRIPT = """
from capfilt.engines.base import SHARDS
from capfilt.engines.local import LocalEngine
from tests.curation.downloads import wait_for
from tests.curation.small_runs import make_run, save_models
from tests.engines.works import Sleeps
if __name__ == "__main__":
    names = [f"{number:05d}" for number in range(300)]
    list(LocalEngine(2, processes=True).run(Sleeps(300, 5.0, is_light=True, unit=SHARDS), names))
"""


def test_commands_by_processes_are_those_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Real work of every light command, pickled for other processes; what the command line asks for may start them."""
    run, models = make_run(tmp_path / "run", num_shards=4, num_samples=3), save_models(tmp_path / "models")
    caption = models.caption(num_captions=2, min_length=3, max_length=6)
    annotate(run, ("captions", "clip", "itm", "manifest"), caption, models.rank(), models.filter())
    started, begin = list[object](), LocalEngine._processes
    monkeypatch.setattr("capfilt.engines.local.MANY_SHARDS", 2)
    monkeypatch.setattr(LocalEngine, "_processes", lambda *given: started.append(given) or begin(*given))
    options = ("address", "num_workers", "cpus_per_worker", "gpus_per_worker")
    asked = engine_from({"engine": "local"} | dict.fromkeys(options))
    assert compute_stats(run, asked) == compute_stats(run)
    assert verify_run(run, deep=True, engine=asked) == verify_run(run, deep=True)
    export_pairs(run, tmp_path / "there.csv", dropped=True, engine=asked)
    export_pairs(run, tmp_path / "here.csv", dropped=True)
    assert (tmp_path / "there.csv").read_bytes() == (tmp_path / "here.csv").read_bytes()
    chosen = reselect(run, threshold=0.3, engine=asked)
    by_processes = run.stage_file("manifest", "00000").read_bytes()
    reselect(run, threshold=0.5)
    assert reselect(run, threshold=0.3).num_kept == chosen.num_kept
    assert run.stage_file("manifest", "00000").read_bytes() == by_processes
    assert len(started) == 4
