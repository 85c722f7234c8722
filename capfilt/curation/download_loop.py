"""Shards that are to be downloaded go to worker processes, and what those hand in is committed.

In: a plan of shards, the numbers of those that are missing. Out: their committed files in RUN/shards, and failures in
RUN/quarantine.

Each shard is downloaded by a supervised worker process (img2dataset's reader, resizer and formats, this project's
fetch) in a private staging directory, read back, and committed by the process that supervises it: this one, or that of
an engine's worker, which is handed a part of the table. A worker that dies or hangs is replaced and its shard tried
once more; a shard that fails again is named at the end and the command fails.
"""

from __future__ import annotations

import errno
import os
import selectors
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from capfilt.curation.parts import Part, write_parts
from capfilt.curation.supervision import Attempts, Nursery, Worker
from capfilt.curation.url_table import UrlTable
from capfilt.data.commit import commit_stage, read_commit_record
from capfilt.data.paths import AnyPath, copy_to, exists
from capfilt.data.reasons import Quarantined
from capfilt.data.retries import retried_keys
from capfilt.data.rundir import RunDir
from capfilt.data.schemas import SCHEMAS
from capfilt.data.timings import Timing, note_timing
from capfilt.engines.base import Engine
from capfilt.engines.local import LocalEngine
from capfilt.errors import CapfiltError, CommittedError
from capfilt.progress import Progress
from capfilt.settings import DownloadSettings

FAILED_PREFIX = "failed_"
"""Entries of the commit records: this and a reason → rows that failed for it."""

_FATAL_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO})
_WAIT_SECONDS = 0.5
_PAUSE_NOTICED_SECONDS = 5.0


@dataclass(frozen=True, kw_only=True)
class ShardPlan:
    """What is to be downloaded into which shards."""

    table_sha256: str
    columns: tuple[str, ...]
    """Of the table, that the shards carry besides."""
    sizes: list[int]
    """Rows of each shard, in the order of the table."""
    fields: dict[str, Any]
    """What the shards' fingerprint covers."""
    extra: dict[str, str | int]
    """What their commit records say besides."""
    first: int = 0
    """Number of the first shard."""

    def size_of(self, number: int) -> int:
        """Rows of the shard of that number."""
        return self.sizes[number - self.first]


def download_shards(
    run: RunDir,
    settings: DownloadSettings,
    plan: ShardPlan,
    urls: UrlTable,
    missing: Sequence[int],
    staging: Path,
    progress: Progress,
    engine: Engine | None = None,
) -> None:
    """Download and commit those shards of a plan that are missing; `engine` has it done elsewhere, part by part.

    Raises CapfiltError when some failed for good.
    """
    wanted = {number - plan.first for number in missing}
    num_rows, failed = sum(plan.size_of(number) for number in missing), list[str]()
    with _noted(run, plan, missing):
        if engine is None or isinstance(engine, LocalEngine):  # whose processes go from part to part
            parts = write_parts(urls, plan.sizes, wanted, staging)
            progress.start("download", num_rows, "URLs")
            failed += _Download(run, settings, plan, staging, progress, parts).run_all(len(missing))
            progress.finish()
        else:
            part_rows = settings.num_processes * max(plan.sizes)  # what one worker downloads at a time
            parts = write_parts(urls, plan.sizes, wanted, staging, part_rows)
            with run.sharing() as share:
                shared = {shard_name(p.numbers[0] + plan.first): _SharedPart(p.numbers, share(p.path)) for p in parts}
                num_rows = sum(plan.sizes[number] for part in shared.values() for number in part.numbers)
                work = _DownloadParts(run, settings, plan, shared, num_rows)
                for _, problems in engine.run(work, list(shared), progress):
                    failed += problems
    if failed:
        raise CapfiltError(
            "\n  ".join([f"{len(failed)} of {len(missing)} shards could not be downloaded: ", *failed[:10]])
            + "\nThe others are committed. Repeat the command to try these again."
        )


@contextmanager
def _noted(run: RunDir, plan: ShardPlan, missing: Sequence[int]) -> Iterator[None]:
    """Write down how long the shards took that are there at the end, by an error or an interruption too."""
    started = time.monotonic()
    try:
        yield
    finally:
        done = set(run.committed("shards"))
        num = sum(plan.size_of(number) for number in missing if shard_name(number) in done)
        seconds = time.monotonic() - started
        note_timing(run, Timing(stages={"shards": (num, seconds)}, seconds=seconds))


@dataclass(frozen=True)
class _SharedPart:
    """A part of the table where every worker finds it."""

    numbers: list[int]
    path: AnyPath


@dataclass(frozen=True)
class _DownloadParts:
    """The work of an engine's workers: a part of the table at a time, by processes of their own."""

    run: RunDir
    settings: DownloadSettings
    plan: ShardPlan
    parts: dict[str, _SharedPart]
    """By the name of the first shard."""
    total: int
    unit = "URLs"
    is_light, has_models = False, False
    title = "download"

    def open(self) -> _DownloadParts:
        """Nothing is loaded."""
        self.run.join()
        return self

    def __call__(self, name: str, progress: Progress) -> list[str]:
        """Download a part's shards but those that are there; gives what failed for good."""
        part, plan = self.parts[name], self.plan
        numbers = [number + plan.first for number in part.numbers]
        missing = [n for n in numbers if not exists(self.run.stage_file("shards", shard_name(n)))]
        progress.advance(sum(plan.size_of(number) for number in {*numbers} - {*missing}), already=True)
        if not missing:
            return []
        with self.run.new_staging() as staging:
            own = Part(part.numbers, staging / "part.parquet")
            copy_to(part.path, own.path)
            return _Download(self.run, self.settings, plan, staging, progress, iter([own])).run_all(len(missing))


def shard_name(number: int) -> str:
    """Name of a shard as img2dataset writes it."""
    return f"{number:05d}"


@dataclass(slots=True)
class _Shard:
    """One shard that is to be downloaded."""

    number: int
    num_rows: int
    feather: str = ""
    attempts: Attempts = field(default_factory=Attempts)
    attempt_dir: Path = Path()
    shown: int = 0
    """Rows already counted in the progress."""
    num_ok: int = 0
    """Successes of the present attempt."""

    @property
    def name(self) -> str:
        return shard_name(self.number)


@dataclass(slots=True)
class _Split:
    """A part of the table that img2dataset's reader splits into shards."""

    part: Part
    shards: list[_Shard]
    problems: list[str] = field(default_factory=list)


class _Download:
    """The loop that keeps the workers busy and commits what they hand in."""

    def __init__(
        self,
        run: RunDir,
        settings: DownloadSettings,
        plan: ShardPlan,
        staging: Path,
        progress: Progress,
        parts: Iterator[Part],
    ) -> None:
        self._run, self._settings, self._plan = run, settings, plan
        self._staging, self._progress, self._parts = staging, progress, parts
        self._nursery = Nursery(settings, staging)
        self._workers: list[Worker] = []
        self._selector = selectors.DefaultSelector()
        self._splits: deque[_Split] = deque()
        self._ready: deque[_Shard] = deque()
        self._failed: list[_Shard] = []
        self._retried = retried_keys(run)
        self._num_ok = 0

    def run_all(self, num_missing: int) -> list[str]:
        """Download and commit the shards of the parts that are not there; gives what failed for good, in words."""
        try:
            for _ in range(min(self._settings.num_processes, num_missing)):
                self._start_worker()
            last = time.monotonic()
            while self._hand_out():
                for key, _ in self._selector.select(_WAIT_SECONDS):
                    self._hear(key.fileobj)  # type: ignore[arg-type]
                # when this process itself was stopped for a while, the workers' silence says nothing
                paused = time.monotonic() - last > _PAUSE_NOTICED_SECONDS
                last = time.monotonic()
                for worker in list(self._workers):
                    worker.forgive() if paused else self._check(worker)
        finally:
            for worker in self._workers:
                worker.stop()
            self._nursery.stop()
            self._selector.close()
        return [f"{shard.name}: {'; '.join(shard.attempts.problems)}" for shard in self._failed]

    # --- tasks ----------------------------------------------------------------------------------------------

    def _hand_out(self) -> bool:
        """Give idle workers work. False when all is done."""
        for worker in self._workers:
            if worker.task is None:
                self._give_next(worker)
        return any(worker.task is not None for worker in self._workers)

    def _give_next(self, worker: Worker) -> None:
        splitting = any(isinstance(other.task, _Split) for other in self._workers)
        if self._ready:
            self._give_shard(worker, self._ready.popleft())
        elif self._splits:
            self._give_split(worker, self._splits.popleft())
        elif not splitting and (part := next(self._parts, None)) is not None:
            numbers = [number + self._plan.first for number in part.numbers]
            shards = [_Shard(number, self._plan.size_of(number)) for number in numbers]
            self._give_split(worker, _Split(part, shards))

    def _give_split(self, worker: Worker, split: _Split) -> None:
        done = set(self._run.shard_names())
        message = {
            "task": "split",
            "part": str(split.part.path),
            "first_shard": split.shards[0].number,
            "shard_rows": split.shards[0].num_rows,
            "done": [shard.number for shard in split.shards if shard.name in done],
            "extra": list(self._plan.columns),
            "to_dir": str(self._staging),
        }
        worker.give(split, message)

    def _give_shard(self, worker: Worker, shard: _Shard) -> None:
        shard.attempt_dir = self._staging / f"{shard.name}-{len(shard.attempts.deaths)}"
        shard.attempt_dir.mkdir()
        message = {
            "task": "download",
            "shard": shard.number,
            "feather": shard.feather,
            "samples_per_shard": max(self._plan.sizes),
            "skip": shard.attempts.blamed_rows,
            "retried": [key for key in self._retried if key.startswith(shard.name)],
            "to_dir": str(shard.attempt_dir),
        }
        worker.give(shard, message)

    # --- workers --------------------------------------------------------------------------------------------

    def _start_worker(self) -> None:
        worker = self._nursery.start_worker()
        self._workers.append(worker)
        self._selector.register(worker, selectors.EVENT_READ)

    def _check(self, worker: Worker) -> None:
        """Replace a worker that is dead or hangs; its task is tried again or given up."""
        if (problem := worker.failure()) is None:
            return
        self._selector.unregister(worker)
        self._workers.remove(worker)
        worker.stop()
        if worker.task is not None:
            self._put_back(worker.task) if worker.is_unborn() else self._task_failed(worker.task, problem)
        self._start_worker()

    def _hear(self, worker: Worker) -> None:
        for message in worker.read_messages():
            task = worker.task
            if "done" in message:
                self._show(task, message["done"], message["ok"])
                continue
            worker.task = None
            if "error" in message:
                if message["errno"] in _FATAL_ERRNOS:
                    raise CapfiltError(
                        f"The disk of {self._run.path} refuses: {os.strerror(message['errno'])}. Make room "
                        "or mend it and repeat the command, it goes on from the last committed shard."
                    )
                self._task_failed(task, message["error"])
            elif isinstance(task, _Split):
                self._take_split(task, message["result"])
            else:
                self._commit(task)

    def _take_split(self, split: _Split, feathers: dict[str, str]) -> None:
        for shard in split.shards:
            if (feather := feathers.get(str(shard.number))) is not None:
                shard.feather = feather
                self._ready.append(shard)
        split.part.path.unlink()

    def _task_failed(self, task: _Split | _Shard, problem: str) -> None:
        if isinstance(task, _Split):
            task.problems.append(problem)
            if len(task.problems) > 1:
                problems = "; ".join(task.problems)
                raise CapfiltError(f"The table could not be split into shards: {problems}. Repeat the command.")
            self._put_back(task)
            return
        task.attempts.add(problem, task.attempt_dir)
        if task.attempts.is_hopeless:
            _remove_files(task.attempt_dir)
            self._failed.append(task)
        else:
            self._put_back(task)

    def _put_back(self, task: _Split | _Shard) -> None:
        if isinstance(task, _Split):
            self._splits.append(task)
        else:
            _remove_files(task.attempt_dir)
            self._ready.appendleft(task)

    def _show(self, shard: _Shard, done: int, ok: int) -> None:
        """Count finished rows; those of a failed attempt are not counted twice."""
        self._num_ok += ok - shard.num_ok
        shard.num_ok = ok
        if done > shard.shown:
            self._progress.advance(done - shard.shown, succeeded=self._num_ok)
            shard.shown = done

    def _commit(self, shard: _Shard) -> None:
        """Read back what a worker wrote, and publish it."""
        with pa.ipc.open_file(str(shard.attempt_dir / "rows.arrow")) as file:
            rows = file.read_all()
        if rows.num_rows != shard.num_rows:
            raise CapfiltError(
                f"Shard {shard.name} came back with {rows.num_rows} rows of {shard.num_rows}. Repeat the command."
            )
        quarantine = _quarantine_of(rows)
        counts = Counter(row.reason for row in quarantine)
        try:
            record = commit_stage(
                self._run,
                "shards",
                shard.name,
                rows.select([*SCHEMAS["shards"].names, *self._plan.columns]),
                fields=self._plan.fields,
                input_digest=self._plan.table_sha256,
                rows_in=shard.num_rows,
                quarantine=quarantine,
                tar=shard.attempt_dir / "shard.tar",
                extra=self._plan.extra | {FAILED_PREFIX + reason: count for reason, count in counts.items()},
            )
        except CommittedError:  # by a worker of another machine that was taken for dead
            record = read_commit_record(self._run.stage_file("shards", shard.name))
        self._show(shard, shard.num_rows, record.rows_kept)
        _remove_files(shard.attempt_dir)
        Path(shard.feather).unlink()


def _quarantine_of(rows: pa.Table) -> list[Quarantined]:
    names = ["key", "reason", "detail", "body_sha256", "body_bytes"]
    columns = (rows[name].to_pylist() for name in names)
    return [
        Quarantined(key=key, reason=reason, detail=detail or "", sha256=digest, num_bytes=num_bytes)
        for key, reason, detail, digest, num_bytes in zip(*columns, strict=True)
        if reason is not None
    ]


def _remove_files(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()
