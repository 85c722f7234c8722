"""Row 18: shards ten and a hundred times as large: the peak of memory of every command grows by a tenth at most,
or by 32 MB where it is small.

As many samples each time, in many small shards or in one: what grows with the length of a run alone (kernels that are
kept) is not counted. Each command runs in processes of its own; of each the kernel's own record of its peak is read.
"""

from __future__ import annotations

import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from capfilt.data.rundir import RunDir
from capfilt.world.site import SiteSettings, WorldSite
from tests.cli.conftest import capfilt_process
from tests.curate.small_runs import Models, make_run, save_models
from tests.stress.conftest import FULL, Figure

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peaks are read from Linux's /proc")

SIZES = (50, 500, 5_000) if FULL else (20, 200)
"""Samples of a shard."""
NUM_SAMPLES = SIZES[-1]
MOST_GROWTH, SLACK_MB = 1.10, 32
"""The goal, and what a command that takes little memory may take more: allocators grow by such steps."""
POLL_SECONDS = 0.02


def peak_mb(*arguments: object) -> float:
    """Peak of resident memory of a command: of its own process and of the largest one that it started."""
    process = capfilt_process(*arguments)
    watched, peaks = psutil.Process(process.pid), Counter[int]()
    while process.poll() is None:
        with suppress(psutil.Error):
            for one in [watched, *watched.children(recursive=True)]:
                with suppress(OSError, StopIteration):
                    lines = Path(f"/proc/{one.pid}/status").read_text().splitlines()
                    line = next(line for line in lines if line.startswith("VmHWM"))
                    peaks[one.pid] = max(peaks[one.pid], int(line.split()[1]))
        time.sleep(POLL_SECONDS)
    _, said = process.communicate()
    assert process.returncode == 0, said
    own = peaks.pop(process.pid)
    return (own + max(peaks.values(), default=0)) / 1024


def check(name: str, peaks: list[float], figure: Figure) -> None:
    figure(
        18,
        f"{name}: {' / '.join(f'{peak:,.0f}' for peak in peaks)} MB "
        f"for shards of {' / '.join(f'{n:,}' for n in SIZES)}",
    )
    assert peaks[-1] <= max(MOST_GROWTH * peaks[0], peaks[0] + SLACK_MB), f"{name}: {peaks}"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return save_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def runs(models: Models, tmp_path_factory: pytest.TempPathFactory) -> list[RunDir]:
    """A run for each size of shards."""
    folder = tmp_path_factory.mktemp("runs")
    return [
        make_run(folder / str(size), num_shards=NUM_SAMPLES // size, num_samples=size, num_pictures=100)
        for size in SIZES
    ]


STAGES = {
    "caption": ("captioner", ("--captioner",)), "rank": ("clip", ("--clip-model",)),
    "filter": ("filter", ("--filter-model",)),
}  # fmt: skip
READING: list[tuple[object, ...]] = [("select", "--threshold", 0.4), ("verify", "--deep"), ("stats",)]


def test_curation(models: Models, runs: list[RunDir], figure: Figure) -> None:
    """The stages one by one, each with the rows of those before, then what only reads."""
    for stage, (folder, option) in list(STAGES.items())[: None if FULL else 1]:
        peaks = [peak_mb(stage, run.path, *option, models.root / folder, "--dtype", "float32") for run in runs]
        check(stage, peaks, figure)
    for name, *options in READING if FULL else READING[1:2]:
        check(name, [peak_mb(name, run.path, *options) for run in runs], figure)


def test_import(runs: list[RunDir], tmp_path: Path, figure: Figure) -> None:
    peaks = [
        peak_mb("import", *sorted((run.path / "shards").glob("*.tar")), tmp_path / f"run{size}")
        for run, size in zip(runs, SIZES, strict=True)
    ]
    check("import", peaks, figure)


def test_download(tmp_path: Path, figure: Figure) -> None:
    peaks = []
    with WorldSite(SiteSettings(num_urls=NUM_SAMPLES, behaviour_shares={"not_found": 0.1})) as site:
        table = site.write_table(tmp_path / "urls.parquet")
        for size in SIZES:
            options = ("--samples-per-shard", size, "--num-processes", 1, "--allow-private-addresses")
            peaks.append(peak_mb("download", table, tmp_path / f"run{size}", *options))
    check("download", peaks, figure)
