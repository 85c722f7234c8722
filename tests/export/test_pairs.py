"""What is exported is what the manifest says, and what cannot be written is said."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from capfilt.curation.annotate import annotate
from capfilt.data.manifest import read_manifest
from capfilt.data.rundir import RunDir
from capfilt.engines.local import LocalEngine
from capfilt.export.pairs import export_pairs
from tests.cli.conftest import capfilt
from tests.curation.small_runs import make_run, save_models
from tests.hostile_texts import FORMULAS, run_with_texts


def test_json_lines_are_the_manifest(tmp_path: Path) -> None:
    run = run_with_texts(tmp_path / "run", [*FORMULAS, "ünïcode 🙂"])
    assert capfilt("export", run.path, "-o", tmp_path / "all.jsonl", "--dropped").code == 0
    assert capfilt("export", run.path, "-o", tmp_path / "kept.jsonl").code == 0
    found = [json.loads(line) for line in (tmp_path / "all.jsonl").read_text(encoding="utf-8").split("\n")[:-1]]
    expected = read_manifest([run]).to_pylist()
    assert [row | {"clip_score": None, "itm_score": None} for row in found] == [
        row | {"clip_score": None, "itm_score": None} for row in expected
    ]
    assert pa.array([row["itm_score"] for row in found], pa.float32()) == pa.array(
        [row["itm_score"] for row in expected], pa.float32()
    )
    kept = (tmp_path / "kept.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    assert [json.loads(line)["key"] for line in kept] == [row["key"] for row in expected if row["kept"]]


class Backwards(LocalEngine):
    """The last shard first."""

    def run(self, work: Any, shards: Sequence[str], progress: Any = None) -> Iterator[Any]:
        yield from reversed(list(super().run(work, shards, progress)))


def test_shards_that_end_in_any_order_stand_in_theirs(tmp_path: Path) -> None:
    run, models = make_run(tmp_path / "run", num_shards=5, num_samples=3), save_models(tmp_path / "models")
    caption = models.caption(num_captions=1, min_length=3, max_length=6)
    annotate(run, ("captions", "clip", "itm", "manifest"), caption, models.rank(), models.filter())
    export_pairs(run, tmp_path / "forth.csv", dropped=True)
    export_pairs(run, tmp_path / "back.csv", dropped=True, engine=Backwards())
    assert (tmp_path / "back.csv").read_text() == (tmp_path / "forth.csv").read_text()
    assert (tmp_path / "back.csv").read_text().count("\n") == 1 + len(read_manifest([run]))


def test_what_cannot_be_written_is_said(tmp_path: Path) -> None:
    run = run_with_texts(tmp_path / "run", ["a dog", "two cats"])
    done = capfilt("export", run.path, "-o", tmp_path / "pairs.xlsx")
    assert (done.code, "expected one of .csv, .jsonl" in done.err) == (2, True)
    (tmp_path / "pairs.csv").write_text("mine")
    done = capfilt("export", run.path, "-o", tmp_path / "pairs.csv")
    assert (done.code, "give --overwrite" in done.err) == (2, True)
    assert (tmp_path / "pairs.csv").read_text() == "mine"
    done = capfilt("export", run.path, "-o", tmp_path / "nowhere" / "pairs.csv")
    assert (done.code, "There is no directory" in done.err) == (2, True)
    empty = RunDir.create(tmp_path / "empty")
    assert capfilt("export", empty.path, "-o", tmp_path / "e.csv").code == 2
    assert not (tmp_path / "e.csv").exists()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
