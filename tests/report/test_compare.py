"""Comparisons, beside SciPy's distance and sets of what is kept."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import wasserstein_distance

from capfilt.data.manifest import read_manifest
from capfilt.data.rundir import RunDir
from capfilt.report.compare import Comparison, compare_runs, comparison_lines, moved, renamed
from tests.cli.conftest import capfilt
from tests.train.small_models import save_generation, save_run

COUNTS = st.lists(st.integers(0, 9), min_size=6, max_size=6).filter(any)
NAMES = st.dictionaries(st.sampled_from("abcd"), st.integers(1, 9))


@given(COUNTS, COUNTS)
def test_moved_is_wasserstein_s_distance(first: list[int], second: list[int]) -> None:
    places = np.arange(6)
    assert moved(first, second) == pytest.approx(wasserstein_distance(places, places, first, second), abs=1e-9)


@given(NAMES, NAMES)
def test_renamed_is_what_does_not_overlap(first: dict[str, int], second: dict[str, int]) -> None:
    if not first or not second:
        assert renamed(first, second) == float(bool(first) != bool(second))
        return
    one, other = ({n: counts.get(n, 0) / sum(counts.values()) for n in "abcd"} for counts in (first, second))
    assert renamed(first, second) == pytest.approx(1 - sum(min(one[name], other[name]) for name in "abcd"))


def kept_of(run: RunDir) -> set[tuple[object, ...]]:
    rows = read_manifest([run], ["key", "url", "source", "text"], kept_only=True).to_pylist()
    return {tuple(row.values()) for row in rows}


def test_two_generations(tmp_path: Path) -> None:
    run = save_run(tmp_path / "run", [9, 6], drop_every=4)
    other = save_generation(run.path, "first")
    found = compare_runs(run, other)
    first, second = kept_of(run), kept_of(other)
    assert found.kept is not None
    assert (found.kept.pairs_of_both, found.kept.pairs_of_first, found.kept.pairs_of_second) == (
        len(first & second), len(first - second), len(second - first),
    )  # fmt: skip
    images = [{pair[:2] for pair in pairs} for pairs in (first, second)]
    assert found.kept.images_of_both == len(images[0] & images[1]) > 0
    assert found.kept.pairs_of_first > 0
    figures = {one.name: one for one in found.figures}
    assert (figures["synthetic kept"].first, figures["synthetic kept"].second) == (len(first), len(second))
    assert {one.name: one.value for one in found.distances}["formats"] == 0
    text = "\n".join(comparison_lines(found))
    assert f"{len(second) - len(first):+,}" in text
    assert all(line.isascii() for line in comparison_lines(found, plain=True))


def test_runs_of_other_shards_and_images(tmp_path: Path) -> None:
    runs = [save_run(tmp_path / name, shards, seed) for name, shards, seed in (("a", [4, 4, 4], 0), ("b", [4], 9))]
    found = compare_runs(*runs)
    assert found.num_other_shards == 2
    assert found.kept is not None
    assert found.kept.num_shards == 1
    shared = {row for row in kept_of(runs[0]) if str(row[0]).startswith("00000")} & kept_of(runs[1])
    assert found.kept.pairs_of_both == len(shared)


def test_the_command(tmp_path: Path) -> None:
    run = save_run(tmp_path / "run", [9])
    save_generation(run.path, "first")
    shown = capfilt("stats", run.path, "--compare-generation", "first")
    assert "generation first" in shown.out
    document = capfilt("stats", run.path, "--compare", run.path, "--json").json()
    assert document["kept"]["pairs_of_first"] == document["kept"]["pairs_of_second"] == 0
    assert set(document) == set(Comparison.__dataclass_fields__)
    assert "no generation none" in capfilt("stats", run.path, "--compare-generation", "none").err
    refused = capfilt("stats", run.path, "--compare", run.path, "--section", "all")
    assert (refused.code, "together" in refused.err) == (2, True)
    assert capfilt("stats", run.path, "--watch", "1", "--json").code == 2


def test_a_source_of_one_run_alone_is_told_and_no_distance_made_of_nothing(tmp_path: Path) -> None:
    synthetic, human = save_run(tmp_path / "run", [6], drop_every=3), tmp_path / "human"
    tar = synthetic.path / "shards" / "00000.tar"
    assert capfilt("import", tar, human, "--human").code == 0
    found = compare_runs(synthetic, RunDir.open(human))
    figures = {one.name: (one.first, one.second) for one in found.figures}
    assert (figures["human pairs"], figures["synthetic pairs"]) == ((0, 6), (12, 0))
    assert "human kept rate" not in figures
    assert [one.name for one in found.distances if "synthetic" in one.name or "human" in one.name] == []
    assert list(figures) == [one.name for one in compare_runs(synthetic, RunDir.open(human)).figures]
    tars = capfilt("stats", synthetic.path, "--compare", tar.parent)
    assert tars.code == 2
    assert "is a folder of tars; expected a run. `capfilt import " in tars.err
