"""Ctrl-C at any moment: once, and the command ends in two seconds and says how to go on; twice, and it ends at once.

Either leaves a run that verifies, and the same command then makes what an undisturbed one makes. A training ends its
step and saves a checkpoint first, which takes it as long as it takes. The signal comes when the command is seen to
work, and goes to the whole group of processes, as a terminal sends it.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from capfilt.data.commit import file_sha256
from capfilt.data.rundir import RunDir
from capfilt.data.verify import verify_run
from capfilt.world.site import SiteSettings, WorldSite
from tests.cli.conftest import capfilt, capfilt_process
from tests.curation.downloads import rows_of
from tests.curation.small_runs import Models, make_run, save_models
from tests.stress.conftest import FULL, Figure
from tests.stress.lives import committed_files

TIMES = (1, 2, 1) if FULL else (1, 2)
"""Signals at each moment."""
PAUSE_SECONDS, PAUSE_IN_TRAINING_SECONDS = 0.05, 0.4
"""Between the first signal and the second. Two that come within one operation of torch's are one for Python."""
MOST_TRIES = 8
"""Runs for each moment: the others were over before the signal came."""
HANGS_SECONDS = 600 if FULL else 120
"""After which a command is taken for hanging."""
LONGEST_SECONDS = {1: 2.0, 2: 0.5} if FULL else {1: 20.0, 2: 20.0}
"""By the number of signals, the goal; in a sample only that it ends."""
LONGEST_SECONDS_TO_SAVE = 10.0 if FULL else 20.0
NAMES = ["download", "import", "caption", "rank", "filter", "select", "train"] if FULL else ["caption"]


def trained_weights(path: Path) -> dict[str, str]:
    """Digests of what the training at a run wrote."""
    return {file.name: file_sha256(file) for file in model_of(path).glob("*.safetensors")}


def model_of(path: Path) -> Path:
    return path.with_name(f"{path.name}-model")


SIGNS = {"download": ".staging/*/*/current", "import": ".staging/*/shard.tar"}
"""What is there as soon as a command works: half a shard; for the others, see `is_at_work`."""


def is_at_work(name: str, path: Path, process: subprocess.Popen[str]) -> bool:
    """Whether a command has got beyond its start: half a shard, the metrics' file, or the run's lock is there."""
    if name in SIGNS:
        return any(path.glob(SIGNS[name]))
    if name == "train":
        return any(model_of(path).glob("metrics.*"))
    lock = path / ".lock"
    return lock.exists() and lock.read_text().strip() == str(process.pid)


RESULTS: dict[str, Callable[[Path], object]] = {
    "download": lambda path: rows_of(RunDir.open(path)), "train": trained_weights,
}  # fmt: skip


class Site:
    """What the commands work on."""

    def __init__(self, folder: Path) -> None:
        self.models: Models = save_models(folder / "models")
        self.runs: dict[str, Path] = {"before": make_run(folder / "run", num_shards=4, num_samples=60).path}
        self._site = WorldSite(SiteSettings(num_urls=240, behaviour_shares={"not_found": 0.1}))
        self._site.__enter__()
        self.table = self._site.write_table(folder / "urls.parquet")
        for stage, command in (("caption", "rank"), ("rank", "filter"), ("filter", "select")) if FULL else ():
            path = shutil.copytree(self.runs.get(stage, self.runs["before"]), folder / f"after-{stage}")
            assert capfilt(*self.command(stage, path)).code == 0
            self.runs[command] = path

    def close(self) -> None:
        self._site.__exit__(None, None, None)

    def command(self, name: str, path: Path) -> list[object]:
        """The command called `name`, at a run."""
        models = self.models.root
        return {
            "download": ["download", self.table, path, "--samples-per-shard", 20, "--allow-private-addresses"],
            "import": ["import", *sorted((self.runs["before"] / "shards").glob("*.tar")), path],
            "caption": [
                "caption", path, "--captioner", models / "captioner", "--dtype", "float32", "--num-captions", 4,
            ],
            "rank": ["rank", path, "--clip-model", models / "clip", "--dtype", "float32"],
            "filter": ["filter", path, "--filter-model", models / "filter", "--dtype", "float32"],
            "select": ["select", path, "--threshold", 0.3],
            "train": [
                "train", "stage1", path, "--image-encoder", "embedded", "--output", model_of(path),
                "--set", "max_steps=16", "--set", "batch_size=8", "--set", "num_queries=4",
                "--set", "save_every_steps=4",
            ],
        }[name]  # fmt: skip

    def prepare(self, name: str, path: Path) -> None:
        """The run that the command finds."""
        source = self.runs["select"] if name == "train" else self.runs.get(name, self.runs["before"])
        if name not in ("download", "import"):
            shutil.copytree(source, path)


@pytest.fixture(scope="module", autouse=True)
def interrupts_count() -> None:
    """Where the tests were started in the background of a script, processes of theirs would ignore SIGINT too."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    opened = Site(tmp_path_factory.mktemp("site"))
    yield opened
    opened.close()


@contextmanager
def started(site: Site, name: str, path: Path) -> Iterator[subprocess.Popen[str]]:
    """The command in a group of its own; nothing of it is left at the end."""
    process = capfilt_process(*site.command(name, path), in_group_of_its_own=True)
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def finish(process: subprocess.Popen[str]) -> str:
    _, said = process.communicate(timeout=HANGS_SECONDS)
    return said


def wait_for_work(name: str, path: Path, process: subprocess.Popen[str]) -> None:
    """Returns when the command works, or is over."""
    end = time.monotonic() + HANGS_SECONDS
    while process.poll() is None and not is_at_work(name, path, process):
        assert time.monotonic() < end, "no work was seen"
        time.sleep(0.002)


@pytest.mark.parametrize("name", NAMES)
def test_interrupted(site: Site, tmp_path: Path, name: str, figure: Figure) -> None:
    rng, result = random.Random(name), RESULTS.get(name, committed_files)
    path = tmp_path / "undisturbed"
    site.prepare(name, path)
    with started(site, name, path) as process:
        wait_for_work(name, path, process)
        began = time.monotonic()
        said = finish(process)
    assert process.returncode == 0, said
    work_seconds, expected = time.monotonic() - began, result(path)
    seconds: dict[int, list[float]] = {times: [] for times in TIMES}
    for number, times in enumerate(TIMES):
        for attempt in range(MOST_TRIES):
            path = tmp_path / f"run{number}-{attempt}"
            site.prepare(name, path)
            with started(site, name, path) as process:
                wait_for_work(name, path, process)
                time.sleep(rng.uniform(0, 0.6 * work_seconds))
                sent = send_interrupts(process, times, PAUSE_IN_TRAINING_SECONDS if name == "train" else PAUSE_SECONDS)
                said = finish(process)
                seconds[times].append(time.monotonic() - sent)
            if process.returncode == 130:
                assert "the same command goes on" in said
                assert "Traceback" not in said
            if (path / "run.json").exists():
                assert verify_run(RunDir.open(path), deep=True).findings == []
            # the signal itself ends Python in its own last moments: after the first one that is the command's good
            # end, after the second one an end at once
            if process.returncode == 130 or (times == 2 and process.returncode == -signal.SIGINT):
                break
            assert process.returncode in (0, -signal.SIGINT), said
        else:
            raise AssertionError(f"of {MOST_TRIES} runs each was over before the signal came")
        with started(site, name, path) as process:
            said = finish(process)
        assert process.returncode == 0, said
        assert result(path) == expected
    once, twice = (max(seconds[times]) for times in (1, 2))
    figure(
        "signals",
        f"{name}: over {once:.2f} s at most after Ctrl-C once ({TIMES.count(1)} times), {twice:.2f} s after twice "
        f"({TIMES.count(2)}): the runs verified, the same command went on",
    )
    assert once <= (LONGEST_SECONDS_TO_SAVE if name == "train" else LONGEST_SECONDS[1])
    assert twice <= LONGEST_SECONDS[2]


def send_interrupts(process: subprocess.Popen[str], times: int, pause_seconds: float) -> float:
    """Interrupt the group of a process so many times; gives when the last one was sent."""
    sent = time.monotonic()
    for number in range(times):
        if number:
            time.sleep(pause_seconds)
        sent = time.monotonic()
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGINT)
    return sent
