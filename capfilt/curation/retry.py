"""`capfilt retry`: addresses that failed are tried again, and only those, into the same run.

In: a downloaded run, the reasons whose rows are to be tried. Out: further shards behind those of the table, with the
rows that were tried and what came of them (`capfilt.data.retries`); the other stages are made of them as of any shard.

An interrupted attempt leaves the shards that it has committed; the same command tries what still fails.
"""

from __future__ import annotations

import glob
import time
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from capfilt.curation.download import PORTS, STAGE_VERSION, exchange_facts, refuse_closed_networks
from capfilt.curation.download_loop import ShardPlan, download_shards, shard_name
from capfilt.curation.parts import plan_shards
from capfilt.curation.politeness import RETRIED_REASONS
from capfilt.curation.url_table import CAPTION, URL, UrlTable, open_url_table
from capfilt.data.commit import CommitRecord, read_commit_record, read_table
from capfilt.data.paths import remove
from capfilt.data.reasons import REASON_SENTENCES, SETTLED_REASONS, shorten_counts
from capfilt.data.retries import RETRY, RETRY_OF, LastAttempts, planned_shards
from capfilt.data.rundir import RunDir
from capfilt.data.schemas import SCHEMAS
from capfilt.errors import CapfiltError, UsageError
from capfilt.progress import NullProgress, Progress, counted
from capfilt.settings import DownloadSettings
from capfilt.settings.values import nearest_or_all

RETRIED_BY_DEFAULT = (*sorted(RETRIED_REASONS), "worker_failed", "retried")
"""Reasons that may pass by themselves; `retried` counts where the later shard is gone."""


@dataclass(frozen=True, kw_only=True)
class RetrySummary:
    """What an attempt did."""

    reasons: tuple[str, ...]
    num_tried: int
    """Rows that had failed for one of the reasons, and were tried again."""
    num_succeeded: int
    failures: dict[str, int]
    """Reason → rows of those tried that failed again, the most frequent first."""
    num_new_shards: int
    seconds: float

    def line(self) -> str:
        """One line for people."""
        if not self.num_tried:
            return f"Nothing to try again: no row's last attempt failed for {', '.join(self.reasons)}."
        worst = shorten_counts(self.failures)
        return (
            f"Tried {counted(self.num_tried, 'URL')} again: {self.num_succeeded:,} succeeded, in "
            f"{counted(self.num_new_shards, 'new shard')}, in {self.seconds:.1f} s"
            f"{f'; failed: {worst}' if worst else ''}."
        )


def retry(
    run: RunDir, reasons: Sequence[str], settings: DownloadSettings, progress: Progress | None = None
) -> RetrySummary:
    """Try the rows again whose last attempt failed for one of `reasons` (empty: those that may pass).

    Of `settings` those count that change no picture: time, processes, threads, addresses; the others are the run's.

    Raises:
        UsageError: an unknown reason, or a run that was not downloaded.
        CapfiltError: the download has not ended, or as `download`.
        RunLockedError: another command works on the run.
    """
    started, chosen = time.monotonic(), tuple(dict.fromkeys(reasons)) or RETRIED_BY_DEFAULT
    for reason in chosen:
        if reason not in REASON_SENTENCES:
            raise UsageError(f"There is no reason {reason!r}.{nearest_or_all(reason, REASON_SENTENCES)}")
        if reason in SETTLED_REASONS:
            raise UsageError(f"Rows that failed for {reason} fail again. {REASON_SENTENCES[reason]}")
    with run.lock(), run.new_staging() as staging:
        first = _first_record(run)
        table = _write_failed_rows(run, set(chosen), staging / "failed.parquet")
        if table is None:
            return _summary(run, chosen, [], started)
        urls = _open(table, staging)
        made_with = _settings_of(run, first, settings)
        sizes = plan_shards(urls.num_rows, made_with.samples_per_shard, None)
        behind = max(int(name) for name in run.shard_names()) + 1
        _remove_strays(run, planned=int(first.extra["num_shards"]))
        plan = ShardPlan(
            table_sha256=urls.sha256, columns=tuple(urls.extra), sizes=sizes, first=behind,
            fields={**first.fields, "stage_version": STAGE_VERSION, "table_sha256": urls.sha256, RETRY: list(chosen)},
            extra={RETRY: ",".join(chosen), **exchange_facts(made_with)},
        )  # fmt: skip
        numbers = range(behind, behind + len(sizes))
        download_shards(run, made_with, plan, urls, numbers, staging, progress or NullProgress())
        return _summary(run, chosen, [shard_name(number) for number in numbers], started)


def _first_record(run: RunDir) -> CommitRecord:
    """The commit record of the table's first shard, of a download that has ended."""
    shards = planned_shards(run)
    if not shards:
        raise UsageError(f"No shards in {run.path}/shards. Run `capfilt download TABLE {run.path}` first.")
    first = read_commit_record(run.stage_file("shards", shards[0]))
    if "table_sha256" not in first.fields:
        raise UsageError(f"{run.path} was imported, not downloaded: there is no address to try again.")
    if len(shards) < int(first.extra["num_shards"]):
        raise CapfiltError(
            f"The download of {run.path} has not ended: {len(shards)} of {first.extra['num_shards']} shards are there. "
            "Repeat `capfilt download` first."
        )
    return first


def _write_failed_rows(run: RunDir, reasons: Collection[str], path: Path) -> Path | None:
    """A table of the rows whose last attempt failed for one of the reasons; None where there is none."""
    writer = None
    for table in _failed_rows(run, reasons, LastAttempts(run)):
        writer = writer or pq.ParquetWriter(path, table.schema)
        writer.write_table(table.select(writer.schema.names).cast(writer.schema))
    if writer is None:
        return None
    writer.close()
    return path


def _failed_rows(run: RunDir, reasons: Collection[str], last: LastAttempts) -> Iterator[pa.Table]:
    for shard in run.shard_names():
        rows = read_table(run.stage_file("shards", shard))
        rows = last.of(shard, rows.filter(pc.is_in(rows["reason"], pa.array(sorted(reasons)))))
        if not rows.num_rows:
            continue
        carried = [name for name in rows.column_names if name not in SCHEMAS["shards"].names]
        if RETRY_OF not in carried:
            rows, carried = rows.append_column(RETRY_OF, rows["key"]), [*carried, RETRY_OF]
        yield rows.select([URL, CAPTION, *carried])


def _open(table: Path, staging: Path) -> UrlTable:
    urls = open_url_table(glob.escape(str(table)), URL, CAPTION, staging)
    return replace(urls, extra={**urls.extra, RETRY_OF: pa.string()})


def _remove_strays(run: RunDir, planned: int) -> None:
    """Remove the tars that an interrupted attempt left without a commit record: no command comes back to them."""
    committed = set(run.shard_names())
    for name in run.tar_names():
        if name.isdecimal() and int(name) >= planned and name not in committed:
            remove(run.tar_path(name))


def _settings_of(run: RunDir, record: CommitRecord, settings: DownloadSettings) -> DownloadSettings:
    """The settings of the run's pictures, and those given for the exchange; its ports are the run's too.

    Raises UsageError where the run had private addresses open and the settings do not.
    """
    refuse_closed_networks(run, record, settings)
    made_with: dict[str, Any] = {name: record.fields[name] for name in DownloadSettings.fingerprint_fields}
    made_with |= {
        "robots_txt": record.fields.get("robots_txt", False),
        "num_shards": None,
        "samples_per_shard": made_with["samples_per_shard"] or record.rows_in,
    }
    if ports := str(record.extra.get(PORTS, "")):
        made_with["ports"] = tuple(int(port) for port in ports.split(","))
    return replace(settings, **made_with)


def _summary(run: RunDir, reasons: tuple[str, ...], shards: Sequence[str], started: float) -> RetrySummary:
    failures, tried, succeeded = Counter[str](), 0, 0
    for shard in shards:
        rows = read_table(run.stage_file("shards", shard), columns=["reason"])
        tried += rows.num_rows
        found = Counter(rows["reason"].to_pylist())
        succeeded += found.pop(None, 0)
        failures.update(found)
    return RetrySummary(
        reasons=reasons, num_tried=tried, num_succeeded=succeeded, failures=dict(failures.most_common()),
        num_new_shards=len(shards), seconds=time.monotonic() - started,
    )  # fmt: skip
