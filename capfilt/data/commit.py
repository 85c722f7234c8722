"""The commit protocol: how one stage of one shard gets into a run, whole or not at all.

In: a table of rows, what went wrong, and (for the shards) a tar. Out: files in the run directory, the Parquet
file last; it is the commit record. An attempt writes in a staging directory of its own; each file is written,
closed, synced, read back and checked, then published (`disk`, `object_store`). A crash at any point leaves the stage
committed or not, and what is not committed is written anew by the next attempt.

Counts are in rows of the URL table (or samples of the imported tars) for the shards, and in samples from
there on: rows in = kept + rejected + quarantined, and one stage's kept is the next one's rows in.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import pyarrow as pa

from capfilt import __version__
from capfilt.data.field_changes import field_changes
from capfilt.data.paths import AnyPath, exists, size_of
from capfilt.data.reasons import Quarantined
from capfilt.data.reconcile import check_counts, check_rows, check_tar, count_kept
from capfilt.data.rundir import FORMAT_VERSION, STAGES, RunDir
from capfilt.data.schemas import QUARANTINE_SCHEMA
from capfilt.data.sealed import canonical_json, damaged, read_record, read_sealed, sealed_bytes
from capfilt.data.stores import Attempt
from capfilt.data.texts import clean_for_terminal
from capfilt.errors import CapfiltError, CommittedError, CorruptionError, FingerprintMismatchError

__all__ = [
    "CommitRecord", "Quarantined", "canonical_json", "commit_stage", "file_sha256",
    "fingerprint", "input_digest", "read_commit_record", "read_quarantine", "read_stage", "read_table", "stage_state",
]  # fmt: skip


_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True)
class CommitRecord:
    """What the footer of a stage's Parquet file says about it."""

    format_version: int
    stage: str
    shard: str
    fingerprint: str
    """`fingerprint(fields)`."""
    fields: dict[str, Any]
    """Everything that changes the output: stage version, parameters, digests of model files, seed."""
    input_digest: str
    """`input_digest` of what the stage was made from."""
    rows_in: int
    rows_kept: int
    rows_rejected: int
    rows_quarantined: int
    extra: dict[str, Any]
    """`table_rows`; with a tar `tar_sha256`, `tar_bytes`, `tar_members`; with a quarantine file
    `quarantine_seal`; and what the stage adds (strings and numbers)."""
    versions: dict[str, str]
    """Versions of what wrote the file."""


def fingerprint(fields: Mapping[str, Any]) -> str:
    """Give the sha256 (hex) of the canonical JSON of `fields`."""
    return hashlib.sha256(canonical_json(dict(fields)).encode()).hexdigest()


def file_sha256(path: str | Path) -> str:
    """Give the sha256 (hex) of a file's bytes, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_commit_record(path: AnyPath) -> CommitRecord:
    """Read the record from the footer of a stage's file. Raises CorruptionError for a damaged one."""
    record, _, num_rows = read_record(path)
    return _checked_record(path, record, num_rows)


def read_table(path: AnyPath, columns: Sequence[str] | None = None) -> pa.Table:
    """Read the rows of a stage's file after checking every byte. Raises CorruptionError naming the shard."""
    return read_stage(path, columns)[0]


def read_stage(path: AnyPath, columns: Sequence[str] | None = None) -> tuple[pa.Table, CommitRecord]:
    """Read rows and record of a stage's file as `read_table` and `read_commit_record` do, in one go."""
    table, record, _ = read_sealed(path, columns)
    return table, _checked_record(path, record, table.num_rows)


def read_quarantine(run: RunDir, stage: str, shard: str, record: CommitRecord | None = None) -> pa.Table:
    """Give the quarantined rows of a committed stage; an empty table where there are none.

    `record` is the stage's, where it has been read already. Raises CorruptionError when the quarantine file is not the
    one that it names.
    """
    path = run.read_file(stage, shard)
    record = record or read_commit_record(path)
    expected = record.extra.get("quarantine_seal")
    if expected is None:
        return QUARANTINE_SCHEMA.empty_table()
    quarantine_path = run.read_quarantine_file(stage, shard, expected)
    if not exists(quarantine_path):
        raise damaged(path, f"its quarantine {quarantine_path} is gone")
    table, _, seal = read_sealed(quarantine_path)
    if seal != expected:
        raise damaged(path, f"its quarantine {quarantine_path} is of another attempt")
    return table


def input_digest(run: RunDir, stage: str, shard: str) -> str:
    """Give the digest of what `stage` is made from: the tar's sha256 for the captions, and for a manifest of human
    captions, which has no stage between; else the seal (sha256) of the previous stage's file, both as committed. The
    shards have no stage before them."""
    previous = STAGES[STAGES.index(stage) - 1]
    if stage == "manifest" and not any(exists(run.read_file(between, shard)) for between in STAGES[1:-1]):
        previous = "shards"
    if stage == "shards":
        raise ValueError("the shards are made from a table or a tar, whose digest their maker knows")
    path = run.read_file(previous, shard)
    if previous == "shards":
        return str(read_commit_record(path).extra["tar_sha256"])
    return read_record(path)[1]


def stage_state(run: RunDir, stage: str, shard: str, fields: Mapping[str, Any], input_digest: str) -> str:
    """Say whether a stage of a shard is "missing", "done", or made from another input ("stale_input").

    In a generation, the default generation's file counts as done where it matches. Raises
    FingerprintMismatchError when this generation's file was made with other parameters, CorruptionError when
    it is damaged.
    """
    path = run.read_file(stage, shard)
    if not exists(path):
        return "missing"
    is_own = path == run.stage_file(stage, shard)
    record = read_commit_record(path)
    if record.fingerprint != fingerprint(fields):
        if is_own:
            raise _mismatch(run, record, dict(fields))
        return "missing"
    if record.input_digest != input_digest:
        return "stale_input" if is_own else "missing"
    if stage == "shards":
        _check_tar_size(run, record)
    return "done"


def commit_stage(
    run: RunDir,
    stage: str,
    shard: str,
    table: pa.Table,
    *,
    fields: Mapping[str, Any],
    input_digest: str,
    rows_in: int,
    rows_rejected: int = 0,
    quarantine: Sequence[Quarantined] = (),
    tar: Path | None = None,
    extra: Mapping[str, str | int | float] | None = None,
    replace: bool = False,
) -> CommitRecord:
    """Publish one stage of one shard: `table` (columns of SCHEMAS[stage]), its quarantine, and its tar.

    `tar` lies in a staging directory of `run` and is moved from there. With `replace` an earlier commit of
    this stage, shard and generation gives way. Raises ValueError when rows, keys, counts, tar and quarantine
    do not agree (a fault of the caller), CommittedError when the stage is committed already, CapfiltError when the
    disk refuses; nothing is published then.
    """
    final = run.stage_file(stage, shard)
    if exists(final) and not replace:
        raise CommittedError(f"{final} is committed already; a committed stage is not written again.")
    with _named(stage, shard):
        check_rows(stage, table, [row.key for row in quarantine])
        kept = count_kept(stage, table)
        check_counts(rows_in, kept, rows_rejected, len(quarantine))
    facts: dict[str, Any] = dict(extra or {}) | {"table_rows": table.num_rows}
    with _disk_errors(final), run.new_staging() as staging:
        if tar is not None:
            with _named(stage, shard):
                facts |= _tar_facts(tar, table)
        staged_quarantine = None
        if quarantine:
            staged_quarantine = staging / "quarantine.parquet"
            rows = _quarantine_table(stage, shard, quarantine)
            owner = {"stage": stage, "shard": shard}
            facts["quarantine_seal"] = _write_checked(staged_quarantine, rows, owner)
        record = CommitRecord(
            format_version=FORMAT_VERSION,
            stage=stage,
            shard=shard,
            fingerprint=fingerprint(fields),
            fields=dict(fields),
            input_digest=input_digest,
            rows_in=rows_in,
            rows_kept=kept,
            rows_rejected=rows_rejected,
            rows_quarantined=len(quarantine),
            extra=facts,
            versions={"capfilt": __version__, "pyarrow": pa.__version__, "python": platform.python_version()},
        )
        staged = staging / "stage.parquet"
        _write_checked(staged, table, asdict(record))
        run.publish(
            Attempt(
                folder=final.parent.name, shard=shard, staged=staged, quarantine=staged_quarantine,
                quarantine_seal=facts.get("quarantine_seal", ""), tar=tar, tar_sha256=facts.get("tar_sha256", ""),
                replace=replace,
            )
        )  # fmt: skip
    return record


def _tar_facts(tar: Path, table: pa.Table) -> dict[str, str | int]:
    """Sync a staged tar, read it back in full against its rows, and give what the record says of it."""
    with open(tar, "rb") as file:
        os.fsync(file.fileno())
        num_members = check_tar(file, tar, table)
    return {"tar_sha256": file_sha256(tar), "tar_bytes": tar.stat().st_size, "tar_members": num_members}


def _quarantine_table(stage: str, shard: str, quarantine: Sequence[Quarantined]) -> pa.Table:
    rows = [
        {
            "key": row.key, "shard": shard, "stage": stage, "reason": row.reason,
            "detail": clean_for_terminal(row.detail), "sha256": row.sha256, "bytes": row.num_bytes,
        }
        for row in quarantine
    ]  # fmt: skip
    return pa.Table.from_pylist(rows, schema=QUARANTINE_SCHEMA)


def _write_checked(path: Path, table: pa.Table, record: Mapping[str, Any]) -> str:
    """Write → sync → close → reopen and check. Gives the seal."""
    data = sealed_bytes(table, record)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        view = memoryview(data)
        while view:  # a short write is no error, only not all of it
            view = view[os.write(descriptor, view) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    read_back, _, seal = read_sealed(path)
    if not read_back.equals(table.replace_schema_metadata(None)):
        raise damaged(path, "what was written does not read back")
    return seal


@contextmanager
def _named(stage: str, shard: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{stage} of shard {shard}: {error}") from error


@contextmanager
def _disk_errors(final: AnyPath) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CapfiltError(
            f"{final} could not be committed: {error.strerror or error}. Nothing of this attempt counts; "
            "make room or mend the disk and repeat the command, it goes on from the last committed shard."
        ) from error


def _checked_record(path: AnyPath, record: Mapping[str, Any], num_rows: int) -> CommitRecord:
    if {field.name for field in fields(CommitRecord)} != set(record):
        raise damaged(path, "its commit record lacks entries or has unknown ones")
    parsed = CommitRecord(**record)
    counts = (parsed.rows_in, parsed.rows_kept, parsed.rows_rejected, parsed.rows_quarantined)
    if not all(type(count) is int for count in counts) or not isinstance(parsed.extra, dict):
        raise damaged(path, "its commit record has entries of the wrong type")
    digests = [parsed.extra[name] for name in ("tar_sha256", "quarantine_seal") if name in parsed.extra]
    if not all(isinstance(digest, str) and _SHA256.fullmatch(digest) for digest in digests):
        raise damaged(path, "its commit record has a digest that is none")
    folder = path.parent.name.partition("@")[0]
    if (parsed.stage, parsed.shard) != (folder, path.stem):
        raise damaged(path, f"it is the file of {parsed.stage} of shard {parsed.shard}")
    if parsed.format_version != FORMAT_VERSION:
        raise damaged(path, f"it has format version {parsed.format_version}, {FORMAT_VERSION} is expected")
    if parsed.extra.get("table_rows") != num_rows:
        raise damaged(path, f"it has {num_rows} rows, {parsed.extra.get('table_rows')} were committed")
    return parsed


def _check_tar_size(run: RunDir, record: CommitRecord) -> None:
    tar = run.tar_path(record.shard)
    found = size_of(tar)
    if found != record.extra.get("tar_bytes"):
        raise CorruptionError(
            f"{tar} has {found} bytes; {record.extra.get('tar_bytes')} were committed. Restore it from a "
            f"copy, or remove {run.stage_file('shards', record.shard)} and download or import again."
        )


def _mismatch(run: RunDir, record: CommitRecord, new: dict[str, Any]) -> FingerprintMismatchError:
    advice = (
        "Shards are never rewritten: use another run directory."
        if record.stage == "shards"
        else "Keep both by writing beside them: add `--generation NAME`. Or give the old parameters again."
    )
    changes = field_changes(record.fields, new)
    return FingerprintMismatchError(
        f"{run.stage_file(record.stage, record.shard)} was made with other parameters ({'; '.join(changes)}). {advice}"
    )
