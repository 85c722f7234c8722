"""What commands note of their time: by download and annotation, interrupted ones too; nothing depends on it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from capfilt.curation.annotate import annotate
from capfilt.data.rundir import RunDir
from capfilt.data.timings import FOLDER, Timing, note_timing, read_timings
from capfilt.data.verify import verify_run
from capfilt.engines.local import LocalEngine
from capfilt.report.dashboard import dashboard_lines
from capfilt.report.stats import compute_stats
from capfilt.report.stats_view import stats_lines
from tests.curation.small_runs import Models, make_run, save_models

STAGES = ["captions", "clip", "itm", "manifest"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return save_models(tmp_path_factory.mktemp("models"))


def annotate_all(run: RunDir, models: Models, engine: LocalEngine | None = None) -> None:
    annotate(run, STAGES, caption=models.caption(), rank=models.rank(), filter=models.filter(), engine=engine)


def test_stages_are_noted_once(models: Models, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", num_shards=2, num_samples=4)
    annotate_all(run, models)
    found = list(read_timings(run))
    assert len(found) == 1
    assert {stage: num for stage, (num, _) in found[0].stages.items()} == {"captions": 8, "clip": 8, "itm": 8}
    assert all(0 < seconds < found[0].seconds for _, seconds in found[0].stages.values())
    annotate_all(run, models)
    assert list(read_timings(run)) == found, "nothing was done"
    assert verify_run(run, deep=True).exit_code == 0
    times = compute_stats(run).times
    assert list(times) == ["captions", "clip", "itm"]
    assert times["clip"].num == 8
    assert times["clip"].per_second == pytest.approx(8 / found[0].stages["clip"][1])
    assert "8 images" in "\n".join(stats_lines(compute_stats(run), ["time"]))
    assert "a second" in "\n".join(dashboard_lines(compute_stats(run), 80))


def test_a_stage_counts_what_was_new_to_it(models: Models, tmp_path: Path) -> None:
    """Captions of one shard were there; of the other both stages are made."""
    run = make_run(tmp_path / "run", num_shards=2, num_samples=4)
    with pytest.raises(KeyboardInterrupt):
        annotate(run, ["captions"], caption=models.caption(), engine=Stops())
    annotate_all(run, models)
    first, second = read_timings(run)
    assert {stage: num for stage, (num, _) in first.stages.items()} == {"captions": 4}
    assert {stage: num for stage, (num, _) in second.stages.items()} == {"captions": 4, "clip": 8, "itm": 8}
    assert compute_stats(run).times["captions"].num == 8


class Stops(LocalEngine):
    """Gives back one shard, then is interrupted."""

    def run(self, work, shards, progress=None):  # type: ignore[no-untyped-def]
        yield next(iter(super().run(work, shards, progress)))
        raise KeyboardInterrupt


def test_an_interrupted_command_notes_what_it_did(models: Models, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", num_shards=3, num_samples=4)
    with pytest.raises(KeyboardInterrupt):
        annotate_all(run, models, Stops())
    annotate_all(run, models)
    assert [timing.stages["clip"][0] for timing in read_timings(run)] == [4, 8]
    assert compute_stats(run).times["itm"].num == 12


def test_what_is_no_timing_is_passed_over(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", num_shards=1, num_samples=2)
    note_timing(run, Timing(stages={"clip": (4, 2.0)}, seconds=5.0))
    note_timing(run, Timing(stages={"clip": (0, 0.0)}, seconds=5.0))
    folder = run.path / FOLDER
    texts = [
        "", "[]", "{", '{"stages": 1}', '{"stages": {"clip": "x"}, "seconds": 1}',
        '{"stages": {"clip": [1e999, 1]}, "seconds": 1}', '{"stages": {}, "seconds": Infinity}',
        '{"stages": {"clip": [1, -1]}, "seconds": 1}',
    ]  # fmt: skip
    for number, text in enumerate(texts):
        (folder / f"{number}.json").write_text(text)
    (folder / "9.json").write_text(json.dumps({"stages": {"clip": [1, 1]}, "seconds": 1, "pad": "x" * 20_000}))
    (folder / "note.txt").write_text("mine")
    assert list(read_timings(run)) == [Timing(stages={"clip": (4, 2.0)}, seconds=5.0)]
    assert verify_run(run).exit_code == 0


def test_where_it_cannot_be_written_the_work_goes_on(models: Models, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", num_shards=1, num_samples=2)
    (run.path / FOLDER).write_text("in the way")
    annotate_all(run, models)
    assert run.committed("manifest") == ["00000"]
    assert compute_stats(run).times == {}
