"""`capfilt download`: a table of URLs and captions becomes committed shards.

In: a table (see url_table), a run directory. Out: RUN/shards/NNNNN.tar and .parquet, a row for every row of
the table with its status and reason, failures in RUN/quarantine too.

The table is cut into shards (`download_loop` has them downloaded). Committed ones are never downloaded again; one that
was removed is, but for the rows that `capfilt retry` has put into a later shard.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

from capfilt.curation.download_loop import FAILED_PREFIX, ShardPlan, download_shards, shard_name
from capfilt.curation.parts import plan_shards
from capfilt.curation.url_table import UrlTable, open_url_table
from capfilt.data.commit import CommitRecord, read_commit_record, stage_state
from capfilt.data.per_shard import of_each, records_of
from capfilt.data.reasons import shorten_counts
from capfilt.data.retries import planned_shards, superseded_reasons
from capfilt.data.rundir import RunDir
from capfilt.engines.base import Engine
from capfilt.errors import UsageError
from capfilt.progress import NullProgress, Progress, counted
from capfilt.settings import DownloadSettings

STAGE_VERSION = 1
"""Raised when the same table and settings would give other shards."""

PORTS, PRIVATE = "ports", "allow_private_addresses"
"""Entries of the commit records: the settings of the exchange that decide what may be asked for at all."""


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
        total = f"{self.num_succeeded:,} of {self.num_rows:,} URLs in {counted(self.num_shards, 'shard')}"
        if not self.num_new_shards:
            return f"Nothing to download: {total} are there already."
        worst = shorten_counts(self.failures)
        failed = f"; failed: {worst}" if worst else ""
        return f"Downloaded {total} in {self.seconds:.1f} s ({counted(self.num_new_shards, 'new shard')}{failed})."


def download(
    table: str,
    run: RunDir,
    settings: DownloadSettings,
    progress: Progress | None = None,
    *,
    engine: Engine | None = None,
) -> DownloadSummary:
    """Download what of `table` is not in `run` yet; `engine` has it done by other machines.

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
            for shard in planned_shards(run)[:1]:
                refuse_closed_networks(run, read_commit_record(run.stage_file("shards", shard)), settings)
            plan = ShardPlan(
                table_sha256=urls.sha256, columns=tuple(urls.extra), sizes=sizes, fields=fields,
                extra={"num_shards": len(sizes), "source_rows": urls.num_rows, **exchange_facts(settings)},
            )  # fmt: skip
            download_shards(run, settings, plan, urls, missing, staging, progress or NullProgress(), engine)
        return _summary(run, urls, len(missing), time.monotonic() - started)


def exchange_facts(settings: DownloadSettings) -> dict[str, str | int]:
    """What the commit records say of the exchange, for `capfilt retry`."""
    return {PORTS: ",".join(map(str, settings.ports)), PRIVATE: int(settings.allow_private_addresses)}


def download_fields(table_sha256: str, settings: DownloadSettings) -> dict[str, Any]:
    """Everything that decides what the shards hold; a change of it needs another run."""
    fields = {name: getattr(settings, name) for name in settings.fingerprint_fields}
    if settings.num_shards is not None:
        fields["samples_per_shard"] = None
    if settings.robots_txt:
        fields["robots_txt"] = True
    return fields | {"stage_version": STAGE_VERSION, "table_sha256": table_sha256}


def refuse_closed_networks(run: RunDir, record: CommitRecord, settings: DownloadSettings) -> None:
    """UsageError where a shard was downloaded with private addresses, and what is asked for now would do without."""
    if _was_open(record) and not settings.allow_private_addresses:
        raise UsageError(
            f"{run.path} was begun with private addresses and all ports open; without them the rest would fail. "
            "Give --allow-private-addresses again (in a recipe, allow_private_addresses = true)."
        )


def has_open_networks(run: RunDir) -> bool:
    """Whether the shards of a run were downloaded with private addresses."""
    return any(_was_open(read_commit_record(run.stage_file("shards", shard))) for shard in planned_shards(run)[:1])


def _was_open(record: CommitRecord) -> bool:
    return bool(record.extra.get(PRIVATE))


def _missing_shards(run: RunDir, sizes: list[int], fields: dict[str, Any], digest: str) -> list[int]:
    done = set(planned_shards(run))
    for _ in of_each(run, sorted(done), lambda name: stage_state(run, "shards", name, fields, digest)):
        pass  # it raises where a shard is of another download
    return [number for number in range(len(sizes)) if shard_name(number) not in done]


def _summary(run: RunDir, urls: UrlTable, num_new: int, seconds: float) -> DownloadSummary:
    records = list(records_of(run, "shards", run.shard_names()))
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
        name.removeprefix(FAILED_PREFIX): int(count)
        for name, count in record.extra.items()
        if name.startswith(FAILED_PREFIX)
    }
