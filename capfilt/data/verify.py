"""Reconciles a run with itself: every file against its commit record, every stage against the one before.

In: a run directory. Out: a report; nothing is changed. One shard is in memory at a time, and eight bytes for
every key, to find keys that two shards share. What is looked at:
  - seals and checksums of every Parquet file; names, sizes, members and headers of every tar
  - rows in = kept + rejected + quarantined, kept and quarantined keys unique and disjoint
  - one stage's kept = the next one's rows in; digests chain from the tar to the manifest
  - texts, scores, ranks and verdicts of the stages agree; every row of the URL table has come to something
  - every row that was tried again is one that had failed
  - deep: every byte of every tar, every image against its digest
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from hashlib import blake2b
from typing import BinaryIO

import numpy as np
import pyarrow as pa

from capfilt.data.checks import CHECKS, check_human_manifest, check_manifest, check_shards
from capfilt.data.commit import (
    CommitRecord,
    input_digest,
    read_commit_record,
    read_quarantine,
    read_stage,
    read_table,
)
from capfilt.data.paths import exists, is_local, size_of
from capfilt.data.reconcile import check_counts, check_rows, check_tar, count_kept
from capfilt.data.retries import attempts_of, is_retry, needs_stages, planned_shards, retry_shards
from capfilt.data.rundir import STAGES, RunDir, is_shard_name
from capfilt.data.schemas import HUMAN
from capfilt.data.verify_report import Finding, Report, StageCounts
from capfilt.engines.base import SHARDS, Engine
from capfilt.engines.local import LocalEngine
from capfilt.errors import CorruptionError, UsageError
from capfilt.progress import Progress

_MAX_PROBLEMS_PER_FILE = 5
_MAX_SHARDS = 10_000_000
_DAMAGE = (CorruptionError, UsageError)
"""What a file that is not what was committed, or is gone, raises. That a store does not answer says nothing of it."""


def verify_run(
    run: RunDir, deep: bool = False, progress: Progress | None = None, *, engine: Engine | None = None
) -> Report:
    """Check everything in `run`: its own generation where it has one, else all of them.

    With `deep`, every byte of the tars is hashed as well. `engine` carries it out, unset: threads of this process.
    Never raises for damage: it is in the report.
    """
    report, keys = Report(), _KeyLedger()
    views = [run]
    if run.generation is None:
        views += [RunDir(run.path, name) for name in run.generations()]
    shards = run.shard_names()
    lost = _check_strays(run, views, set(shards), report)
    begun = {(view.generation, stage) for view in views for stage in STAGES[1:] if _has_begun(view, stage)}
    begun |= {(None, stage) for stage in _implied(stage for name, stage in begun if name is None)}
    work = _VerifyShards(run, views, deep, len(shards), begun)
    for shard, (part, digests) in (engine or LocalEngine()).run(work, shards, progress):
        report.merge(part)
        if digests is not None:
            keys.add(shard, digests)
    keys.report_shared(run, report)
    _check_plan(run, shards, lost, report)
    _check_retries(run, report)
    for view in views:
        _check_parameters(view, report)
    return report


@dataclass(frozen=True)
class _VerifyShards:
    """The part of `verify_run` that is done shard by shard."""

    run: RunDir
    views: list[RunDir]
    deep: bool
    total: int
    begun: set[tuple[str | None, str]]
    """(generation, stage) of which any shard has a file."""
    unit = SHARDS
    is_light, has_models = True, False
    title = "verify"

    def open(self) -> _VerifyShards:
        """Nothing is loaded."""
        return self

    def __call__(self, shard: str, _progress: Progress) -> tuple[Report, np.ndarray | None]:
        """What was found, and digests of the keys."""
        report = Report()
        rows = _verify_shard(self.run, shard, self.deep, report)
        if rows is None:
            return report, None
        for view in self.views:
            _verify_stages(view, shard, rows, self.begun, report)
        return report, _digests_of(rows["key"].to_pylist())


def _verify_shard(run: RunDir, shard: str, deep: bool, report: Report) -> pa.Table | None:
    """Check a shard's rows, quarantine and tar. Gives the rows, None when they cannot be trusted."""
    loaded = _verify_file(run, "shards", shard, report)
    if loaded is None:
        return None
    rows, record, quarantine = loaded
    tar, problems = run.tar_path(shard), list(check_shards(rows, quarantine))
    try:
        num_bytes = size_of(tar)
        if num_bytes is None or num_bytes != record.extra.get("tar_bytes"):
            size = "gone" if num_bytes is None else f"{num_bytes:,} bytes"
            raise ValueError(f"{tar.name} is {size}; {record.extra.get('tar_bytes', 0):,} bytes were committed")
        if deep or is_local(tar):  # to look into an object is to fetch it
            _verify_members(run, shard, rows, record, deep=deep)
    except (ValueError, OSError, CorruptionError) as error:
        problems.append(str(error))
    _add(report.findings, "shards", shard, problems)
    return rows


def _verify_members(run: RunDir, shard: str, rows: pa.Table, record: CommitRecord, *, deep: bool) -> None:
    """Look into a tar. Raises ValueError or CorruptionError where it is not what was committed."""
    tar, sha256 = run.tar_path(shard), str(record.extra.get("tar_sha256"))
    with run.open_tar(shard, sha256, anew=True) as file:
        num_members = check_tar(file, tar, rows, contents=deep)
        if num_members != record.extra.get("tar_members"):
            raise ValueError(f"{tar.name} has {num_members} members; {record.extra.get('tar_members')} committed")
        if deep and _sha256_of(file) != sha256:
            raise ValueError(f"the bytes of {tar.name} are not those committed")


def _sha256_of(file: BinaryIO) -> str:
    digest = hashlib.sha256()
    file.seek(0)
    while piece := file.read(1 << 20):
        digest.update(piece)
    return digest.hexdigest()


def _verify_stages(
    view: RunDir, shard: str, rows: pa.Table, begun: set[tuple[str | None, str]], report: Report
) -> None:
    """Check the stages of one shard in one generation, each against those before it.

    What was made of other bytes than are there now is to be made anew, with all that follows: no damage.
    """
    tables = {"shards": rows}
    kept_before: int | None = count_kept("shards", rows)
    for stage in STAGES[1:]:
        path = view.read_file(stage, shard)
        is_own = path == view.stage_file(stage, shard)
        folder = view.stage_file(stage, shard).parent.name
        if not exists(path):
            if (view.generation, stage) in begun and needs_stages(read_commit_record(view.stage_file("shards", shard))):
                _add(report.unfinished, folder, shard, [f"{path.name} is not there"])
            kept_before = None
            continue
        loaded = _verify_file(view, stage, shard, report) if is_own else _quiet_load(view, stage, shard)
        if loaded is None:
            kept_before = None
            continue
        table, record, _ = loaded
        if not _is_current(view, record):
            if is_own:
                _add(report.unfinished, folder, shard, ["it was made from another input than the one there now"])
            kept_before = None
            continue
        tables[stage] = table
        if is_own:
            if kept_before is not None and record.rows_in != kept_before:
                problem = f"{record.rows_in} samples came in; the stage before kept {kept_before}"
                _add(report.findings, folder, shard, [problem])
            _check_content(stage, shard, tables, folder, report)
        kept_before = record.rows_kept


def _verify_file(
    view: RunDir, stage: str, shard: str, report: Report
) -> tuple[pa.Table, CommitRecord, pa.Table] | None:
    """Read a stage's own file and quarantine, check them by themselves and count them in."""
    path = view.stage_file(stage, shard)
    folder = path.parent.name
    try:
        table, record = read_stage(path)
        quarantine = read_quarantine(view, stage, shard, record)
    except _DAMAGE as error:
        _add(report.findings, folder, shard, [str(error)])
        return None
    problems = []
    try:
        check_rows(stage, table, quarantine["key"].to_pylist())
        if (count_kept(stage, table), quarantine.num_rows) != (record.rows_kept, record.rows_quarantined):
            raise ValueError("kept and quarantined rows are not as many as the commit record says")
        check_counts(record.rows_in, record.rows_kept, record.rows_rejected, record.rows_quarantined)
        if stage == "shards" and record.rows_in != table.num_rows:
            raise ValueError(f"{record.rows_in} rows came in; {table.num_rows} are there")
    except (ValueError, KeyError) as error:
        problems.append(str(error))
    if "quarantine_seal" not in record.extra and exists(view.quarantine_file(stage, shard)):
        problems.append("there is a quarantine file that its commit record does not know")
    _add(report.findings, folder, shard, problems)
    counts = report.counts.setdefault(folder, StageCounts())
    counts.num_shards += 1
    counts.rows_in += record.rows_in
    counts.rows_kept += record.rows_kept
    counts.rows_rejected += record.rows_rejected
    counts.rows_quarantined += record.rows_quarantined
    return (table, record, quarantine) if not problems else None


def _quiet_load(view: RunDir, stage: str, shard: str) -> tuple[pa.Table, CommitRecord, None] | None:
    """Read the default generation's file for another generation; its damage is reported where it belongs."""
    path = view.read_file(stage, shard)
    try:
        return *read_stage(path), None
    except _DAMAGE:
        return None


def _is_current(view: RunDir, record: CommitRecord) -> bool:
    """Whether a stage was made from what is there now; true where that is damaged or gone, which is reported."""
    try:
        return record.input_digest == input_digest(view, record.stage, record.shard)
    except _DAMAGE:
        return True


def _check_content(stage: str, shard: str, tables: dict[str, pa.Table], folder: str, report: Report) -> None:
    if stage == "manifest" and tables.keys() == {"shards", "manifest"}:
        sources = set(tables["manifest"]["source"].to_pylist())
        if sources == {HUMAN}:  # made from the shards alone
            _add(report.findings, folder, shard, list(check_human_manifest(tables[stage], tables["shards"], shard)))
        return
    if set(STAGES[: STAGES.index(stage)]) - set(tables):
        return  # a stage before is missing or damaged, and reported
    problems = check_manifest(tables, shard) if stage == "manifest" else CHECKS[stage](tables)
    _add(report.findings, folder, shard, list(problems))


def _has_begun(view: RunDir, stage: str) -> bool:
    return bool(view.committed(stage)) or (stage == "manifest" and view.generation is not None)


def _implied(begun: Iterable[str]) -> list[str]:
    """Stages that have begun as a later one was made of them; the manifest, as `filter` makes it with the scores.

    Captions that people wrote come into a manifest without the stages between.
    """
    last = max((STAGES.index(stage) for stage in begun if stage != "manifest"), default=0)
    return [*STAGES[1 : last + 1], *(["manifest"] if STAGES[last] == "itm" else [])]


def _check_strays(run: RunDir, views: list[RunDir], shards: set[str], report: Report) -> set[str]:
    """Tars without a commit record are what a crash leaves; where stages were made of them, the record was lost.

    Gives the names of the shards whose record was lost.
    """
    made: dict[str, list[str]] = {}
    for view in views:
        for stage in STAGES[1:]:
            for name in view.own_names(stage):
                if name not in shards:
                    made.setdefault(name, []).append(view.stage_file(stage, name).parent.name)
    for name, folders in sorted(made.items()):
        if is_shard_name(name):
            _add(
                report.findings,
                "shards",
                name,
                [f"it was committed ({', '.join(folders)} are of it); its record {name}.parquet is gone"],
            )
        else:
            for folder in folders:
                _add(report.findings, folder, name, ["it is named as no shard is"])
    for name in run.tar_names():
        if name not in shards and name not in made:
            _add(report.unfinished, "shards", name, [f"{name}.tar has no commit record"])
    return set(made)


def _check_plan(run: RunDir, shards: list[str], lost: set[str], report: Report) -> None:
    """Shards are numbered without gaps; where their maker knew how many shards and rows there will be, all
    shards say so, and all have come to something. Those of `lost` are reported already."""
    plans: dict[str, tuple[int, int | None]] = {}
    num_retried = 0
    for shard in shards:
        with suppress(CorruptionError, TypeError, ValueError):  # reported already, or no plan
            record = read_commit_record(run.stage_file("shards", shard))
            report.maker = report.maker or str(record.fields.get("maker", "download"))
            if is_retry(record):
                num_retried += record.rows_in
            else:
                plans[shard] = (int(record.extra.get("num_shards", 0)), record.extra.get("source_rows"))
    first, (num_shards, source_rows) = next(iter(plans.items()), ("", (0, None)))
    for shard, plan in plans.items():
        if plan != (num_shards, source_rows):
            problem = f"its plan has {plan[0]} shards and {plan[1]} rows; that of shard {first} has "
            problem += f"{num_shards} and {source_rows}"
            _add(report.findings, "shards", shard, [problem])
    numbers = {int(shard) for shard in plans}
    num_expected = max(min(num_shards, _MAX_SHARDS), max(numbers, default=-1) + 1)
    known = numbers | {int(shard) for shard in filter(is_shard_name, {*shards, *lost})}
    absent = sorted(set(range(num_expected)) - known)
    for number in absent:
        _add(report.unfinished, "shards", f"{number:05d}", ["the shard is not there"])
    counts = report.counts.get("shards", StageCounts())
    is_whole = not absent and not lost and counts.num_shards == len(shards)
    if source_rows is not None and is_whole and counts.rows_in - num_retried != source_rows:
        problem = f"the shards account for {counts.rows_in - num_retried} rows; the table has {source_rows}"
        _add(report.findings, "shards", "", [problem])


def _check_retries(run: RunDir, report: Report) -> None:
    """A row that was tried again had failed in the attempt before, and has the same address."""
    with suppress(*_DAMAGE):  # a shard is damaged, and reported
        last: dict[str, tuple[str | None, str | None]] = {}
        attempts = [(shard, dict(attempts_of(run, shard))) for shard in retry_shards(run)]
        roots = {root for _, rows in attempts for root in rows.values()}
        columns = ["key", "url", "reason"]
        for shard in planned_shards(run) if roots else []:
            rows = read_table(run.stage_file("shards", shard), columns=columns).to_pylist()
            last |= {row["key"]: (row["url"], row["reason"]) for row in rows if row["key"] in roots}
        for shard, root_of in attempts:
            for row in read_table(run.stage_file("shards", shard), columns=columns).to_pylist():
                url, reason = last.get(root := root_of[row["key"]], (None, None))
                if reason is None or url != row["url"]:
                    problem = f"{row['key']} is said to try {root} again, which had not failed, or has another address"
                    _add(report.findings, "shards", shard, [problem])
                last[root] = (url, row["reason"])


def _check_parameters(view: RunDir, report: Report) -> None:
    """All shards of a stage were made with the same parameters."""
    for stage in STAGES:
        if stage == "shards" and view.generation is not None:
            continue
        first: tuple[str, str] | None = None
        folder = view.stage_file(stage, "0").parent.name
        for name in view.own_names(stage):
            try:
                record = read_commit_record(view.stage_file(stage, name))
            except _DAMAGE:
                continue  # reported already
            if is_retry(record):
                continue  # of limits of its own
            made_with = record.fingerprint
            first = first or (made_with, name)
            if made_with != first[0]:
                problem = f"it was made with other parameters than shard {first[1]}"
                _add(report.unfinished, folder, name, [problem])


def _add(findings: list[Finding], folder: str, shard: str, problems: list[str]) -> None:
    for problem in problems[:_MAX_PROBLEMS_PER_FILE]:
        findings.append(Finding(folder, shard, problem))
    if len(problems) > _MAX_PROBLEMS_PER_FILE:
        more = len(problems) - _MAX_PROBLEMS_PER_FILE
        findings.append(Finding(folder, shard, f"and {more} more of this kind"))


def _digests_of(keys: list[str]) -> np.ndarray:
    """Eight bytes of each key."""
    joined = b"".join(blake2b(str(key).encode(), digest_size=8).digest() for key in keys)
    return np.frombuffer(joined, dtype=np.uint64)


class _KeyLedger:
    """Remembers eight bytes of every key, to find the keys that two shards share."""

    def __init__(self) -> None:
        self._digests: dict[str, np.ndarray] = {}

    def add(self, shard: str, digests: np.ndarray) -> None:
        self._digests[shard] = digests

    def report_shared(self, run: RunDir, report: Report) -> None:
        if not self._digests:
            return
        everything = np.sort(np.concatenate(list(self._digests.values())))
        repeated = np.unique(everything[1:][everything[1:] == everything[:-1]])
        if not repeated.size:
            return
        owner: dict[str, str] = {}
        for shard, digests in self._digests.items():
            keys = read_table(run.stage_file("shards", shard), columns=["key"])["key"].to_pylist()
            suspects = [keys[number] for number in np.flatnonzero(np.isin(digests, repeated))]
            shared = [key for key in suspects if owner.setdefault(key, shard) != shard]
            if shared:
                problem = f"it shares {len(shared)} keys with shard {owner[shared[0]]} (first: {shared[0]})"
                _add(report.findings, "shards", shard, [problem])
