"""The commit protocol: whole or not at all, wherever it is interrupted; resumed only where all matches."""

from __future__ import annotations

import errno
import itertools
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pytest

from capfilt.data.commit import (
    commit_stage,
    file_sha256,
    fingerprint,
    input_digest,
    read_commit_record,
    read_quarantine,
    read_table,
    stage_state,
)
from capfilt.data.reasons import Quarantined
from capfilt.data.rundir import RunDir
from capfilt.data.schemas import SCHEMAS
from capfilt.data.verify import verify_run
from capfilt.errors import CapfiltError, CorruptionError, FingerprintMismatchError

CALLS = ("open", "write", "fsync", "rename", "unlink", "mkdir")
"""The calls through which the protocol touches the disk."""


def in_child(work: Callable[[], None], prepare: Callable[[], None]) -> int:
    """Run `work` in a child process after `prepare`; give its exit status. Nothing of it is cleaned up."""
    pid = os.fork()
    if pid == 0:
        try:
            prepare()
            work()
            os._exit(0)
        except BaseException:
            os._exit(2)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def die_at(call_number: int, *, halfway: bool) -> None:
    """Make this process die before its n-th call that touches the disk, or with its n-th write half done."""
    counter = itertools.count()

    def patched(name: str) -> Callable[..., object]:
        real = getattr(os, name)

        def call(*args: object, **options: object) -> object:
            if next(counter) == call_number:
                if halfway:
                    real(args[0], bytes(args[1])[: len(bytes(args[1])) // 2])  # type: ignore[call-overload]
                os._exit(9)
            return real(*args, **options)

        return call

    for name in ("write",) if halfway else CALLS:
        setattr(os, name, patched(name))


def files_of(run: RunDir) -> dict[str, str]:
    """Name → digest of everything that counts."""
    paths = [path for path in run.path.rglob("*") if path.is_file() and not path.name.startswith(".")]
    return {str(path.relative_to(run.path)): file_sha256(path) for path in paths if path.name != "run.json"}


PARAMETERS = {"shards": {"image_size_px": 64}, "captions": {"seed": 0}, "manifest": {"threshold": 0.5}}


@pytest.mark.parametrize("halfway", [False, True])
@pytest.mark.parametrize(
    ("stage", "replace"),
    [("shards", False), *itertools.product(["captions", "manifest"], [False, True])],  # shards are never rewritten
)
def test_every_point_of_a_crash_recovers(
    tmp_path: Path, stages: SimpleNamespace, stage: str, replace: bool, halfway: bool
) -> None:
    whole = RunDir.create(tmp_path / "whole")
    stages.everything(whole, 1)
    expected = files_of(whole)
    commit = {
        "shards": lambda run: stages.shard(run),
        "captions": lambda run: stages.captions(run, replace=replace),
        "manifest": lambda run: stages.manifest(run, replace=replace),
    }[stage]
    before = tmp_path / "before"
    shutil.copytree(whole.path, before)
    if not replace:
        for path in (
            whole.stage_file(stage, "00000"),
            whole.tar_path("00000"),
            whole.quarantine_file(stage, "00000"),
        ):
            if path.exists() and (stage == "shards" or path.suffix == ".parquet"):
                (before / path.relative_to(whole.path)).unlink()
    num_deaths = 0
    for call_number in itertools.count():
        root = tmp_path / str(call_number)
        shutil.copytree(before, root)
        run = RunDir.open(root)
        status = in_child(lambda run=run: commit(run), lambda n=call_number: die_at(n, halfway=halfway))
        assert status in (0, 9)
        with run.lock():
            assert not any((root / ".staging").glob("*"))
            digest = "table" if stage == "shards" else input_digest(run, stage, "00000")
            state = stage_state(run, stage, "00000", PARAMETERS[stage], digest)
            assert state in ("missing", "done")
            if state == "missing":
                commit(run)
        assert files_of(run) == expected
        report = verify_run(run, deep=True)
        assert (report.findings, report.unfinished) == ([], [])
        shutil.rmtree(root)
        if status == 0:
            break
        num_deaths += 1
    fewest = {"shards": 2, "captions": 2, "manifest": 1} if halfway else {"shards": 14, "captions": 8, "manifest": 5}
    assert num_deaths >= fewest[stage]


def test_nothing_is_renamed_before_it_is_on_the_disk(
    tmp_path: Path, stages: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a loss of power leaves depends on the order of syncs and renames; so that order is looked at."""
    events: list[tuple[str, str]] = []
    real_fsync, real_rename = os.fsync, os.rename

    def fsync(descriptor: int) -> None:
        events.append(("sync", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))
        real_fsync(descriptor)

    def rename(source: Path, target: Path) -> None:
        events.append(("rename", f"{source.name} -> {target.parent.name}/{target.name}"))
        real_rename(source, target)

    run = RunDir.create(tmp_path / "run")
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    stages.shard(run)
    assert events == [
        ("sync", "shard.tar"),
        ("sync", "shard.tar"),
        ("sync", "quarantine.parquet"),
        ("sync", "stage.parquet"),
        ("sync", "run"),
        ("rename", "shard.tar -> shards/00000.tar"),
        ("sync", "shards"),
        ("sync", "run"),
        ("rename", "quarantine.parquet -> quarantine/shards-00000.parquet"),
        ("sync", "quarantine"),
        ("rename", "stage.parquet -> shards/00000.parquet"),
        ("sync", "shards"),
    ]


@pytest.mark.parametrize("name", ["open", "write", "fsync", "rename"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_refuses_leaves_no_bad_commit(
    tmp_path: Path, stages: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, name: str, code: int
) -> None:
    real = getattr(os, name)
    for failing in itertools.count():
        run = RunDir.create(tmp_path / str(failing))
        stages.shard(run)
        counter = itertools.count()

        def call(*args: object, failing: int = failing, counter: Iterator[int] = counter, **options: object) -> object:
            if next(counter) == failing:
                raise OSError(code, os.strerror(code))
            return real(*args, **options)

        with monkeypatch.context() as patch:
            patch.setattr(os, name, call)
            try:
                stages.captions(run)
                failed, message = False, ""
            except (CapfiltError, OSError) as error:
                failed, message = True, str(error)
        assert not failed or os.strerror(code) in message
        state = stage_state(run, "captions", "00000", {"seed": 0}, input_digest(run, "captions", "00000"))
        with run.lock():
            assert not any((run.path / ".staging").glob("*"))
            if state == "missing":
                stages.captions(run)
        assert verify_run(run, deep=True).exit_code == 0
        if not failed:
            break
    assert failing >= 2


def test_short_writes_are_continued(make_run: Callable[..., RunDir], monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: real(descriptor, bytes(data)[:97]))
    assert verify_run(make_run(1), deep=True).exit_code == 0


def test_resume_only_where_everything_matches(make_run: Callable[..., RunDir], stages: SimpleNamespace) -> None:
    run = make_run(1)
    digest = input_digest(run, "captions", "00000")
    assert stage_state(run, "captions", "00000", {"seed": 0}, digest) == "done"
    assert stage_state(run, "captions", "00000", {"seed": 0}, "other") == "stale_input"
    assert stage_state(run, "captions", "00001", {"seed": 0}, digest) == "missing"
    with pytest.raises(FingerprintMismatchError, match=r"seed 0 -> 1; top_p none -> 0.9.*--generation NAME"):
        stage_state(run, "captions", "00000", {"seed": 1, "top_p": 0.9}, digest)
    with pytest.raises(FingerprintMismatchError, match="another run directory"):
        stage_state(run, "shards", "00000", {}, "table")
    other = RunDir.open(run.path, "other")
    assert stage_state(other, "captions", "00000", {"seed": 0}, digest) == "done"
    assert stage_state(other, "captions", "00000", {"seed": 1}, digest) == "missing"
    assert stage_state(other, "captions", "00000", {"seed": 0}, "other") == "missing"
    stages.captions(other, seed=1)
    assert stage_state(other, "captions", "00000", {"seed": 1}, digest) == "done"
    assert stage_state(run, "captions", "00000", {"seed": 0}, digest) == "done"
    assert input_digest(other, "clip", "00000") != input_digest(run, "clip", "00000")
    run.tar_path("00000").write_bytes(b"")
    with pytest.raises(CorruptionError, match="0 bytes"):
        stage_state(run, "shards", "00000", {"image_size_px": 64}, "table")


def test_a_committed_stage_is_not_written_again(make_run: Callable[..., RunDir], stages: SimpleNamespace) -> None:
    run = make_run(1)
    before = files_of(run)
    with pytest.raises(CapfiltError, match="committed already"):
        stages.captions(run, seed=7)
    assert files_of(run) == before


def test_the_record_says_what_was_done(make_run: Callable[..., RunDir]) -> None:
    run = make_run(1, 3)
    record = read_commit_record(run.stage_file("shards", "00000"))
    assert (record.rows_in, record.rows_kept, record.rows_rejected, record.rows_quarantined) == (4, 3, 0, 1)
    assert record.fingerprint == fingerprint({"image_size_px": 64})
    assert record.extra["tar_sha256"] == file_sha256(run.tar_path("00000"))
    assert record.extra["tar_members"] == 9
    assert input_digest(run, "captions", "00000") == record.extra["tar_sha256"]
    captions = read_commit_record(run.stage_file("captions", "00000"))
    assert (captions.rows_in, captions.rows_kept, captions.rows_quarantined) == (3, 2, 1)
    assert read_table(run.stage_file("captions", "00000")).schema.equals(SCHEMAS["captions"])
    assert read_quarantine(run, "clip", "00000").num_rows == 0
    (row,) = read_quarantine(run, "shards", "00000").to_pylist()
    assert (row["key"], row["stage"], row["shard"], row["reason"]) == (
        "000009999",
        "shards",
        "00000",
        "timeout",
    )


def test_details_in_quarantine_are_fit_to_print(make_run: Callable[..., RunDir]) -> None:
    run = make_run(1, 2)
    key = read_table(run.stage_file("captions", "00000"))["key"].to_pylist()[0]
    bad = Quarantined(key=key, reason="scoring_failed", detail="\x1b]0;x\x07" + "y" * 900, num_bytes=3)
    commit_stage(
        run, "clip", "00000", SCHEMAS["clip"].empty_table(), fields={}, rows_in=1, quarantine=[bad],
        replace=True, input_digest=input_digest(run, "clip", "00000"),
    )  # fmt: skip
    (row,) = read_quarantine(run, "clip", "00000").to_pylist()
    assert row["detail"].startswith("\\x1b]0;x\\x07yyy")
    assert len(row["detail"]) == 200
    run.quarantine_file("clip", "00000").unlink()
    with pytest.raises(CorruptionError, match="quarantine .* is gone"):
        read_quarantine(run, "clip", "00000")


CAPTION_ROWS = [dict(key="a", caption_index=0, text="x"), dict(key="b", caption_index=0, text="y")]
FAULTS = {
    "counts": (CAPTION_ROWS, 3, [], "3 rows in, but 2 kept"),
    "a pair twice": (CAPTION_ROWS[:1] * 2, 1, [], "stands twice"),
    "no key": ([dict(key=None, caption_index=0, text="x")], 1, [], "has no key"),
    "kept and quarantined": (CAPTION_ROWS, 3, ["b"], "both kept and in quarantine"),
    "quarantined twice": (CAPTION_ROWS, 4, ["c", "c"], "in quarantine twice"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_what_does_not_reconcile_is_not_published(make_run: Callable[..., RunDir], case: str) -> None:
    rows, rows_in, quarantined, message = FAULTS[case]
    run = make_run(1, 3)
    before = files_of(run)
    with pytest.raises(ValueError, match=f"captions of shard 00000: .*{message}"):
        commit_stage(
            run, "captions", "00000", pa.Table.from_pylist(rows, schema=SCHEMAS["captions"]), fields={},
            input_digest="", rows_in=rows_in, replace=True,
            quarantine=[Quarantined(key=key, reason="bad_image") for key in quarantined],
        )  # fmt: skip
    assert files_of(run) == before


def test_wrong_columns_scores_and_reasons_are_faults(make_run: Callable[..., RunDir]) -> None:
    run = make_run(1, 3)
    with pytest.raises(ValueError, match=r"columns are \[key: string\]; expected \[key: string, caption_index: int32"):
        commit_stage(run, "itm", "00001", pa.table({"key": ["a"]}), fields={}, input_digest="", rows_in=1)
    rows = [dict(key="a", caption_index=0, itm_score=float("nan"))]
    table = pa.Table.from_pylist(rows, schema=SCHEMAS["itm"])
    with pytest.raises(ValueError, match="itm_score has values that are not finite"):
        commit_stage(run, "itm", "00001", table, fields={}, input_digest="", rows_in=1)
    with pytest.raises(ValueError, match="expected one of"):
        Quarantined(key="a", reason="because")
