"""Human pairs: imported tars become a run that verifies and that trainings read, with every caption of an image."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from capfilt.curation.human_captions import write_human_manifest
from capfilt.curation.import_shards import import_shards
from capfilt.data.commit import read_commit_record
from capfilt.data.manifest import read_manifest
from capfilt.data.rundir import RunDir
from capfilt.data.verify import verify_run
from capfilt.errors import FingerprintMismatchError, UsageError
from capfilt.train.pairs import read_pairs
from tests.curation.test_import_shards import DATA_DIR, picture, write_foreign
from tests.train import small_models


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    captions = {"captions": ["A dog .", "a red dog", "A dog .", "", 7]}
    write_foreign(tmp_path / "0.tar", [
        ("a.jpg", picture(1)), ("a.json", json.dumps(captions).encode()),
        ("b.jpg", picture(2)), ("b.txt", b"a cat"),
        ("c.jpg", picture(3)),
        ("d.jpg", b"no picture"), ("d.txt", b"lost"),
    ])  # fmt: skip
    write_foreign(tmp_path / "1.tar", [("e.jpg", picture(4)), ("e.json", b'{"caption": "a bird"}')])
    run = RunDir.create(tmp_path / "run")
    import_shards([str(tmp_path / "{0..1}.tar")], run)
    return run


def test_every_caption_is_kept_but_empty_and_repeated_ones(run: RunDir) -> None:
    summary = write_human_manifest(run)
    assert (summary.num_shards, summary.num_new_shards, summary.num_kept, summary.num_dropped) == (2, 2, 4, 3)
    found = [
        (row["key"], row["caption_index"], row["text"], row["drop_reason"])
        for row in read_manifest([run.path]).to_pylist()
    ]
    assert found == [
        ("a", 0, "A dog .", None), ("a", 1, "a red dog", None), ("a", 2, "A dog .", "duplicate"), ("a", 3, "", "empty"),
        ("b", 0, "a cat", None), ("c", 0, "", "empty"), ("e", 0, "a bird", None),
    ]  # fmt: skip
    report = verify_run(run, deep=True)
    assert (report.exit_code, report.findings, report.unfinished) == (0, [], [])
    assert write_human_manifest(run).num_new_shards == 0


def test_a_training_draws_all_captions_of_an_image(run: RunDir) -> None:
    write_human_manifest(run)
    pairs = read_pairs([run], image_size_px=16)
    assert {key: pairs.captions_of(row) for row, key in enumerate(pairs.keys)} == {
        "a": ["a dog", "a red dog"], "b": ["a cat"], "e": ["a bird"],
    }  # fmt: skip


def test_a_manifest_of_another_input_is_seen(run: RunDir, tmp_path: Path) -> None:
    write_human_manifest(run)
    record = read_commit_record(run.stage_file("manifest", "00000"))
    assert record.rows_in == record.rows_kept == 3
    other = RunDir.create(tmp_path / "other")
    write_foreign(tmp_path / "2.tar", [("z.jpg", picture(9)), ("z.txt", b"other")])
    import_shards([str(tmp_path / "2.tar")], other)
    other.stage_file("manifest", "00000").parent.mkdir()
    other.stage_file("manifest", "00000").write_bytes(run.stage_file("manifest", "00000").read_bytes())
    report = verify_run(other)
    assert [(found.stage, found.shard) for found in report.unfinished] == [("manifest", "00000")]
    assert report.remedies()[0].startswith("Unfinished: repeat `capfilt import`")
    write_human_manifest(other)
    assert verify_run(other).exit_code == 0


def test_runs_of_other_kinds_are_refused(tmp_path: Path) -> None:
    curated = small_models.save_run(tmp_path / "curated", [3])
    with pytest.raises(UsageError, match="imported tars"):
        write_human_manifest(curated)


def test_a_curated_manifest_is_not_replaced(run: RunDir) -> None:
    write_human_manifest(run)
    from capfilt.curation import human_captions

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(human_captions, "_FIELDS", {"stage_version": 2, "captions": "human"})
        with pytest.raises(FingerprintMismatchError):
            write_human_manifest(run)


@pytest.mark.skipif(not DATA_DIR.is_dir(), reason="the shared photographs are not here (CAPFILT_SHARED_DATA)")
def test_flickr8k_has_five_captions_an_image(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path / "run")
    import_shards([str(DATA_DIR / "flickr8k-dev-000.tar")], run)
    summary = write_human_manifest(run)
    assert summary.num_kept + summary.num_dropped == 5000
    assert summary.num_kept > 4950
