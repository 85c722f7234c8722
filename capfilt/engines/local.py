"""Work on shards on this machine: in order where models compute, several at a time where tables are read.

Few results are ahead of what was taken, so that the largest of them bound the memory, however many shards there are.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.connection import wait
from typing import Any

from capfilt.engines.base import SHARDS, LooksAhead, Result, Work
from capfilt.errors import CapfiltError
from capfilt.progress import NullProgress, Progress

MOST_THREADS = 8
"""Light work holds Python's lock for a part of the time."""
MOST_PROCESSES = 32
MANY_SHARDS = 200
"""From which on processes are worth the second that they take to start."""


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
            if isinstance(worker, LooksAhead):
                worker.expect(shards)
            ended = ((shard, worker(shard, progress)) for shard in shards)
        elif self._may_start_processes and len(shards) >= MANY_SHARDS and num_cores() > 1:
            ended = self._processes(work, shards)
        else:
            num = self._num or min(MOST_THREADS, num_cores())
            pool = ThreadPoolExecutor(num, thread_name_prefix="shards")
            ended = in_order(lambda shard: pool.submit(worker, shard, NullProgress()), pool, 2 * num, shards)
        for shard, result in ended:
            if work.unit == SHARDS:
                progress.advance(1)
            yield shard, result
        progress.finish()

    def _processes(self, work: Work[Result], shards: Sequence[str]) -> Iterator[tuple[str, Result]]:
        num = self._num or min(MOST_PROCESSES, num_cores())
        context = multiprocessing.get_context("spawn")  # a fork has the locks of Arrow's threads, not the threads
        pool = ProcessPoolExecutor(num, context, initializer=_begin, initargs=(work,))

        def submit(shard: str) -> Future[Result]:
            with _ctrl_c_later():  # what is started here does not see it at all
                return pool.submit(_work_on, shard)

        try:
            yield from in_order(submit, pool, 2 * num, shards)
        except BrokenProcessPool:
            raise CapfiltError(_BROKEN) from None


_BROKEN = (
    "A process of this command ended from outside, or could not begin (was memory short?). Repeat the command: what is "
    "done is kept."
)


def in_order(
    submit: Callable[[str], Future[Result]], pool: Executor, most_ahead: int, shards: Iterable[str]
) -> Iterator[tuple[str, Result]]:
    """(shard, result) of each, in order, of which at most so many are made ahead; the pool ends with it."""
    names, under_way = iter(shards), deque[tuple[str, Future[Result]]]()
    try:
        while True:
            while len(under_way) < most_ahead and (name := next(names, None)) is not None:
                under_way.append((name, submit(name)))
            if not under_way:
                return
            shard, future = under_way.popleft()
            yield shard, future.result()
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _ctrl_c_later() -> Iterator[None]:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_opened: list[Any] = []  # of a process: the worker, or the error of opening it


def _begin(work: Work[Any]) -> None:
    """Ctrl-C is for the command, which ends its processes; where it is gone itself, they end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        _opened[:] = [work.open()]
    except Exception as error:
        _opened[:] = [error]


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _work_on(shard: str) -> Any:
    if isinstance(_opened[0], Exception):
        raise _opened[0]
    return _opened[0](shard, NullProgress())


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
