"""What the engines carry out: work on shards, one after another, in this process or in many.

A `Work` is a description that other processes can be sent. Each process that takes part opens it once, which loads what
it needs, and then works on one shard at a time. Results come back in any order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol, TypeVar, runtime_checkable

from capfilt.progress import Progress

Result = TypeVar("Result")
Result_co = TypeVar("Result_co", covariant=True)


class Worker(Protocol[Result_co]):
    """Work that was opened in this process."""

    title: str
    """What it does and by what, for the progress."""

    def __call__(self, shard: str, progress: Progress, /) -> Result_co:
        """Do it to one shard. Advances `progress` by the units of the work, unless the unit is the shard itself."""
        ...


@runtime_checkable
class LooksAhead(Protocol):
    """A worker that finds out in advance what there is to do, where it is told which shards it will be given."""

    def expect(self, shards: Sequence[str], /) -> None:
        """It will be given these, in this order."""
        ...


class Work(Protocol[Result_co]):
    """What is to be done to each shard; it can be pickled."""

    @property
    def total(self) -> int | None:
        """Units in all; None where that is not known."""
        ...

    @property
    def unit(self) -> str:
        """What the progress counts: `images`, or SHARDS."""
        ...

    @property
    def is_light(self) -> bool:
        """Whether it takes milliseconds and holds no model: several shards at a time on one machine."""
        ...

    @property
    def has_models(self) -> bool:
        """Whether a GPU does it, where there is one."""
        ...

    def open(self) -> Worker[Result_co]:
        """Make it ready in this process."""
        ...


class Engine(Protocol):
    """Carries work out, somewhere."""

    def run(
        self, work: Work[Result], shards: Sequence[str], progress: Progress | None = None
    ) -> Iterator[tuple[str, Result]]:
        """(shard, result) of each shard, in any order. The first error of the work ends it."""
        ...


SHARDS = "shards"
"""Unit of work whose progress the engine counts itself."""
