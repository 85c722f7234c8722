"""What a Ray cluster costs and gives: its overhead on one machine, and how it scales.

    python -m benchmarks.engines [--shards 8] [--rounds 3] [--workers 2,4,8,16]

In: nothing. Out: a line for each. *Overhead*: captions, ranks and filter of shards of 1,000 images by small models, by
this process and by one worker of Ray, in turn; seconds a shard from the first shard's end to the last one's, so that
what starts once does not count. *Scaling*: workers that sleep for a second a shard (so that two cores suffice), from
the moment when each has given a result until the shards run out; the share of what as many do that wait for nothing.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from capfilt.curation.annotate import annotate
from capfilt.data.rundir import RunDir
from capfilt.engines.base import Engine, Work
from capfilt.engines.cluster import RayEngine
from capfilt.engines.local import LocalEngine
from capfilt.settings import RaySettings
from tests.curation.small_runs import Models, make_run, save_models
from tests.engines.works import Sleeps

SAMPLES_PER_SHARD = 1_000
SECONDS_A_SHARD, SHARDS_A_WORKER = 1.0, 20
MOST_OVERHEAD, LEAST_EFFICIENCY = 1.05, 0.90


class Timed:
    """An engine whose results are timed."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.seconds: list[float] = []

    def run(self, work: Work[Any], shards: Any, progress: Any = None) -> Iterator[Any]:
        """Notes when each shard ends."""
        for ended in self._engine.run(work, shards, progress):
            self.seconds.append(time.perf_counter())
            yield ended

    def seconds_a_shard(self) -> float:
        """The first one not counted."""
        return (self.seconds[-1] - self.seconds[0]) / (len(self.seconds) - 1)


def measure_overhead(num_shards: int, num_rounds: int) -> None:
    """Each engine on a fresh copy of the run, in turn."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        models = save_models(folder / "models")
        made = make_run(folder / "made", num_shards=num_shards, num_samples=SAMPLES_PER_SHARD, num_pictures=100)
        engines = {"local": LocalEngine(), "ray": RayEngine(RaySettings(num_workers=1, cpus_per_worker=1))}
        found: dict[str, list[float]] = {name: [] for name in engines}
        for _ in range(num_rounds):
            for name, engine in engines.items():
                found[name].append(_seconds_a_shard(engine, made, models))
        medians = {name: statistics.median(seconds) for name, seconds in found.items()}
        ratios = [ray / local for local, ray in zip(found["local"], found["ray"], strict=True)]
        print(
            f"overhead: {medians['local']:.2f} s a shard of {SAMPLES_PER_SHARD:,} in one process, "
            f"{medians['ray']:.2f} s by one worker; ratios {', '.join(f'{ratio:.3f}' for ratio in ratios)}, median "
            f"{statistics.median(ratios):.3f} (goal {MOST_OVERHEAD:g})"
        )


def _seconds_a_shard(engine: Engine, made: RunDir, models: Models) -> float:
    path, timed = made.path.with_name("run"), Timed(engine)
    shutil.copytree(made.path, path)
    caption = models.caption(num_captions=2, min_length=3, max_length=6)
    annotate(
        RunDir.open(path),
        ("captions", "clip", "itm", "manifest"),
        caption,
        models.rank(),
        models.filter(),
        engine=timed,
    )
    shutil.rmtree(path)
    return timed.seconds_a_shard()


def measure_scaling(num_workers: int) -> None:
    """Shards a second while every worker is there."""
    names = [f"{number:05d}" for number in range(num_workers * SHARDS_A_WORKER)]
    engine = RayEngine(RaySettings(num_workers=num_workers, cpus_per_worker=1))
    by_worker, began, num_before, last, num_done = Counter[int](), 0.0, 0, 0.0, 0
    for num_done, (_, pid) in enumerate(engine.run(Sleeps(len(names), SECONDS_A_SHARD), names), start=1):
        by_worker[pid] += 1
        now = time.perf_counter()
        if not began and len(by_worker) == num_workers:
            began, num_before = now, num_done
        if num_done == len(names) - num_workers:
            last = now
    rate = (len(names) - num_workers - num_before) / (last - began)
    share = rate / (num_workers / SECONDS_A_SHARD)
    told = f"{num_workers:2} workers {rate:5.2f} shards/s, {share:.1%} of {num_workers}"
    print(f"scaling: {told} (goal {LEAST_EFFICIENCY:.0%})", flush=True)


def main() -> None:
    """The overhead, then each number of workers."""
    import ray

    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", default="2,4,8,16")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    numbers = [int(number) for number in asked.workers.split(",")]
    ray.init("local", num_cpus=max(numbers), include_dashboard=False, log_to_driver=False)
    for number in numbers:
        measure_scaling(number)
    measure_overhead(asked.shards, asked.rounds)
    ray.shutdown()


if __name__ == "__main__":
    main()
