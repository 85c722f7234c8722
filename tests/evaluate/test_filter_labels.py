"""Labels joined to a run's pairs, nothing lost in silence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from capfilt.data.commit import commit_stage, input_digest
from capfilt.data.labels import PairLabel
from capfilt.data.manifest import read_manifest
from capfilt.data.rundir import RunDir
from capfilt.data.schemas import SCHEMAS
from capfilt.errors import UsageError
from capfilt.evaluate.filter_labels import LabelledPairs, join_labels, label_by_world
from capfilt.evaluate.filter_report import FilterOptions, report_filter
from capfilt.world.audit import audit_manifest
from capfilt.world.site import SiteSettings, WorldSite
from tests.train import small_models


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """Eight images in two shards with two captions each; the generation `scored` has a score of its own for each."""
    folder = tmp_path_factory.mktemp("labels") / "run"
    small_models.save_run(folder, [5, 3])
    return with_scores(folder, "scored", lambda number: number / 16 if number % 5 else None)


def with_scores(
    folder: Path, name: str, score: Callable[[int], float | None], captions: Sequence[tuple[str, str]] = ()
) -> RunDir:
    """A generation whose manifest has other scores and, where given, other addresses and web captions."""
    run, number = RunDir.open(folder, name), 0
    for shard in run.shard_names():
        table = read_manifest([folder])
        rows = [row for row in table.to_pylist() if row["shard"] == shard]
        for row in rows:
            row |= {"itm_score": score(number), "source": "web" if row["caption_index"] else "synthetic"}
            if captions:
                row |= {"url": captions[number][0], "text": captions[number][1], "source": "web"}
            number += 1
        filled = pa.Table.from_pylist(rows, schema=SCHEMAS["manifest"])
        digest = input_digest(run, "manifest", shard)
        commit_stage(run, "manifest", shard, filled, fields={}, input_digest=digest, rows_in=len(rows) // 2)
    return run


def label(key: str, index: int | None, is_true: bool, text: str | None = None, row: int = 1) -> PairLabel:
    return PairLabel(key, index, text, is_true, f"labels.csv, row {row}")


def by_hand(run: RunDir) -> list[dict]:
    return read_manifest([run]).to_pylist()


def test_by_index_and_by_text(run: RunDir) -> None:
    rows = by_hand(run)
    labels = [
        label(row["key"], row["caption_index"], bool(n % 3), row["text"] if n % 2 else None)
        for n, row in enumerate(rows[:9])
    ]
    labels += [label(row["key"], None, bool(n % 3), row["text"]) for n, row in enumerate(rows[9:12], 9)]
    found = join_labels(run, [*labels, labels[3]], "itm")
    scored = [n for n in range(12) if n % 5]
    assert found.scores.tolist() == pytest.approx([n / 16 for n in scored])
    assert found.labels.tolist() == [bool(n % 3) for n in scored]
    assert found.sources == [rows[n]["source"] for n in scored]
    assert (found.num_unscored, found.num_unjoined, found.num_unlabelled) == (3, 0, 3)


def test_labels_without_a_pair_are_counted_and_named(run: RunDir) -> None:
    rows = by_hand(run)
    good = label(rows[1]["key"], rows[1]["caption_index"], True)
    bad = [
        label("0", 0, True, row=2),
        label(rows[0]["key"], 7, True, row=3),
        label(rows[2]["key"], rows[2]["caption_index"], True, "an older caption", row=4),
        label(rows[0]["key"], None, True, "what nobody wrote", row=5),
    ]
    with pytest.raises(UsageError, match=r"4 of 5 labels belong to no pair .*row 2: key '0', caption 0; .*row 5"):
        join_labels(run, [good, *bad], "itm")
    found = join_labels(run, [good, *bad], "itm", allow_unjoined=True)
    assert (len(found.scores), found.num_unjoined) == (1, 4)


def test_labels_that_contradict_each_other(run: RunDir) -> None:
    key = by_hand(run)[1]["key"]
    with pytest.raises(UsageError, match="row 1 and labels.csv, row 2 say different things"):
        join_labels(run, [label(key, 0, True), label(key, 0, False, row=2)], "itm")
    row = next(row for row in by_hand(run) if row["itm_score"] is not None)
    one = label(row["key"], row["caption_index"], True)
    with pytest.raises(UsageError, match="row 1 and labels.csv, row 2 say different things"):
        join_labels(run, [one, label(row["key"], None, False, row["text"], row=2)], "itm")
    assert len(join_labels(run, [one, label(row["key"], None, True, row["text"], row=2)], "itm").scores) == 1


def test_the_world_judges_its_own_runs(tmp_path: Path) -> None:
    site = WorldSite(SiteSettings(num_urls=80), port=80)
    rows = list(site.rows())
    small_models.save_run(tmp_path / "run", [25, 15])
    captions = [(row.url, row.web_caption or "") for row in rows]
    run = with_scores(tmp_path / "run", "world", lambda number: number / 80 if number % 7 else None, captions)
    (run.path / "world").mkdir()
    truth = site.write_truth(run.path / "world" / "truth.parquet")
    found = label_by_world(run, "itm")
    scored = [number for number in range(80) if number % 7]
    assert found.labels.tolist() == [rows[number].verdict == "true" for number in scored]
    assert found.scores.tolist() == pytest.approx([number / 80 for number in scored])
    assert found.num_unscored == 80 - len(scored)
    audit = audit_manifest(read_manifest([run]), truth)["web"]
    assert audit.num_judged_true == found.labels.sum() > 10


def test_only_worlds_have_a_truth(run: RunDir) -> None:
    with pytest.raises(UsageError, match=r"no world/truth\.parquet"):
        label_by_world(run, "itm")


def test_labels_of_one_class_measure_nothing() -> None:
    scores = np.array([0.1, 0.9])
    for labels, word in (([True, True], "true"), ([False, False], "false")):
        with pytest.raises(UsageError, match=f"All 2 labelled pairs with a score are {word}"):
            report_filter(LabelledPairs(scores, np.array(labels), None), FilterOptions())
    nothing = LabelledPairs(np.empty(0), np.empty(0, np.bool_), [], num_unscored=7)
    with pytest.raises(UsageError, match=r"None of the labelled pairs has a clip score \(7 without\).*capfilt rank"):
        report_filter(nothing, FilterOptions(score="clip"))


def test_a_source_of_one_class_has_no_curve() -> None:
    pairs = LabelledPairs(np.array([0.1, 0.9, 0.7]), np.array([False, True, True]), ["web", "web", "synthetic"])
    figures = report_filter(pairs, FilterOptions()).figures
    assert list(figures) == ["all", "web", "synthetic"]
    assert figures["web"].auc == 1.0
    assert figures["synthetic"].auc is None
    assert figures["synthetic"].at_threshold is not None
    assert figures["synthetic"].at_threshold.precision == 1.0
