"""Work on shards in this process: one after another where models compute, by threads where tables are read.

Few results are ahead of what was taken, so that the largest of them bound the memory, however many shards there are.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from capfilt.engines.base import SHARDS, Result, Work, Worker
from capfilt.progress import NullProgress, Progress

MOST_THREADS = 8
"""Light work holds Python's lock for a part of the time."""


class LocalEngine:
    """This process."""

    def __init__(self, num_threads: int | None = None) -> None:
        """`num_threads` for light work; as many as there are cores, at most MOST_THREADS, unless told otherwise."""
        self._num_threads = num_threads or min(MOST_THREADS, num_cores())

    def run(
        self, work: Work[Result], shards: Sequence[str], progress: Progress | None = None
    ) -> Iterator[tuple[str, Result]]:
        """(shard, result) of each shard, in order. The first error of the work ends it."""
        progress = progress or NullProgress()
        worker = work.open()
        progress.start(worker.title, work.total, work.unit)
        ended = self._threads(worker, shards) if work.is_light else ((s, worker(s, progress)) for s in shards)
        for shard, result in ended:
            if work.unit == SHARDS:
                progress.advance(1)
            yield shard, result
        progress.finish()

    def _threads(self, worker: Worker[Result], shards: Sequence[str]) -> Iterator[tuple[str, Result]]:
        names, under_way = iter(shards), deque[tuple[str, Future[Result]]]()
        with ThreadPoolExecutor(self._num_threads, thread_name_prefix="shards") as pool:
            try:
                while True:
                    while len(under_way) < 2 * self._num_threads and (name := next(names, None)) is not None:
                        under_way.append((name, pool.submit(worker, name, NullProgress())))
                    if not under_way:
                        return
                    shard, future = under_way.popleft()
                    yield shard, future.result()
            finally:
                pool.shutdown(cancel_futures=True)


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
