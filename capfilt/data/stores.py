"""What a run asks of the place where it lies: names, a lock, staging, and files that appear whole or not at all."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

from capfilt.data.paths import AnyPath


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """Files that one attempt at a stage of a shard has written and checked; they have no names in the run yet."""

    folder: str
    """Of the stage: `clip`, or `clip@NAME`."""
    shard: str
    staged: Path
    """The commit record's file."""
    quarantine: Path | None = None
    quarantine_seal: str = ""
    tar: Path | None = None
    tar_sha256: str = ""
    replace: bool = False
    """Whether an earlier commit gives way."""


class Store(Protocol):
    """A disk, or an object store."""

    def prepare(self) -> None:
        """Make the place of a new run."""
        ...

    def write_new(self, name: str, text: str) -> None:
        """Write a small file of the run whole; where it is there already, it stays."""
        ...

    def remove_empty(self, *, with_directory: bool) -> None:
        """Remove the run where it holds nothing but what every run has."""
        ...

    def lock(self) -> AbstractContextManager[None]:
        """Hold the run for this process; within it the lock may be taken again. RunLockedError names the holder."""
        ...

    def join(self) -> None:
        """Be a worker of the command that holds the run; the next command waits until its workers are gone."""
        ...

    def new_staging(self) -> AbstractContextManager[Path]:
        """A private, empty directory of this machine; removed at the end, or by the next command after a crash."""
        ...

    def sharing(self) -> AbstractContextManager[Callable[[Path], AnyPath]]:
        """Gives what hands a staged file to workers on other machines: where they find it, until the end of this."""
        ...

    def quarantine_name(self, folder: str, shard: str, seal: str) -> str:
        """Name of the quarantine of a stage of a shard, whose file has that seal."""
        ...

    def publish(self, attempt: Attempt) -> None:
        """Give the files their names: all of them, or to a reader none. CommittedError where another was first."""
        ...

    def open_tar(self, shard: str, sha256: str, *, anew: bool = False) -> AbstractContextManager[BinaryIO]:
        """The tar of a shard, to read wherever one likes in it; `anew`: not what was kept of an earlier reading.

        FileNotFoundError where there is none.
        """
        ...
