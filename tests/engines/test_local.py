"""Work in this process: every shard once, in order, and few ahead of what was taken."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass

import pytest

from capfilt.engines.base import SHARDS
from capfilt.engines.local import LocalEngine
from capfilt.errors import UsageError
from capfilt.progress import Progress
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
    unit, is_light, title = SHARDS, True, "count"
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
