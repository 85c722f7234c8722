"""Works without models, for tests of the engines; other processes import them from here."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field

from capfilt.engines.base import SHARDS
from capfilt.errors import UsageError
from capfilt.progress import Progress

UNITS = 5
"""Of each shard."""


@dataclass(frozen=True)
class Sleeps:
    """Takes a while for each shard, and gives the process that did it."""

    total: int
    seconds: float = 0.0
    deadly: str = ""
    """A shard that ends its worker."""
    refused: str = ""
    """A shard that cannot be worked on."""
    endless: str = ""
    """A shard that never ends."""
    unit: str = "images"
    is_light: bool = False
    has_models, title = True, "sleep"

    def open(self) -> Sleeps:
        return self

    def __call__(self, shard: str, progress: Progress) -> int:
        for _ in range(UNITS):
            time.sleep(self.seconds / UNITS)
            if self.unit != SHARDS:
                progress.advance(1)
            if shard == self.deadly:
                os._exit(3)
            while shard == self.endless:
                time.sleep(1)
        if shard == self.refused:
            raise UsageError(f"{shard} is refused")
        return os.getpid()


@dataclass
class Tally:
    """A progress that counts what it is told."""

    title: str = ""
    done: int = 0
    finished: int = 0
    said: list[str] = field(default_factory=list)

    def start(self, name: str, total: int | None, unit: str, /) -> None:
        self.title = name

    def advance(self, n: int = 1, /, *, already: bool = False, **fields: object) -> None:
        self.done += n

    def finish(self) -> None:
        self.finished += 1

    def say(self, text: str, /) -> None:
        self.said.append(text)
