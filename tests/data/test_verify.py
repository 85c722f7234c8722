"""`verify` finds every seeded damage, names its shard, and raises no false alarm."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest

from capfilt.data.commit import commit_stage, input_digest, read_commit_record, read_table
from capfilt.data.reasons import Quarantined
from capfilt.data.rundir import STAGES, RunDir
from capfilt.data.schemas import SCHEMAS
from capfilt.data.sealed import read_sealed, sealed_bytes
from capfilt.data.tars import index_tar
from capfilt.data.verify import verify_run
from tests.curation.small_runs import PICTURE_SIZE_PX, commit_shard, encode_picture, make_run
from tests.stress.lives import live

BAD = "00001"
Damage = Callable[[RunDir], None]


def flip(path: Path, share: float) -> None:
    data = bytearray(path.read_bytes())
    data[int(len(data) * share)] ^= 0x20
    path.write_bytes(data)


def cut(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def rows(stage: str, change: Callable[[list[dict[str, Any]]], object]) -> Damage:
    """Write other rows under a record and a seal that are in order: what a program at fault would do."""

    def damage(run: RunDir) -> None:
        path = run.stage_file(stage, BAD)
        table, record, _ = read_sealed(path)
        content = table.to_pylist()
        change(content)
        record["extra"]["table_rows"] = len(content)
        path.write_bytes(sealed_bytes(pa.Table.from_pylist(content, schema=SCHEMAS[stage]), record))

    return damage


def record(stage: str, **changes: Any) -> Damage:
    """Write another commit record over the same rows."""

    def damage(run: RunDir) -> None:
        path = run.stage_file(stage, BAD)
        changed = asdict(read_commit_record(path))
        changed["extra"] |= changes.get("extra", {})
        changed |= {name: value for name, value in changes.items() if name != "extra"}
        path.write_bytes(sealed_bytes(read_table(path), changed))

    return damage


def stage_path(stage: str, action: Callable[[Path], object]) -> Damage:
    return lambda run: action(run.stage_file(stage, BAD))


def tar_path(action: Callable[[Path], object]) -> Damage:
    return lambda run: action(run.tar_path(BAD))


def quarantine(stage: str, action: Callable[[Path], object]) -> Damage:
    return lambda run: action(run.quarantine_file(stage, BAD))


def in_member(ending: str, before: int) -> Damage:
    """Flip a bit in the second member with this ending, `before` bytes ahead of its content's second byte."""

    def damage(run: RunDir) -> None:
        members = [m for m in index_tar(run.tar_path(BAD)) if m.name.endswith(ending) and m.length > 1]
        data = bytearray(run.tar_path(BAD).read_bytes())
        data[members[0].offset + 1 - before] ^= 0x08
        run.tar_path(BAD).write_bytes(data)

    return damage


def of_other_shard(path_of: Callable[[RunDir, str], Path]) -> Damage:
    return lambda run: shutil.copy(path_of(run, "00000"), path_of(run, BAD))  # type: ignore[return-value]


def remove_shard(run: RunDir) -> None:
    for path in [run.tar_path(BAD), *(run.stage_file(stage, BAD) for stage in STAGES)]:
        path.unlink()


def put(number: int, **values: Any) -> Callable[[list[dict[str, Any]]], None]:
    return lambda content: content[number].update(values)


def with_keys_of_other_shard(content: list[dict[str, Any]]) -> None:
    for row in content:
        row["key"] = "00000" + row["key"][5:]


DAMAGES: dict[str, Damage] = {
    **{f"a flip in {stage}": stage_path(stage, lambda path: flip(path, 0.3)) for stage in STAGES},
    **{f"a flip in the footer of {stage}": stage_path(stage, lambda path: flip(path, 0.97)) for stage in STAGES},
    **{f"{stage} is cut": stage_path(stage, cut) for stage in STAGES},
    **{f"{stage} is gone": stage_path(stage, Path.unlink) for stage in STAGES},
    **{f"{stage} is empty": stage_path(stage, lambda path: path.write_bytes(b"")) for stage in STAGES},
    "the shard is gone altogether": remove_shard,
    "captions of another shard": of_other_shard(lambda run, shard: run.stage_file("captions", shard)),
    "manifest of another shard": of_other_shard(lambda run, shard: run.stage_file("manifest", shard)),
    "plain Parquet": stage_path("clip", lambda path: pd.read_parquet(path).to_parquet(path)),
    "the tar is gone": tar_path(Path.unlink),
    "the tar is cut": tar_path(cut),
    "the tar is longer": tar_path(lambda path: path.write_bytes(path.read_bytes() + bytes(512))),
    "tar of another shard": of_other_shard(lambda run, shard: run.tar_path(shard)),
    "a flip in an image": in_member("jpg", 0),
    "a flip in a header": in_member("jpg", 513),
    "a flip in a caption": in_member("txt", 0),
    "a flip in the metadata": in_member("json", 0),
    "quarantine is gone": quarantine("shards", Path.unlink),
    "a flip in the quarantine": quarantine("captions", lambda path: flip(path, 0.3)),
    "quarantine of another shard": of_other_shard(lambda run, shard: run.quarantine_file("shards", shard)),
    "quarantine nobody knows": quarantine("clip", lambda path: path.write_bytes(b"PAR1")),
    "rows in": record("captions", rows_in=7),
    "rows kept": record("clip", rows_in=2, rows_kept=2),
    "rows rejected": record("itm", rows_rejected=1),
    "input digest": record("itm", input_digest="0" * 64),
    "parameters": record("clip", fields={"keep": 9}, fingerprint="0" * 64),
    "format version": record("clip", format_version=2),
    "rows of the table": record("shards", extra={"source_rows": 9}),
    "number of shards": record("shards", extra={"num_shards": 3}),
    "bytes of the tar": record("shards", extra={"tar_bytes": 512}),
    "members of the tar": record("shards", extra={"tar_members": 8}),
    "digest of the tar": record("shards", extra={"tar_sha256": "0" * 64}),
    "an unknown status": rows("shards", put(3, status="lost")),
    "an unknown reason": rows("shards", put(3, reason="because")),
    "another reason than the quarantine's": rows("shards", put(3, reason="not_found")),
    "a success that failed": rows("shards", put(1, status="failed_to_resize", reason="bad_image")),
    "a success with a reason": rows("shards", put(1, reason="timeout")),
    "a wrong place": rows("shards", put(1, image_offset=512)),
    "a wrong digest": rows("shards", put(1, sha256="0" * 64)),
    "a row less": rows("shards", lambda content: content.pop()),
    "keys of another shard": rows("shards", with_keys_of_other_shard),
    "a caption less": rows("captions", lambda content: content.pop(1)),
    "other captions": rows("captions", put(1, text="something else")),
    "a caption without text": rows("captions", put(1, text=None)),
    "captions in another order": rows("captions", lambda content: content.reverse()),
    "captions of an unknown key": rows("captions", put(0, key="x")),
    "another text": rows("clip", put(1, text="something else")),
    "another web caption": rows("clip", put(4, text="something else")),
    "a pair less": rows("clip", lambda content: content.pop(2)),
    "ranks exchanged": rows("clip", lambda content: (put(1, rank=2)(content), put(3, rank=1)(content))),
    "a rank left out": rows("clip", put(3, rank=5)),
    "a duplicate of nothing": rows("clip", put(2, duplicate_of=7)),
    "a cosine of 2": rows("clip", put(1, clip_score=2.0)),
    "a wrong source": rows("clip", put(1, source="web")),
    "a probability of 1.5": rows("itm", put(1, itm_score=1.5)),
    "an unknown pair": rows("itm", put(1, caption_index=9)),
    "pairs in another order": rows("itm", lambda content: content.reverse()),
    "kept and dropped": rows("manifest", put(1, drop_reason="low_itm")),
    "dropped for nothing": rows("manifest", put(1, kept=False)),
    "dropped for an unknown reason": rows("manifest", put(2, drop_reason="ugly")),
    "kept without a score": rows("manifest", put(2, kept=True, drop_reason=None)),
    "another ITM score": rows("manifest", put(1, itm_score=0.91)),
    "another CLIP score": rows("manifest", put(1, clip_score=0.1)),
    "another address": rows("manifest", put(1, url="http://other")),
    "another shard's name": rows("manifest", put(1, shard="00000")),
    "a verdict less": rows("manifest", lambda content: content.pop()),
}


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("template")


@pytest.mark.parametrize("case", DAMAGES)
def test_seeded_damage_is_found_and_its_shard_named(
    template: Path, tmp_path: Path, stages: SimpleNamespace, case: str
) -> None:
    whole = RunDir.create(template)
    if not whole.committed("manifest"):
        stages.everything(whole, 2, 4)
    run = RunDir(Path(shutil.copytree(template, tmp_path / "run")))
    DAMAGES[case](run)
    report = verify_run(run, deep=True)
    found = report.findings + report.unfinished
    assert report.exit_code in (1, 5)
    assert {finding.shard for finding in found} <= {BAD, ""}
    assert BAD in {finding.shard for finding in found}


def test_no_false_alarm(make_run: Callable[..., RunDir], stages: SimpleNamespace) -> None:
    run = make_run(3, 4)
    for generation in ("warm", "cold"):
        other = RunDir.open(run.path, generation)
        for shard in run.shard_names():
            if generation == "warm":
                stages.captions(other, shard, seed=1)
                stages.clip(other, shard)
                stages.itm(other, shard)
            stages.manifest(other, shard, threshold=0.95)
    for deep in (False, True):
        report = verify_run(run, deep=deep)
        assert (report.findings, report.unfinished, report.exit_code) == ([], [], 0)
    assert set(report.counts) == {
        *STAGES, "captions@warm", "clip@warm", "itm@warm", "manifest@warm", "manifest@cold",
    }  # fmt: skip
    shards = report.counts["shards"]
    assert (shards.num_shards, shards.rows_in, shards.rows_kept, shards.rows_quarantined) == (3, 15, 12, 3)
    assert report.counts["captions"].rows_kept == report.counts["manifest"].rows_in == 9
    assert "complete and reconciled: 3 shards, 15 rows = 12 samples + 3 quarantined" in report.line()
    assert verify_run(RunDir.open(run.path, "warm")).exit_code == 0


def test_an_interrupted_run_is_unfinished_not_damaged(make_run: Callable[..., RunDir], stages: SimpleNamespace) -> None:
    run = make_run(2, 4)
    run.stage_file("manifest", BAD).unlink()
    report = verify_run(run)
    assert (report.findings, report.exit_code) == ([], 1)
    assert [(item.stage, item.shard) for item in report.unfinished] == [("manifest", BAD)]
    stages.manifest(run, BAD, threshold=0.95)
    report = verify_run(run)
    assert [item.problem for item in report.unfinished] == ["it was made with other parameters than shard 00000"]
    stages.manifest(run, "00000", threshold=0.95, replace=True)
    assert verify_run(run).exit_code == 0


def test_damage_in_a_generation_names_the_generation(make_run: Callable[..., RunDir], stages: SimpleNamespace) -> None:
    run = make_run(1, 4)
    stages.captions(RunDir.open(run.path, "warm"), seed=1)
    flip(run.path / "captions@warm" / "00000.parquet", 0.5)
    report = verify_run(run)
    assert [(item.stage, item.shard) for item in report.findings] == [("captions@warm", "00000")]
    assert [item.stage for item in report.unfinished] == ["manifest@warm"]
    assert verify_run(run).exit_code == 5


def test_a_run_of_shards_alone_is_complete(tmp_path: Path, stages: SimpleNamespace) -> None:
    run = RunDir.create(tmp_path / "run")
    stages.shard(run)
    assert verify_run(run, deep=True).exit_code == 0
    assert verify_run(RunDir.create(tmp_path / "empty")).line().startswith("complete and reconciled: 0 shards")


def test_a_row_of_the_table_that_came_to_nothing_is_missed(tmp_path: Path, stages: SimpleNamespace) -> None:
    run = RunDir.create(tmp_path / "run")
    stages.shard(run, "00000", 3, num_shards=2)
    report = verify_run(run)
    assert [(item.shard, item.problem) for item in report.unfinished] == [("00001", "the shard is not there")]
    stages.shard(run, "00001", 2, num_shards=2)  # the plan was made for shards of four rows, this one has three
    path = run.stage_file("shards", "00001")
    changed = asdict(read_commit_record(path))
    changed["extra"]["source_rows"] = 8
    path.write_bytes(sealed_bytes(read_table(path), changed))
    report = verify_run(run)
    assert [item.problem for item in report.findings] == ["the shards account for 7 rows; the table has 8"]


def test_samples_that_a_later_stage_lost_are_accounted_for(tmp_path: Path, stages: SimpleNamespace) -> None:
    run = RunDir.create(tmp_path / "run")
    stages.shard(run, num_samples=5)
    stages.captions(run)
    stages.clip(run)
    stages.itm(run, lost=2)
    stages.manifest(run)
    report = verify_run(run, deep=True)
    assert (report.findings, report.unfinished) == ([], [])
    kept = {stage: counts.rows_kept for stage, counts in report.counts.items()}
    assert kept == {"shards": 5, "captions": 4, "clip": 4, "itm": 2, "manifest": 2}


def test_a_lost_record_is_named_once_with_what_brings_it_back(make_run: Callable[..., RunDir]) -> None:
    run = make_run(2, 4)
    path = run.stage_file("shards", BAD)
    content = path.read_bytes()
    path.unlink()
    report = verify_run(run, deep=True)
    assert [(item.stage, item.shard) for item in report.findings + report.unfinished] == [("shards", BAD)]
    assert report.findings[0].problem == (
        "it was committed (captions, clip, itm, manifest are of it); its record 00001.parquet is gone"
    )
    assert report.exit_code == 5
    assert [sentence for sentence in report.remedies() if "repeat `capfilt download`" in sentence] == report.remedies()
    path.write_bytes(content)
    assert verify_run(run, deep=True).exit_code == 0, "what was made of it stayed good"


def test_a_damaged_record_is_told_once(make_run: Callable[..., RunDir]) -> None:
    run = make_run(2, 4)
    path = run.stage_file("shards", BAD)
    path.write_bytes(path.read_bytes()[:-9])
    report = verify_run(run)
    assert [(item.stage, item.shard) for item in report.findings + report.unfinished] == [("shards", BAD)]


def test_what_was_made_of_bytes_that_changed_since_is_unfinished(
    make_run: Callable[..., RunDir], stages: SimpleNamespace
) -> None:
    run = make_run(2, 4)
    stages.manifest(RunDir.open(run.path, "cold"), BAD, threshold=0.95)
    stages.manifest(RunDir.open(run.path, "cold"), "00000", threshold=0.95)
    run.stage_file("shards", BAD).unlink()
    run.tar_path(BAD).unlink()
    stages.shard(run, BAD, 4, num_shards=2, first_image=100)  # a download may bring others
    report = verify_run(run)
    assert report.findings == []
    assert [(item.stage, item.shard) for item in report.unfinished] == [("captions", BAD)]
    assert report.remedies() == ["Unfinished: repeat `capfilt caption` as it was given; it goes on where it was."]


def test_remedies_name_commands_and_generations(make_run: Callable[..., RunDir], stages: SimpleNamespace) -> None:
    run = make_run(2, 4)
    warm = RunDir.open(run.path, "warm")
    stages.captions(warm, "00000", seed=1)
    stages.clip(warm, "00000")
    flip(run.stage_file("itm", BAD), 0.5)
    (run.path / "clip" / "copy.parquet").write_bytes(b"")
    report = verify_run(run)
    assert ("clip", "copy", "it is named as no shard is") in [(f.stage, f.shard, f.problem) for f in report.findings]
    assert report.remedies() == [
        "A damaged file of another stage: remove its .parquet and repeat `capfilt rank` and `capfilt filter`.",
        "Unfinished: repeat `capfilt filter --generation warm` as it was given; it goes on where it was.",
        "Or give a generation up that is not wanted any more: remove the folders whose names end in @warm.",
    ]


def test_a_tar_that_stages_were_made_of_is_kept_where_other_bytes_come(tmp_path: Path) -> None:
    """Its record was lost, and the web, or an import, gives something else today."""
    run = make_run(tmp_path / "run", num_shards=1, num_samples=2)
    table = pa.table({"key": ["000000000"], "caption_index": pa.array([0], pa.int32()), "text": ["a dog"]})
    commit_stage(
        run, "captions", "00000", table, fields={}, input_digest=input_digest(run, "captions", "00000"), rows_in=2,
        quarantine=[Quarantined(key="000000001", reason="scoring_failed")],
    )  # fmt: skip
    tar, before = run.tar_path("00000"), run.tar_path("00000").read_bytes()
    images = {f"{number:09d}": encode_picture(number) for number in range(2)}
    run.stage_file("shards", "00000").unlink()
    commit_shard(run, "00000", images, 2, 1, PICTURE_SIZE_PX)
    assert tar.read_bytes() == before
    assert not list(tar.parent.glob("*.old")), "the same bytes are no other ones"
    run.stage_file("shards", "00000").unlink()
    commit_shard(run, "00000", {"000000000": encode_picture(7)}, 1, 1, PICTURE_SIZE_PX)
    assert tar.read_bytes() != before
    assert tar.with_suffix(".tar.old").read_bytes() == before
    run.stage_file("shards", "00000").unlink()
    commit_shard(run, "00000", {"000000000": encode_picture(8)}, 1, 1, PICTURE_SIZE_PX)
    assert tar.with_suffix(".tar.old").read_bytes() == before, "a third one does not push it out"


def whole_run(template: Path) -> Path:
    if not (template / "whole").exists():
        live(template / "whole")
    return template / "whole"


def test_stages_that_later_ones_were_made_of_have_begun(template: Path, tmp_path: Path) -> None:
    for lost in (["captions"], ["captions", "clip"], ["manifest"]):
        run = RunDir.open(Path(shutil.copytree(whole_run(template), tmp_path / "-".join(lost))))
        for stage in lost:
            shutil.rmtree(run.path / stage)
        report = verify_run(run)
        assert report.exit_code == 1, lost
        assert {finding.stage for finding in report.unfinished} >= set(lost)


def test_a_stray_of_a_large_number_costs_nothing(template: Path, tmp_path: Path) -> None:
    run = RunDir.open(Path(shutil.copytree(whole_run(template), tmp_path / "copy")))
    shutil.copy(run.stage_file("clip", "00000"), run.path / "clip" / "20240101120000.parquet")
    report = verify_run(run)
    assert report.exit_code == 5
    assert len(report.findings) + len(report.unfinished) < 5
