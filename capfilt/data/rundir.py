"""The run directory: where every file of a run lies, its lock, and the private staging of an attempt.

    RUN/run.json              format version and date
    RUN/.lock                 held (flock) by the command that writes; contains its process id
    RUN/.workers              held (flock, shared) by processes that work for it on other machines
    RUN/.publish              held (flock) for the moment in which a tar and its record get their names
    RUN/.staging/ATTEMPT/     files of an attempt that is under way; void as soon as its process is gone
    RUN/shards/00000.tar      images and captions        RUN/shards/00000.parquet   its commit record and rows
    RUN/STAGE/00000.parquet   what a stage made of a shard; RUN/STAGE@NAME/ in the generation NAME
    RUN/quarantine/STAGE-00000.parquet

In: a path. Out: paths, the names of committed shards, the lock. What is inside the files is not known here.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from uuid import uuid4

from capfilt import __version__
from capfilt.data.whole_files import whole_file
from capfilt.errors import RunLockedError, UsageError

FORMAT_VERSION = 1
"""Version of the layout and of the commit records; a run of a later version is refused."""

STAGES = ("shards", "captions", "clip", "itm", "manifest")
"""Stages in the order in which one feeds the next."""

_LOCKS = (".lock", ".workers", ".publish")
_GENERATION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_SHARD = re.compile(r"[0-9]{5,}")
_held_locks: dict[Path, int] = {}  # of this process, so that a command may take the lock again in its parts
_joined: dict[Path, int] = {}  # descriptors of this process by which it is known as a worker

_WORKERS_END_SECONDS = 60.0
"""How long the workers of a dead command are waited for."""


class RunDir:
    """One run directory, seen in one generation. Make it with `create` or `open`."""

    def __init__(self, path: Path, generation: str | None = None) -> None:
        if generation is not None and not _GENERATION.fullmatch(generation):
            raise UsageError(
                f"The generation is named {generation!r}; expected a letter or digit, then letters, digits, "
                "'.', '_' or '-'. Give another name: --generation NAME."
            )
        self.path = path
        self.generation = generation

    @classmethod
    def create(cls, path: str | Path, generation: str | None = None) -> RunDir:
        """Open the run at `path`, making the directory and its run.json where they are missing."""
        root = Path(path)
        if root.exists() and not root.is_dir():
            raise UsageError(f"{root} is a file; a run is a directory. Name another path.")
        if not (root / "run.json").exists():
            root.mkdir(parents=True, exist_ok=True)
            content = {
                "format_version": FORMAT_VERSION,
                "created": datetime.now(UTC).isoformat(timespec="seconds"),
                "capfilt": __version__,
            }
            with whole_file(root / "run.json") as file:
                json.dump(content, file, indent=2)
            sync_directory(root)
        return cls.open(root, generation)

    @classmethod
    @contextmanager
    def new(cls, path: str | Path, generation: str | None = None) -> Iterator[RunDir]:
        """`create`, for a command that fills the run; what it made is removed where a UsageError leaves it empty."""
        was_there, was_run = Path(path).exists(), (Path(path) / "run.json").exists()
        run = cls.create(path, generation)
        try:
            yield run
        except UsageError:
            if not was_run:
                with suppress(OSError):  # the error is what the user must read
                    run._remove_empty(with_directory=not was_there)
            raise

    @classmethod
    def open(cls, path: str | Path, generation: str | None = None) -> RunDir:
        """Open an existing run. Raises UsageError when `path` is not a run of a version that is read."""
        root = Path(path)
        try:
            version = json.loads((root / "run.json").read_text(encoding="utf-8"))["format_version"]
        except FileNotFoundError:
            raise UsageError(
                f"{root} is not a run: it has no run.json. Make one: `capfilt download TABLE {root}` "
                f"or `capfilt import TARS {root}`."
            ) from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UsageError(
                f"{root}/run.json cannot be read ({error}); expected what `capfilt` wrote when it made the "
                "run. Restore it from a copy."
            ) from None
        if version != FORMAT_VERSION:
            raise UsageError(
                f"{root} has format version {version}; this capfilt reads {FORMAT_VERSION}. "
                "Install the capfilt that made it, or make a new run."
            )
        return cls(root, generation)

    def shard_names(self) -> list[str]:
        """Names of the shards that are committed, in order."""
        return self.committed("shards")

    def committed(self, stage: str) -> list[str]:
        """Names of the shards that have a file of `stage` in this generation's view, in order."""
        names = self._own_names(stage)
        if self._falls_back(stage):
            made_anew = set[str]().union(*map(self._own_names, self._stages_before(stage)))
            names |= {path.stem for path in (self.path / stage).glob("*.parquet")} - made_anew
        return sorted((name for name in names if _SHARD.fullmatch(name)), key=lambda name: (len(name), name))

    def stage_file(self, stage: str, shard: str) -> Path:
        """Where `stage` of `shard` is written in this generation. Shards have no generations."""
        return self.path / self._folder(stage) / f"{shard}.parquet"

    def read_file(self, stage: str, shard: str) -> Path:
        """Where `stage` of `shard` is read: this generation's file, or the default's where it has none.

        Nothing falls back behind a stage that the generation made anew: scores belong to the captions they are of. Nor
        does the manifest: a generation is what its own manifest says.
        """
        own = self.stage_file(stage, shard)
        if not self._falls_back(stage) or own.exists():
            return own
        if any(self.stage_file(before, shard).exists() for before in self._stages_before(stage)):
            return own
        return self.path / stage / f"{shard}.parquet"

    def tar_path(self, shard: str) -> Path:
        """Where the images of `shard` are."""
        return self.path / "shards" / f"{shard}.tar"

    def quarantine_file(self, stage: str, shard: str) -> Path:
        """Where the quarantine of `stage` and `shard` is written in this generation."""
        return self.path / "quarantine" / f"{self._folder(stage)}-{shard}.parquet"

    def read_quarantine_file(self, stage: str, shard: str) -> Path:
        """Where the quarantine that belongs to `read_file(stage, shard)` is."""
        folder = self.read_file(stage, shard).parent.name
        return self.path / "quarantine" / f"{folder}-{shard}.parquet"

    def generations(self) -> list[str]:
        """Names of the generations beside the default one that have any stage."""
        names = {folder.name.partition("@")[2] for stage in STAGES for folder in self.path.glob(f"{stage}@*")}
        return sorted(names)

    def _remove_empty(self, *, with_directory: bool) -> None:
        """Remove the run where it holds nothing but what every run has."""
        with self.lock():
            if not {entry.name for entry in self.path.iterdir()} <= {"run.json", *_LOCKS, ".staging"}:
                return
            shutil.rmtree(self.path / ".staging", ignore_errors=True)
            for name in ("run.json", *_LOCKS):
                (self.path / name).unlink(missing_ok=True)
            if with_directory:
                self.path.rmdir()

    @property
    def generation_option(self) -> str:
        """What a command advised for this run needs: empty, or ` --generation NAME`."""
        return f" --generation {self.generation}" if self.generation else ""

    def _folder(self, stage: str) -> str:
        if stage not in STAGES:
            raise ValueError(f"stage is {stage!r}; expected one of {', '.join(STAGES)}")
        return stage if self.generation is None or stage == "shards" else f"{stage}@{self.generation}"

    def _own_names(self, stage: str) -> set[str]:
        """Of the shards that have a file of this generation's own."""
        return {path.stem for path in self.stage_file(stage, "0").parent.glob("*.parquet")}

    def _stages_before(self, stage: str) -> tuple[str, ...]:
        """Those of which a generation has its own, before `stage`."""
        return STAGES[1 : STAGES.index(stage)]

    def _falls_back(self, stage: str) -> bool:
        return self.generation is not None and stage not in ("shards", "manifest")

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run for this process; within it the lock may be taken again.

        Raises RunLockedError with the process id of the holder. Staging left by dead attempts is removed.
        """
        root = self.path.resolve()
        if _held_locks.get(root, 0):
            _held_locks[root] += 1
            try:
                yield
            finally:
                _held_locks[root] -= 1
            return
        try:
            descriptor = os.open(root / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise UsageError(
                f"{self.path} cannot be written to ({error.strerror}); expected a run of your own. Mend its "
                f"permissions: `chmod -R u+rwX {self.path}`."
            ) from None
        try:
            _take_lock(descriptor, self.path)
            _held_locks[root] = 1
            try:
                _wait_for_workers(root, self.path)
                _remove_dead_staging(root / ".staging")
                yield
            finally:
                del _held_locks[root]
                os.ftruncate(descriptor, 0)
        finally:
            os.close(descriptor)

    def join(self) -> None:
        """Be a worker of the command that holds the run, until this process ends; where it is this one, nothing.

        Should that command die first, the next one waits until its workers are gone.
        """
        root = self.path.resolve()
        if root not in _joined and not _held_locks.get(root, 0):
            _joined[root] = os.open(root / ".workers", os.O_RDWR | os.O_CREAT, 0o666)
            fcntl.flock(_joined[root], fcntl.LOCK_SH)

    @contextmanager
    def publishing(self) -> Iterator[None]:
        """Hold what one process holds at a time, on any machine: one that is taken for dead may still be at work."""
        descriptor = os.open(self.path / ".publish", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    @contextmanager
    def new_staging(self) -> Iterator[Path]:
        """Give a private, empty directory on the run's file system; it is removed at the end.

        It carries a lock that ends with this process, so that the next command knows it as dead.
        """
        attempt = self.path / ".staging" / f"{os.getpid()}-{uuid4().hex[:12]}"
        attempt.mkdir(parents=True)
        descriptor = os.open(attempt / ".alive", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield attempt
        finally:
            shutil.rmtree(attempt, ignore_errors=True)
            os.close(descriptor)


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable: a rename is on disk only after this."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _take_lock(descriptor: int, run: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip() or "unknown"
        raise RunLockedError(
            f"{run} is in use by process {holder}; one command at a time may write to a run. "
            f"Wait for it to end, or end it: kill {holder}"
        ) from None
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{os.getpid()}\n".encode("ascii"), 0)


def _wait_for_workers(root: Path, run: Path) -> None:
    """Return when no process is left that a dead command had set to work. Raises RunLockedError where they stay."""
    try:
        descriptor = os.open(root / ".workers", os.O_RDWR)
    except FileNotFoundError:
        return
    end = time.monotonic() + _WORKERS_END_SECONDS
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() > end:
                    raise RunLockedError(
                        f"Workers of a command that has ended are still at {run}. End them (`ray stop`, or their "
                        "machines), and repeat the command."
                    ) from None
                time.sleep(0.05)
    finally:
        os.close(descriptor)


def _remove_dead_staging(staging: Path) -> None:
    """Remove the attempts whose process is gone: their lock can be taken."""
    for attempt in staging.glob("*"):
        try:
            descriptor = os.open(attempt / ".alive", os.O_RDWR)
        except OSError:  # died before it could lock, or no attempt at all
            shutil.rmtree(attempt, ignore_errors=True)
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(attempt, ignore_errors=True)
        except BlockingIOError:
            pass
        finally:
            os.close(descriptor)
