"""Work on shards on this machine: in order where models compute, several at a time where tables are read.

Few results are ahead of what was taken, so that the largest of them bound the memory, however many shards there are.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from capfilt.engines.base import SHARDS, Result, Work
from capfilt.engines.children import die_with_parent
from capfilt.errors import CapfiltError
from capfilt.progress import NullProgress, Progress

MOST_THREADS = 8
"""Light work holds Python's lock for a part of the time."""
MOST_PROCESSES = 32
MANY_SHARDS = 200
"""From which on processes are worth the second that they take to start."""
CHUNK = 8
"""Shards that a process is handed at a time."""


class LocalEngine:
    """This machine: this process, its threads, and where `processes` are allowed and shards are many, further ones.

    A script that allows them keeps what it does under `if __name__ == "__main__"`, as multiprocessing asks for.
    """

    def __init__(self, num_at_a_time: int | None = None, *, processes: bool = False) -> None:
        """`num_at_a_time` shards of light work; as many as there are cores unless told otherwise."""
        self._num, self._may_start_processes = num_at_a_time, processes

    def run(
        self, work: Work[Result], shards: Sequence[str], progress: Progress | None = None
    ) -> Iterator[tuple[str, Result]]:
        """(shard, result) of each shard, in order. The first error of the work ends it.

        Raises CapfiltError where a process of light work was killed.
        """
        progress = progress or NullProgress()
        worker = work.open()
        progress.start(worker.title, work.total, work.unit)
        if not work.is_light:
            ended = ((shard, worker(shard, progress)) for shard in shards)
        elif self._may_start_processes and len(shards) >= MANY_SHARDS and num_cores() > 1:
            ended = self._processes(work, shards)
        else:
            num = self._num or min(MOST_THREADS, num_cores())
            pool = ThreadPoolExecutor(num, thread_name_prefix="shards")
            ended = _in_order(pool, 2 * num, lambda names: [worker(n, NullProgress()) for n in names], shards, 1)
        for shard, result in ended:
            if work.unit == SHARDS:
                progress.advance(1)
            yield shard, result
        progress.finish()

    def _processes(self, work: Work[Result], shards: Sequence[str]) -> Iterator[tuple[str, Result]]:
        num = self._num or min(MOST_PROCESSES, num_cores())
        context = multiprocessing.get_context(
            "spawn"
        )  # a fork would have the locks of Arrow's threads, not the threads
        pool = ProcessPoolExecutor(num, context, initializer=_begin, initargs=(os.getpid(), work))
        try:
            yield from _in_order(pool, 2 * num, _work_off, shards, CHUNK)
        except BrokenProcessPool:
            raise CapfiltError(
                "A process of this command was ended from outside (was memory short?). Repeat the command: what is "
                "done is kept."
            ) from None


def _in_order(
    pool: Executor, most_ahead: int, do: Callable[[Sequence[str]], list[Result]], shards: Sequence[str], chunk: int
) -> Iterator[tuple[str, Result]]:
    chunks = iter([shards[start : start + chunk] for start in range(0, len(shards), chunk)])
    under_way = deque[tuple[Sequence[str], Future[list[Result]]]]()
    try:
        while True:
            while len(under_way) < most_ahead and (names := next(chunks, None)) is not None:
                under_way.append((names, pool.submit(do, names)))
            if not under_way:
                return
            names, future = under_way.popleft()
            yield from zip(names, future.result(), strict=True)
    finally:
        pool.shutdown(cancel_futures=True)


_opened: list[Any] = []  # of a process: the worker


def _begin(parent: int, work: Work[Any]) -> None:
    """Ctrl-C is for the command, which ends its processes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    die_with_parent(parent)
    _opened[:] = [work.open()]


def _work_off(shards: Sequence[str]) -> list[Any]:
    return [_opened[0](shard, NullProgress()) for shard in shards]


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
