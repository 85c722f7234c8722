"""Which samples a query gives, against plain loops over what is on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from capfilt.data.commit import read_table
from capfilt.data.images import decode_image
from capfilt.data.manifest import read_manifest
from capfilt.data.rundir import RunDir
from capfilt.data.shards import read_sample
from capfilt.errors import UsageError
from capfilt.report.browse import Browser, SampleQuery
from capfilt.report.decks import iterate, open_deck
from tests.data import conftest as small

NUM_SHARDS, NUM_SAMPLES = 3, 9


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A run with every stage; a threshold that drops some, and of every shard a row that failed."""
    run = RunDir.create(tmp_path_factory.mktemp("browse") / "run")
    small.commit_all(run, NUM_SHARDS, NUM_SAMPLES)
    return run


def keys_of(run: RunDir, **query: Any) -> list[str]:
    browser = Browser(run, SampleQuery(**query))
    return [browser.sample(place).key for place in iterate(open_deck(browser))]


def image_keys(run: RunDir) -> list[str]:
    tables = [read_table(run.stage_file("shards", shard)).to_pylist() for shard in run.shard_names()]
    return [row["key"] for rows in tables for row in rows if row["status"] == "success"]


def keys_with_a_pair(run: RunDir, holds: Any) -> list[str]:
    return list(dict.fromkeys(row["key"] for row in read_manifest([run]).to_pylist() if holds(row)))


@pytest.mark.parametrize(
    ("query", "holds"),
    [
        ({"kept": True}, lambda row: row["kept"]),
        ({"kept": False, "source": "web"}, lambda row: not row["kept"] and row["source"] == "web"),
        ({"reason": "empty"}, lambda row: row["drop_reason"] == "empty"),
        ({"reason": "duplicate", "source": "synthetic"}, lambda row: row["drop_reason"] == "duplicate"),
        ({"reason": "duplicate", "source": "web"}, lambda row: False),
        (
            {"where": "itm_score > 0.5 and rank is null and text like '%7'"},
            lambda row: (row["itm_score"] or 0) > 0.5 and row["rank"] is None and row["text"].endswith("7"),
        ),
        (
            {"where": "clip_score < 0.6", "kept": False, "source": "synthetic"},
            lambda row: row["source"] == "synthetic" and not row["kept"] and (row["clip_score"] or 1) < 0.6,
        ),
        ({"where": "shard = '00001' and width = 24"}, lambda row: row["shard"] == "00001"),
    ],
)
def test_filters_give_what_a_loop_finds(run: RunDir, query: dict[str, Any], holds: Any) -> None:
    expected = keys_with_a_pair(run, holds)
    assert keys_of(run, **query) == expected
    assert keys_of(run, **query, limit=2) == expected[:2]
    drawn = keys_of(run, **query, num_random=3)
    assert set(drawn) <= set(expected)
    assert len(drawn) == min(3, len(expected))


def test_the_pairs_of_which_it_is_true_are_marked(run: RunDir) -> None:
    browser = Browser(run, SampleQuery(where="rank = 2"))
    for place in iterate(open_deck(browser)):
        sample = browser.sample(place)
        assert [row["matches"] for row in sample.captions] == [row["rank"] == 2 for row in sample.captions]
        assert sample.threshold == 0.5
        rows = [row for row in read_manifest([run]).to_pylist() if row["key"] == sample.key]
        assert [{name: row[name] for name in rows[0]} for row in sample.captions] == rows


def test_all_samples_and_their_pictures(run: RunDir) -> None:
    assert keys_of(run) == image_keys(run)
    browser = Browser(run, SampleQuery())
    for place in iterate(open_deck(browser)):
        sample = browser.sample(place)
        stored = decode_image(read_sample(run, sample.shard, sample.key).image)
        assert np.array_equal(np.asarray(browser.picture(place)), np.asarray(stored))
        assert (sample.has_picture, sample.width, sample.height) == (True, 24, 16)


def test_keys_come_in_the_order_given(run: RunDir) -> None:
    keys = ["000020001", "000000000", "000019999", "000000000"]
    assert keys_of(run, keys=tuple(keys)) == keys[:3]
    assert keys_of(run, keys=tuple(keys), kept=False, source="web") == ["000000000"], "its web caption is empty"
    with pytest.raises(UsageError, match="no sample with the key nothing"):
        keys_of(run, keys=("000000000", "nothing"))


def test_rows_that_failed(run: RunDir) -> None:
    browser = Browser(run, SampleQuery(reason="timeout"))
    found = [browser.sample(place) for place in iterate(open_deck(browser))]
    assert [sample.key for sample in found] == ["000009999", "000019999", "000029999"]
    assert {(sample.url, sample.reason, sample.has_picture) for sample in found} == {("http://x/y", "timeout", False)}
    browser = Browser(run, SampleQuery(reason="scoring_failed"))
    (first, *_) = aside = [browser.sample(place) for place in iterate(open_deck(browser))]
    assert [sample.key for sample in aside] == ["000000008", "000010008", "000020008"], "the captions set them aside"
    assert (first.has_picture, first.reason, first.captions) == (True, "scoring_failed", [])


@pytest.mark.parametrize("query", [{}, {"source": "web", "kept": True}, {"reason": "timeout"}])
def test_draws_repeat_and_every_sample_is_drawn_some_time(run: RunDir, query: dict[str, Any]) -> None:
    everything = keys_of(run, **query)
    draws = [keys_of(run, **query, num_random=2, seed=seed) for seed in range(60)]
    assert draws[:5] == [keys_of(run, **query, num_random=2, seed=seed) for seed in range(5)]
    assert {key for keys in draws for key in keys} == set(everything)
    assert all(keys == sorted(set(keys), key=everything.index) and len(keys) == 2 for keys in draws)
    assert keys_of(run, **query, num_random=1000) == everything


def test_walking_there_and_back(run: RunDir) -> None:
    for query in (SampleQuery(), SampleQuery(where="rank = 1", limit=7), SampleQuery(num_random=5)):
        deck = open_deck(Browser(run, query))
        places, place = [], deck.after(None)
        while place is not None:
            places.append(place)
            place = deck.after(place)
        back, place = [], deck.before(None)
        while place is not None:
            back.append(place)
            place = deck.before(place)
        assert back == places[::-1]
    deck = open_deck(Browser(run, SampleQuery()))
    last = deck.before(None)
    assert last is not None
    assert deck.position(last) == "9 of 9 in the shard"
    deck = open_deck(Browser(run, SampleQuery(where="rank = 1", limit=40)))
    first = deck.after(None)
    assert first is not None
    assert deck.position(first) == "1 of at most 40"
    assert deck.before(None) is not None
    assert deck.position(first) == "1 of 24", "now all are known"
    deck = open_deck(Browser(run, SampleQuery(num_random=40)))
    first = deck.after(None)
    assert first is not None
    assert deck.position(first) == "1 of 27"


def test_the_last_sample_is_found_without_those_between(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    browser = Browser(run, SampleQuery())
    original = browser._read
    monkeypatch.setattr(browser, "_content", lambda shard: read.append(shard) or original(shard))
    deck = open_deck(browser)
    assert deck.after(None)
    assert deck.before(None)
    assert set(read) == {0, 2}


@pytest.mark.parametrize(
    "query",
    [
        {"reason": "nonsense"}, {"reason": "timeout", "kept": True}, {"reason": "timeout", "where": "true"},
        {"reason": "timeout", "source": "web"}, {"reason": "low_itm", "kept": True}, {"source": "alt"},
        {"num_random": 2, "limit": 2}, {"num_random": 2, "keys": ("a",)},
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(query: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        SampleQuery(**query)


def test_runs_that_are_under_way(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path / "run")
    with pytest.raises(UsageError, match="No shards"):
        Browser(run, SampleQuery())
    small.commit_shard(run, num_samples=4)
    known = []
    for commit in (None, small.commit_captions, small.commit_clip, small.commit_itm, small.commit_manifest):
        if commit is not None:
            commit(run)
        browser = Browser(run, SampleQuery())
        samples = [browser.sample(place) for place in iterate(open_deck(browser))]
        assert [sample.key for sample in samples] == [f"0000000{n:02d}" for n in range(4)]
        row = {name: value for name, value in samples[1].captions[-1].items() if value is not None}
        known.append(set(row) & {"clip_score", "rank", "itm_score", "kept"})
        assert samples[1].captions[0]["text"] == "web caption of 000000001"
        assert [row["caption_index"] for row in samples[1].captions] == ([-1, 0, 1, 2] if commit else [-1])
        assert all(row["url"] == "http://x/000000001" for row in samples[1].captions)
        if commit is not small.commit_manifest:
            with pytest.raises(UsageError, match="no manifest"):
                Browser(run, SampleQuery(kept=True))
    assert known == [set(), set(), {"clip_score", "rank"}, {"clip_score", "rank"}, {"clip_score", "rank", "kept"}]
    assert keys_of(run, where="itm_score > 0.5") == ["000000000", "000000001", "000000002"]


def test_a_generation_has_its_own_verdicts(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path / "run")
    small.commit_all(run, 1, 4)
    other = RunDir.open(run.path, "strict")
    small.commit_manifest(other, threshold=0.95)
    assert keys_of(run, kept=True)
    assert keys_of(other, kept=True) == []
    browser = Browser(other, SampleQuery(reason="low_itm"))
    assert {browser.sample(place).threshold for place in iterate(open_deck(browser))} == {0.95}


def test_a_picture_of_the_run_is_rgb(run: RunDir) -> None:
    browser = Browser(run, SampleQuery(limit=1))
    (place,) = iterate(open_deck(browser))
    assert isinstance(browser.picture(place), Image.Image)
    assert browser.picture(place).mode == "RGB"
