"""Row 18: shards ten and a hundred times as large: the peak of memory of every command grows by a tenth at most,
or by 32 MB where it is small.

As many samples each time, in many small shards or in one: what grows with the length of a run alone (kernels that are
kept) is not counted. The pictures are so large that a stage which keeps those of a shard grows by far more. Each
command runs in processes of its own; of each the kernel's own record of its peak is read.
"""

from __future__ import annotations

import http.server
import shutil
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from capfilt.data.rundir import RunDir
from tests.cli.conftest import capfilt_process
from tests.curation.downloads import rows_of
from tests.curation.small_runs import Models, encode_picture, make_run, save_models
from tests.stress.conftest import FULL, Figure

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peaks are read from Linux's /proc")

SIZES = (20, 200, 2_000) if FULL else (20, 200)
"""Samples of a shard."""
NUM_SAMPLES = SIZES[-1]
NUM_PICTURES = 20
EDGE_PX, SITE_EDGE_PX = (384, 384) if FULL else (512, 384)
"""Of the pictures of runs and of the site: decoded, the largest shard's take 885 MB; in the sample 157 MB and 88 MB."""
MOST_GROWTH, SLACK_MB = 1.10, 32
"""The goal, and what a command that takes little memory may take more: allocators grow by such steps."""
POLL_SECONDS = 0.02


def peaks_mb(*arguments: object) -> tuple[float, float]:
    """Peaks of resident memory of a command's own process and of the largest one that it started, 0 without one."""
    process = capfilt_process(*arguments)
    watched, peaks = psutil.Process(process.pid), Counter[int]()
    while process.poll() is None:
        with suppress(psutil.Error):
            # a child with this command line too is about to become another program, and has this memory until then
            others = [one for one in watched.children(recursive=True) if one.cmdline() != watched.cmdline()]
            for one in [watched, *others]:
                with suppress(OSError, StopIteration):
                    lines = Path(f"/proc/{one.pid}/status").read_text().splitlines()
                    line = next(line for line in lines if line.startswith("VmHWM"))
                    peaks[one.pid] = max(peaks[one.pid], int(line.split()[1]))
        time.sleep(POLL_SECONDS)
    _, said = process.communicate()
    assert process.returncode == 0, said
    own = peaks.pop(process.pid)
    return own / 1024, max(peaks.values(), default=0) / 1024


def check(
    name: str, peaks: list[tuple[float, float]], figure: Figure, sizes: tuple[int, ...] = SIZES, what: str = "shards"
) -> None:
    shown = " / ".join(f"{own:,.0f}" + (f"+{other:,.0f}" if other else "") for own, other in peaks)
    figure(18, f"{name}: {shown} MB for {what} of {' / '.join(f'{n:,}' for n in sizes)}")
    assert not grows(peaks), f"{name}: {peaks}"


def grows(peaks: list[tuple[float, float]]) -> bool:
    """Whether the peak of the largest shards is above the goal."""
    return any(
        last > max(MOST_GROWTH * first, first + SLACK_MB) for first, last in zip(peaks[0], peaks[-1], strict=True)
    )


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return save_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def runs(models: Models, tmp_path_factory: pytest.TempPathFactory) -> list[RunDir]:
    """A run for each size of shards."""
    folder = tmp_path_factory.mktemp("runs")
    return [
        make_run(
            folder / str(size),
            num_shards=NUM_SAMPLES // size,
            num_samples=size,
            num_pictures=NUM_PICTURES,
            picture_size_px=(EDGE_PX, EDGE_PX),
        )
        for size in SIZES
    ]


STAGES = {
    "caption": ("captioner", ("--min-length", 3, "--max-length", 6, "--captioner"), ("captions",)),
    "rank": ("clip", ("--clip-model",), ("clip",)), "filter": ("filter", ("--filter-model",), ("itm", "manifest")),
}  # fmt: skip
"""The folder of its model, options, of which that is the last, and what it writes in a run."""
READING: dict[str, list[object]] = {
    "select": ["--threshold", 0.4], "verify": ["--deep"], "stats": [],
    "export": ["--dropped", "--output"], "export tars": ["--format", "webdataset", "--output"],
    "export datasets": ["--format", "datasets", "--output"], "report": ["--output"],
}  # fmt: skip
"""The first word is the command. Of some a file is the last argument, or a folder."""
FILES = {"export": "pairs.csv", "export tars": "tars", "export datasets": "hf", "report": "report.html"}


def test_curation(models: Models, runs: list[RunDir], tmp_path: Path, figure: Figure) -> None:
    """The stages one by one, each with the rows of those before, then what only reads."""
    for stage, (folder, options, written) in list(STAGES.items())[: None if FULL else 1]:
        command = [*options, models.root / folder, "--dtype", "float32"]
        peaks = [peaks_mb(stage, run.path, *command) for run in runs]
        if grows(peaks):  # the same work takes 60 MB more at one start than at another: their means are held against it
            for place in (run.path / name for run in runs for name in written):
                shutil.rmtree(place)
            again = [peaks_mb(stage, run.path, *command) for run in runs]
            peaks = [((a + c) / 2, (b + d) / 2) for (a, b), (c, d) in zip(peaks, again, strict=True)]
        check(stage, peaks, figure)
    for name, options in READING.items():
        if not FULL and name != "verify":
            continue
        peaks = []
        for run in runs:
            file = [tmp_path / f"{run.path.name}-{FILES[name]}"] if name in FILES else []
            peaks.append(peaks_mb(name.split()[0], run.path, *options, *file))
        check(name, peaks, figure)


def test_import(runs: list[RunDir], tmp_path: Path, figure: Figure) -> None:
    peaks = [
        peaks_mb("import", *sorted((run.path / "shards").glob("*.tar")), tmp_path / f"run{size}")
        for run, size in zip(runs, SIZES, strict=True)
    ]
    check("import", peaks, figure)


@contextmanager
def picture_site() -> Iterator[str]:
    """Address of a server that has a picture at every number."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            number = self.path.strip("/")
            data = encode_picture(int(number) % NUM_PICTURES, SITE_EDGE_PX, SITE_EDGE_PX) if number.isdigit() else b""
            self.send_response(200 if data else 404)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_download(tmp_path: Path, figure: Figure) -> None:
    """Larger shards, and ten times as many of the smallest."""
    lengths = (NUM_SAMPLES // 10, NUM_SAMPLES)
    with picture_site() as address:

        def peaks_of(length: int, size: int) -> tuple[float, float]:
            path, table = tmp_path / f"run{length}-{size}", tmp_path / f"urls{length}.parquet"
            urls = [f"{address}/{number}" for number in range(length)]
            pq.write_table(pa.table({"url": urls, "text": ["a picture"] * length}), table)
            options = ("--samples-per-shard", size, "--num-processes", 1, "--allow-private-addresses")
            peaks = peaks_mb("download", table, path, *options)
            assert sum(1 for row in rows_of(RunDir.open(path)) if row["reason"] is None) == length
            return peaks

        peaks = [peaks_of(NUM_SAMPLES, size) for size in SIZES]
        check("download", peaks, figure)
        check("download", [peaks_of(lengths[0], SIZES[0]), peaks[0]], figure, lengths, "runs")
