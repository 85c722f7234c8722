"""The shard loop: one pass or single commands, batch sizes, broken pictures, other parameters, kill -9."""

from __future__ import annotations

import io
import multiprocessing
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import capfilt.curation.annotate as shard_loop
from capfilt.curation.annotate import annotate
from capfilt.curation.selection import reselect
from capfilt.curation.stage_models import StageModels
from capfilt.data import per_shard
from capfilt.data.commit import read_commit_record, read_quarantine, read_table
from capfilt.data.rundir import RunDir
from capfilt.data.verify import verify_run
from capfilt.engines.local import LocalEngine
from capfilt.errors import CorruptionError, FingerprintMismatchError, UsageError
from capfilt.models.vit import VisionTransformer
from capfilt.progress import StreamProgress
from tests.curation.small_runs import Models, make_run, read_all, save_models

ALL = ("captions", "clip", "itm", "manifest")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return save_models(tmp_path_factory.mktemp("models"))


def annotate_all(run: RunDir, models: Models, **batch: int) -> Any:
    return annotate(run, ALL, models.caption(**batch), models.rank(**batch), models.filter(**batch))


@pytest.fixture(scope="module")
def finished(models: Models, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    run = make_run(tmp_path_factory.mktemp("finished"))
    annotate_all(run, models)
    return run


def test_run_reconciles_with_itself(finished: RunDir) -> None:
    report = verify_run(finished, deep=True)
    assert not report.findings
    manifest = read_all(finished)["manifest"]["00000"]
    assert manifest.num_rows == 7 * 5
    assert {"empty", "low_clip"} <= set(manifest["drop_reason"].to_pylist())
    assert any(manifest["kept"].to_pylist())


def test_single_commands_give_the_rows_of_one_pass(finished: RunDir, models: Models, tmp_path: Path) -> None:
    run = make_run(tmp_path)
    annotate(run, ["captions"], caption=models.caption())
    annotate(run, ["clip"], rank=models.rank())
    annotate(run, ["itm", "manifest"], filter=models.filter())
    assert read_all(run) == read_all(finished)


def test_an_image_encoder_that_captioner_and_filter_share_sees_a_picture_once(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    twins = save_models(tmp_path / "models")
    _copy_image_encoder(twins.root / "captioner", twins.root / "filter")
    num_seen = _count_images_of_blip(monkeypatch)
    runs = [make_run(tmp_path / name) for name in ("once", "apart")]
    annotate_all(runs[0], twins)
    assert num_seen.pop() == 14
    annotate(runs[1], ["captions"], caption=twins.caption())
    annotate(runs[1], ["clip"], rank=twins.rank(batch_size=3))
    annotate(runs[1], ["itm", "manifest"], filter=twins.filter(batch_size=4))
    assert num_seen.pop() == 28
    assert read_all(runs[0]) == read_all(runs[1])
    annotate_all(make_run(tmp_path / "strangers"), models)
    assert num_seen.pop() == 28


def _copy_image_encoder(source: Path, target: Path) -> None:
    weights, own = (load_file(folder / "model.safetensors") for folder in (source, target))
    own |= {name: tensor for name, tensor in weights.items() if name.startswith("vision_model.")}
    save_file(own, target / "model.safetensors", metadata={"format": "pt"})


def _count_images_of_blip(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list whose only number grows with every picture that a BLIP's image encoder sees; emptied, it begins anew."""
    plain, counts = VisionTransformer.forward, []

    def forward(self: VisionTransformer, images: torch.Tensor) -> torch.Tensor:
        if not self.config.norm_first:  # CLIP's has the same class
            counts[:] = [sum(counts) + len(images)]
        return plain(self, images)

    monkeypatch.setattr(VisionTransformer, "forward", forward)
    return counts


@pytest.mark.parametrize("batch_size", [1, 3])
def test_another_batch_size_gives_the_same_captions(
    finished: RunDir, models: Models, tmp_path: Path, batch_size: int
) -> None:
    run = make_run(tmp_path)
    annotate_all(run, models, batch_size=batch_size)
    found, expected = read_all(run), read_all(finished)
    assert found["captions"] == expected["captions"]
    columns = ["key", "caption_index", "text", "rank", "itm_score", "kept", "drop_reason"]
    for shard, table in expected["manifest"].items():
        assert found["manifest"][shard].select(columns) == table.select(columns)


def test_the_second_time_nothing_is_done(finished: RunDir, models: Models) -> None:
    files = {path: path.stat().st_mtime_ns for path in finished.path.rglob("*.parquet")}
    summary = annotate_all(finished, models)
    assert summary.line().startswith("Nothing to do")
    assert {stage.num_new_shards for stage in summary.stages.values()} == {0}
    assert {path: path.stat().st_mtime_ns for path in finished.path.rglob("*.parquet")} == files


def test_broken_pictures_are_quarantined_and_the_run_goes_on(finished: RunDir, models: Models, tmp_path: Path) -> None:
    run = make_run(tmp_path, broken=[0, 3, 13])
    summary = annotate_all(run, models)
    assert summary.stages["captions"].num_quarantined == 3
    assert "3 in quarantine" in summary.line()
    rows = read_quarantine(run, "captions", "00000").to_pylist()
    assert [(row["key"][-1], row["reason"]) for row in rows] == [
        ("0", "truncated_image"),
        ("3", "truncated_image"),
    ]
    assert not verify_run(run).findings
    whole, rest = read_all(finished)["captions"]["00001"], read_all(run)["captions"]["00001"]
    assert rest.num_rows == whole.num_rows - 4
    assert rest == whole.slice(0, rest.num_rows)  # the last picture is gone, the others read as before


def test_shard_of_broken_pictures_alone_is_committed_empty(models: Models, tmp_path: Path) -> None:
    run = make_run(tmp_path, num_shards=1, num_samples=2, broken=[0, 1])
    summary = annotate_all(run, models)
    assert summary.num_pairs == 0
    assert not verify_run(run).findings


def test_other_parameters_are_refused_or_go_into_a_generation(models: Models, tmp_path: Path) -> None:
    run = make_run(tmp_path, num_shards=1)
    annotate_all(run, models)
    before = read_all(run)
    with pytest.raises(FingerprintMismatchError, match="seed 0 -> 1"):
        annotate(run, ["captions"], caption=models.caption(seed=1))
    with pytest.raises(FingerprintMismatchError, match="capfilt select"):
        annotate(run, ["itm", "manifest"], filter=models.filter(threshold=0.9))
    with pytest.raises(FingerprintMismatchError, match="keep 2 -> 1"):
        annotate(run, ALL, models.caption(), models.rank(keep=1), models.filter())
    other = RunDir.open(run.path, "other")
    annotate(other, ALL, models.caption(seed=1), models.rank(), models.filter())
    assert read_all(run) == before
    assert read_all(other)["captions"] != before["captions"]
    reselect(other, threshold=0.9, keep=1)
    assert read_all(run) == before


@pytest.mark.parametrize("is_manifest_lost", [False, True])
@pytest.mark.parametrize("threshold", [0.3, 0.5])
def test_a_selection_that_met_damage_is_mended_by_what_is_advised(
    models: Models, tmp_path: Path, threshold: float, is_manifest_lost: bool
) -> None:
    """Whichever of the two choices is given again, the one before or the one that was interrupted."""
    run = make_run(tmp_path, num_shards=3)
    annotate_all(run, models)
    lost = run.stage_file("itm", "00002")
    scores = read_table(lost)
    lost.write_bytes(lost.read_bytes()[:-9])
    with pytest.raises(CorruptionError):
        reselect(run, threshold=0.3)
    lost.unlink()
    if is_manifest_lost:
        run.stage_file("manifest", "00002").unlink()
    with pytest.raises(UsageError, match=r"00002 of .* has no itm scores. Run `capfilt filter .* with the options"):
        reselect(run, threshold=threshold)
    is_refused = threshold == 0.5 or not is_manifest_lost  # the others have 0.3 by now
    expected = pytest.raises(FingerprintMismatchError, match=f"capfilt select .*--threshold {threshold:g}")
    with expected if is_refused else nullcontext():
        annotate(run, ALL, models.caption(), models.rank(), models.filter(threshold=threshold))
    assert read_table(lost) == scores
    reselect(run, threshold=threshold)
    report = verify_run(run)
    assert (report.findings, report.unfinished) == ([], [])


def test_lost_scores_of_other_parameters_are_not_made(models: Models, tmp_path: Path) -> None:
    run = make_run(tmp_path, num_shards=2)
    annotate_all(run, models)
    run.stage_file("clip", "00001").unlink()
    with pytest.raises(FingerprintMismatchError, match="seed 0 -> 1"):
        annotate(run, ALL, models.caption(seed=1), models.rank(), models.filter())
    assert not run.stage_file("clip", "00001").exists()


def test_stage_before_must_be_there(models: Models, tmp_path: Path) -> None:
    run = make_run(tmp_path, num_shards=1)
    with pytest.raises(UsageError, match="Run `capfilt caption"):
        annotate(run, ["clip"], rank=models.rank())
    with pytest.raises(UsageError, match="Run `capfilt caption"):
        annotate(run, ["itm"], filter=models.filter())
    annotate(run, ["captions"], caption=models.caption())
    with pytest.raises(UsageError, match="Run `capfilt rank"):
        annotate(run, ["itm"], filter=models.filter())
    both = annotate(run, ["captions", "clip"], models.caption(), models.rank())
    assert both.line().startswith("Wrote clip of"), "captions were there already"
    with pytest.raises(UsageError, match="each with its settings"):
        annotate(run, ["clip"], caption=models.caption())
    with pytest.raises(UsageError, match="No shards"):
        annotate(RunDir.create(tmp_path / "empty"), ["captions"], caption=models.caption())


def test_web_caption_may_be_ranked(models: Models, tmp_path: Path) -> None:
    run = make_run(tmp_path, num_shards=1)
    annotate(run, ALL, models.caption(), models.rank(include_web=True), models.filter(threshold=0.0))
    rows = read_all(run)["manifest"]["00000"].to_pylist()
    webs = [row for row in rows if row["source"] == "web" and row["text"]]
    assert all(row["rank"] is not None for row in webs)
    for key in {row["key"] for row in rows}:
        assert sum(row["kept"] for row in rows if row["key"] == key) == 2
    assert not verify_run(run).findings


def _work_in_child(run: RunDir, models: Models) -> multiprocessing.process.BaseProcess:
    """`annotate` in a process of its own, forked so that it need not import the models' libraries again."""

    def work() -> None:
        torch.set_num_threads(1)  # the parent's threads are not in the child
        annotate_all(RunDir.open(run.path), models, batch_size=2)

    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    return child


def test_killed_and_resumed_gives_the_rows_of_an_undisturbed_run(models: Models, tmp_path: Path) -> None:
    """SIGKILL at ten moments, each a file later; each run is resumed, some after a second kill."""
    reference = make_run(tmp_path / "reference", num_shards=3)
    undisturbed = _work_in_child(reference, models)
    undisturbed.join()
    assert undisturbed.exitcode == 0
    expected = read_all(reference)
    num_killed, numbers_of_files = 0, set()
    for moment in range(10):
        run = make_run(tmp_path / f"run{moment}", num_shards=3)
        for num_files in (3 + moment, 5 + moment)[: 1 + moment % 2]:
            child = _work_in_child(run, models)
            while child.is_alive() and _count_files(run) < num_files:
                time.sleep(0.002)
            child.kill()
            child.join()
            num_killed += child.exitcode == -signal.SIGKILL
        numbers_of_files.add(_count_files(run))
        annotate_all(run, models, batch_size=2)
        assert read_all(run) == expected
        assert not verify_run(run).findings
        assert not list((run.path / ".staging").glob("*"))
    assert num_killed >= 3
    assert len(numbers_of_files) > 1, "every kill came before or after the work"


class Planned(LocalEngine):
    """Notes what is planned."""

    def run(self, work: Any, shards: Sequence[str], progress: Any = None) -> Iterator[Any]:
        self.total, self.shards = work.total, list(shards)
        return super().run(work, shards, progress)


def test_images_of_very_many_shards_are_expected_by_a_part_of_them(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here of more than two: the total is what the counted ones let expect, what is done is exact."""
    run, engine = make_run(tmp_path / "run", num_shards=5, num_samples=3), Planned()
    caption = models.caption(num_captions=1, min_length=3, max_length=6)
    monkeypatch.setattr(shard_loop, "MOST_COUNTED_SHARDS", 2)
    read, of = [], read_commit_record
    monkeypatch.setattr(per_shard, "read_commit_record", lambda path: read.append(path.stem) or of(path))
    assert shard_loop._count_images(run, run.shard_names()) == 15
    assert read == ["00000", "00003"]
    summary = annotate(run, ["captions"], caption, engine=engine)
    assert (engine.total, engine.shards) == (15, run.shard_names())
    assert summary.stages["captions"].num_samples == 15


def _count_files(run: RunDir) -> int:
    return len(list(run.path.glob("*/*.parquet")))


def test_read_back_has_the_columns_of_the_contract(finished: RunDir) -> None:
    table = read_table(finished.read_file("clip", "00000"))
    assert table["source"].to_pylist()[:5] == ["web", *["synthetic"] * 4]
    assert table["caption_index"].to_pylist()[:5] == [-1, 0, 1, 2, 3]


@pytest.mark.parametrize(("is_fast", "dtype"), [(True, "bfloat16"), (False, "float32")])
def test_auto_says_and_records_the_precision_it_took(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_fast: bool, dtype: str
) -> None:
    monkeypatch.setattr("capfilt.weights.devices._has_bfloat16_instructions", lambda: is_fast)
    run, shown = make_run(tmp_path, num_shards=1), io.StringIO()
    auto = {"dtype": "auto"}
    settings = (models.caption(**auto), models.rank(**auto), models.filter(**auto))
    annotate(run, ALL, *settings, progress=StreamProgress(shown, live=False))
    assert f"annotate ({dtype} on cpu)" in shown.getvalue()
    assert all(record_of(run, stage).fields["dtype"] == dtype for stage in ("captions", "clip", "itm"))
    assert not verify_run(run).findings
    other = {"dtype": "float32" if is_fast else "bfloat16"}
    with pytest.raises(FingerprintMismatchError, match="dtype"):
        annotate(run, ["captions"], caption=models.caption(**other))


def record_of(run: RunDir, stage: str) -> Any:
    return read_commit_record(run.read_file(stage, "00000"))


def test_models_share_an_image_encoder_on_one_device_and_with_one_resizer(tmp_path: Path) -> None:
    twins = save_models(tmp_path)
    _copy_image_encoder(twins.root / "captioner", twins.root / "filter")
    together, apart = (StageModels(twins.caption(), None, twins.filter()) for _ in range(2))
    apart.itm_scorer.device = torch.device("cuda:0")
    assert together.vision_is_shared
    assert not apart.vision_is_shared
    assert StageModels(twins.caption(resizer="pillow"), None, twins.filter(resizer="pillow")).vision_is_shared
    assert not StageModels(twins.caption(resizer="pillow"), None, twins.filter()).vision_is_shared


def test_freed_memory_is_kept_once_models_are_loaded(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded_before: list[bool] = []
    chosen = StageModels(models.caption(), models.rank(), models.filter())
    monkeypatch.setattr(
        "capfilt.curation.annotate.keep_freed_memory", lambda: loaded_before.append("itm_scorer" in vars(chosen))
    )
    annotate(make_run(tmp_path, num_shards=1), ALL, models=chosen)
    assert loaded_before == [True]
