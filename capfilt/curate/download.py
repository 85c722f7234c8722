"""`capfilt download`: a table of URLs and captions becomes committed shards.

In: a table (see url_table), a run directory. Out: RUN/shards/NNNNN.tar and .parquet, a row for every row of
the table with its status and reason, failures in RUN/quarantine too.

The table is cut into shards; each shard is downloaded by a supervised worker process (img2dataset's reader,
resizer and formats, this project's fetch) in a private staging directory, read back, and committed by this
process. A worker that dies or hangs is replaced and its shard tried once more; a shard that fails again is
named at the end and the command fails. Committed shards are never downloaded again.
"""

from __future__ import annotations

import errno
import os
import selectors
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from capfilt.curate.parts import Part, plan_shards, write_parts
from capfilt.curate.supervision import Attempts, Nursery, Worker
from capfilt.curate.url_table import UrlTable, open_url_table
from capfilt.data.commit import CommitRecord, commit_stage, read_commit_record, stage_state
from capfilt.data.reasons import Quarantined, shorten_counts
from capfilt.data.retries import planned_shards, superseded_reasons
from capfilt.data.rundir import RunDir
from capfilt.data.schemas import SCHEMAS
from capfilt.errors import CapfiltError
from capfilt.progress import NullProgress, Progress
from capfilt.settings import DownloadSettings

STAGE_VERSION = 1
"""Raised when the same table and settings would give other shards."""

_REASON_PREFIX = "failed_"
_FATAL_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO})
_WAIT_SECONDS = 0.5
_PAUSE_NOTICED_SECONDS = 5.0


@dataclass(frozen=True, kw_only=True)
class DownloadSummary:
    """What a download did, and what the run's shards hold now."""

    num_rows: int
    """Rows of the table."""
    num_succeeded: int
    """Rows whose picture is in a shard."""
    failures: dict[str, int]
    """Reason code → rows, the most frequent first."""
    num_shards: int
    """Shards of the run, those of rows that were tried again included."""
    num_new_shards: int
    """Shards that this command downloaded."""
    notes: tuple[str, ...]
    """Columns of the table that were left out, and why."""
    seconds: float

    def line(self) -> str:
        """One line for people."""
        total = f"{self.num_succeeded:,} of {self.num_rows:,} URLs in {self.num_shards:,} shards"
        if not self.num_new_shards:
            return f"Nothing to download: {total} are there already."
        worst = shorten_counts(self.failures)
        failed = f"; failed: {worst}" if worst else ""
        return f"Downloaded {total} in {self.seconds:.1f} s ({self.num_new_shards:,} new shards{failed})."


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


def download(table: str, run: RunDir, settings: DownloadSettings, progress: Progress | None = None) -> DownloadSummary:
    """Download what of `table` is not in `run` yet.

    Raises:
        UsageError: the table or its columns cannot be used.
        FingerprintMismatchError: the run holds shards of another table or of other settings.
        RunLockedError: another command works on the run.
        CapfiltError: shards failed more often than they are tried, or the disk refuses.
    """
    started = time.monotonic()
    with run.lock(), run.new_staging() as staging:
        urls = open_url_table(table, settings.url_column, settings.caption_column, staging)
        sizes = plan_shards(urls.num_rows, settings.samples_per_shard, settings.num_shards)
        fields = download_fields(urls.sha256, settings)
        missing = _missing_shards(run, sizes, fields, urls.sha256)
        if missing:
            plan = ShardPlan(
                urls=urls, sizes=sizes, fields=fields,
                extra={"num_shards": len(sizes), "source_rows": urls.num_rows},
            )  # fmt: skip
            download_shards(run, settings, plan, missing, staging, progress or NullProgress())
        return _summary(run, urls, len(missing), time.monotonic() - started)


@dataclass(frozen=True, kw_only=True)
class ShardPlan:
    """What is to be downloaded into which shards."""

    urls: UrlTable
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
    missing: Sequence[int],
    staging: Path,
    progress: Progress,
) -> None:
    """Download and commit those shards of a plan that are missing. Raises CapfiltError when some failed for good."""
    _Download(run, settings, plan, staging, progress).run_all(missing)


def download_fields(table_sha256: str, settings: DownloadSettings) -> dict[str, Any]:
    """Everything that decides what the shards hold; a change of it needs another run."""
    fields = {name: getattr(settings, name) for name in settings.fingerprint_fields}
    if settings.num_shards is not None:
        fields["samples_per_shard"] = None
    if settings.robots_txt:
        fields["robots_txt"] = True
    return fields | {"stage_version": STAGE_VERSION, "table_sha256": table_sha256}


def shard_name(number: int) -> str:
    """Name of a shard as img2dataset writes it."""
    return f"{number:05d}"


def _missing_shards(run: RunDir, sizes: list[int], fields: dict[str, Any], digest: str) -> list[int]:
    done = set(planned_shards(run))
    for name in sorted(done):
        stage_state(run, "shards", name, fields, digest)  # raises where it is of another download
    return [number for number in range(len(sizes)) if shard_name(number) not in done]


def _summary(run: RunDir, urls: UrlTable, num_new: int, seconds: float) -> DownloadSummary:
    records = [read_commit_record(run.stage_file("shards", name)) for name in run.shard_names()]
    failures: Counter[str] = Counter()
    for record in records:
        failures.update(_failures_of(record))
    failures -= superseded_reasons(run)
    return DownloadSummary(
        num_rows=urls.num_rows,
        num_succeeded=sum(record.rows_kept for record in records),
        failures=dict(failures.most_common()),
        num_shards=len(records),
        num_new_shards=num_new,
        notes=urls.notes,
        seconds=seconds,
    )


def _failures_of(record: CommitRecord) -> dict[str, int]:
    return {
        name.removeprefix(_REASON_PREFIX): int(count)
        for name, count in record.extra.items()
        if name.startswith(_REASON_PREFIX)
    }


class _Download:
    """The loop that keeps the workers busy and commits what they hand in."""

    def __init__(
        self,
        run: RunDir,
        settings: DownloadSettings,
        plan: ShardPlan,
        staging: Path,
        progress: Progress,
    ) -> None:
        self._run, self._settings, self._plan = run, settings, plan
        self._staging, self._progress = staging, progress
        self._nursery = Nursery(settings, staging)
        self._workers: list[Worker] = []
        self._selector = selectors.DefaultSelector()
        self._splits: deque[_Split] = deque()
        self._ready: deque[_Shard] = deque()
        self._failed: list[_Shard] = []
        self._num_ok = 0

    def run_all(self, missing: Sequence[int]) -> None:
        """Download and commit the missing shards. Raises CapfiltError when some failed for good."""
        plan = self._plan
        wanted = {number - plan.first for number in missing}
        self._parts = write_parts(plan.urls, plan.sizes, wanted, self._staging)
        num_rows = sum(plan.size_of(number) for number in missing)
        self._progress.start("download", num_rows, "URLs")
        try:
            for _ in range(min(self._settings.num_processes, len(missing))):
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
            self._progress.finish()
        finally:
            for worker in self._workers:
                worker.stop()
            self._nursery.stop()
            self._selector.close()
        if self._failed:
            raise _incomplete(self._failed, len(missing))

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
            "extra": list(self._plan.urls.extra),
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
            self._put_back(worker.task) if worker.ended_unborn() else self._task_failed(worker.task, problem)
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
        record = commit_stage(
            self._run,
            "shards",
            shard.name,
            rows.select([*SCHEMAS["shards"].names, *self._plan.urls.extra]),
            fields=self._plan.fields,
            input_digest=self._plan.urls.sha256,
            rows_in=shard.num_rows,
            quarantine=quarantine,
            tar=shard.attempt_dir / "shard.tar",
            extra=self._plan.extra | {_REASON_PREFIX + reason: count for reason, count in counts.items()},
        )
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


def _incomplete(failed: list[_Shard], num_missing: int) -> CapfiltError:
    lines = [f"{shard.name}: {'; '.join(shard.attempts.problems)}" for shard in failed[:10]]
    return CapfiltError(
        f"{len(failed)} of {num_missing} shards could not be downloaded: "
        + "\n  ".join(["", *lines]).rstrip()
        + "\nThe others are committed. Repeat the command to try these again."
    )
