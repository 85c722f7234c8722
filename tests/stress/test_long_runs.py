"""A long run: 100,000 samples through captions, ranks and filter by small models.

Memory and open files stay where they were, and the last tenths go as fast as the first.
"""

from __future__ import annotations

import multiprocessing
import time
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import torch

from capfilt.curation.annotate import annotate
from capfilt.data.rundir import RunDir
from capfilt.data.verify import verify_run
from capfilt.progress import NullProgress
from tests.curation.small_runs import Models, make_run, save_models
from tests.stress.conftest import FULL, LONGEST_TEST_SECONDS, Figure

NUM_SHARDS, NUM_SAMPLES = (100, 1_000) if FULL else (10, 40)
ALL = ("captions", "clip", "itm", "manifest")


@dataclass
class Watch(NullProgress):
    """Looks at the process after every tenth of the images."""

    tenth: int
    done: int = 0
    seen: list[tuple[float, float, int, int]] = field(default_factory=list)
    """(seconds, processor seconds, resident bytes, open files)."""

    def start(self, name: str, total: int | None, unit: str, /) -> None:
        self.look()

    def advance(self, n: int = 1, /, *, already: bool = False, **fields: object) -> None:
        self.done += n
        if self.done % self.tenth == 0 and n:
            self.look()

    def look(self) -> None:
        process = psutil.Process()
        self.seen.append((time.monotonic(), time.process_time(), process.memory_info().rss, process.num_fds()))


def work(path: Path, models: Models, answers: Any) -> None:
    torch.set_num_threads(1)
    watch = Watch(NUM_SHARDS * NUM_SAMPLES // 10)
    caption = models.caption(num_captions=2, min_length=3, max_length=6)
    annotate(RunDir.open(path), ALL, caption, models.rank(), models.filter(), watch)
    answers.put(watch.seen)


def test_one_hundred_thousand_samples(tmp_path: Path, figure: Figure) -> None:
    models = save_models(tmp_path / "models")
    run = make_run(tmp_path / "run", num_shards=NUM_SHARDS, num_samples=NUM_SAMPLES, num_pictures=500)
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    child = context.Process(target=work, args=(run.path, models, answers))
    child.start()
    seen = answers.get(timeout=LONGEST_TEST_SECONDS - 30)
    child.join()
    assert len(seen) == 11
    assert verify_run(run).exit_code == 0
    seconds, processor, memory, handles = zip(*seen, strict=True)
    tenths = [after - before for before, after in pairwise(processor)]
    rate = min(tenths[:3]) / min(tenths[-3:])  # other work on the machine slows single tenths down
    num, mb = NUM_SHARDS * NUM_SAMPLES, [round(one / 1e6) for one in memory]
    figure(
        "long run",
        f"{num:,} samples in {seconds[10] - seconds[0]:,.0f} s; resident {mb[1]:,} MB after a tenth, {mb[10]:,} at the "
        f"end; {handles[1]} and {handles[10]} open files; the fastest of the last three tenths at {rate:.2f} times the "
        "rate of the first three's (by processor time)",
    )
    # kernels for new lengths of texts are made, and kept, for a while; a sample is too short to get past that
    assert memory[10] <= 1.05 * memory[1 if FULL else 9]
    assert handles[10] <= handles[1]
    if FULL:
        assert rate >= 0.95
