"""Ranks, the top K, the threshold and the reasons, beside a plain loop over the captions of one image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from capfilt.curation.annotate import annotate
from capfilt.curation.selection import SOURCES, captions_to_filter, rank_captions, reselect, select_pairs
from capfilt.data.rundir import RunDir
from capfilt.data.schemas import SCHEMAS
from capfilt.data.verify import verify_run
from capfilt.errors import FingerprintMismatchError, UsageError
from tests.curation.small_runs import make_run, read_stage, save_models

TEXTS = st.sampled_from(["", "a dog", "a cat", "a tree", "the sky", " "])
SCORES = {"a dog": 0.3, "a cat": 0.3, "a tree": -0.2, "the sky": 0.5}
CAPTIONS = st.lists(TEXTS, min_size=1, max_size=8).map(
    lambda texts: [(index, text, SCORES.get(text)) for index, text in enumerate(texts, start=-1)]
)

PATIENT = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


@PATIENT
@given(captions=CAPTIONS, include_web=st.booleans())
def test_ranks_are_those_of_a_plain_sort(captions: list[Any], include_web: bool) -> None:
    ranked = rank_captions(captions, include_web=include_web)
    assert [(c.caption_index, c.text, c.clip_score) for c in ranked] == captions
    competing = [c for c in captions if c[2] is not None and (include_web or c[0] >= 0)]
    distinct = {text: index for index, text, _ in reversed(competing)}  # the lowest index stays
    order = sorted(distinct.items(), key=lambda item: (-SCORES[item[0]], item[1]))
    expected = {index: place for place, (_, index) in enumerate(order, start=1)}
    for caption in ranked:
        index = caption.caption_index
        assert caption.rank == expected.get(index)
        is_copy = (index, caption.text, caption.clip_score) in competing and index not in expected
        assert caption.duplicate_of == (distinct[caption.text] if is_copy else None)


def test_equal_float32_scores_rank_by_index() -> None:
    near = 0.25 + 1e-9  # stored as the same float32
    ranked = rank_captions([(-1, "w", 0.9), (0, "a", 0.25), (1, "b", near)], include_web=False)
    assert [caption.rank for caption in ranked] == [None, 1, 2]


def plain_reason(
    row: dict[str, Any], web: str, itm: float | None, threshold: float, keep: int, include_web: bool,
    sources: tuple[str, ...],
) -> str | None:  # fmt: skip
    if row["clip_score"] is None:
        return "empty"
    if row["source"] not in sources:
        return "other_source"
    if row["duplicate_of"] is not None:
        return "duplicate"
    is_free_web = row["caption_index"] == -1 and not include_web
    if not is_free_web and (row["rank"] is None or row["rank"] > keep):
        return "low_clip"
    assert itm is not None
    if float(np.float32(itm)) < threshold:  # as any reader of the manifest would compare them
        return "low_itm"
    return "duplicate" if row["caption_index"] >= 0 and row["text"] == web and "web" in sources else None


@PATIENT
@given(
    images=st.lists(CAPTIONS, min_size=1, max_size=4), include_web=st.booleans(), keep=st.integers(1, 4),
    stored_keep=st.integers(1, 4), threshold=st.sampled_from([0.0, 0.5, 0.7, 1.0]), seed=st.integers(0, 99),
    sources=st.sampled_from([("web", "synthetic"), ("web",), ("synthetic",)]),
)  # fmt: skip
def test_manifest_is_that_of_a_plain_loop(
    images: list[Any], include_web: bool, keep: int, stored_keep: int, threshold: float, seed: int,
    sources: tuple[str, ...],
) -> None:  # fmt: skip
    keep = min(keep, stored_keep)
    generator = np.random.default_rng(seed)
    itm_of = {text: float(generator.choice([0.0, 0.2, 0.5, 0.7, 1.0])) for text in SCORES}
    clip_rows, itm_rows, samples = [], [], []
    for number, captions in enumerate(images):
        key, ranked = f"{number:03d}", rank_captions(captions, include_web=include_web)
        samples.append({"key": key, "url": f"u{number}", "width": number, "height": 2, "sha256": f"s{number}"})
        for c in ranked:
            source = "web" if c.caption_index == -1 else "synthetic"
            row = {"key": key, "caption_index": c.caption_index, "source": source, "text": c.text}
            found = {"clip_score": c.clip_score, "rank": c.rank, "duplicate_of": c.duplicate_of}
            clip_rows.append(row | found)
        for c in captions_to_filter(ranked, keep=stored_keep, include_web=include_web):
            row = {"key": key, "caption_index": c.caption_index, "itm_score": itm_of[c.text]}
            itm_rows.append(row)
    facts = pa.Table.from_pylist([{"key": "none", "url": "x", "width": 9, "height": 9, "sha256": "x"}, *samples])
    manifest = select_pairs(
        "00000", facts, pa.Table.from_pylist(clip_rows, schema=SCHEMAS["clip"]),
        pa.Table.from_pylist(itm_rows, schema=SCHEMAS["itm"]), threshold=threshold, keep=keep,
        include_web=include_web, sources=sources,
    )  # fmt: skip
    assert manifest.schema.equals(SCHEMAS["manifest"])
    scored = {(row["key"], row["caption_index"]): row["itm_score"] for row in itm_rows}
    webs = {row["key"]: row["text"] for row in clip_rows if row["caption_index"] == -1}
    rows = manifest.to_pylist()
    assert [(row["key"], row["caption_index"]) for row in rows] == [(r["key"], r["caption_index"]) for r in clip_rows]
    for row, clip in zip(rows, clip_rows, strict=True):
        itm = scored.get((row["key"], row["caption_index"]))
        reason = plain_reason(clip, webs[row["key"]], itm, threshold, keep, include_web, sources)
        assert (row["drop_reason"], row["kept"]) == (reason, reason is None)
        assert row["itm_score"] == (None if itm is None else float(np.float32(itm)))
        assert (row["width"], row["url"]) == (int(row["key"]), f"u{int(row['key'])}")
    kept = [(row["key"], row["text"]) for row in rows if row["kept"]]
    assert len(kept) == len(set(kept)), "a pair would be there twice"


def test_select_replaces_the_manifest_and_refuses_what_was_not_scored(tmp_path: Path) -> None:
    models = save_models(tmp_path / "models")
    run = make_run(tmp_path / "run")
    with pytest.raises(UsageError, match="Run `capfilt caption"):
        reselect(run)
    annotate(run, ["captions", "clip", "itm", "manifest"], models.caption(), models.rank(), models.filter())
    before = read_stage(run, "manifest")
    summary = reselect(run, threshold=0.5, keep=2)
    assert summary.num_new_shards == 0
    assert "Nothing to do" in summary.line()
    strict = reselect(run, threshold=0.9, keep=1)
    assert strict.num_new_shards == 2
    assert strict.num_kept < summary.num_kept
    assert strict.num_pairs == summary.num_pairs == strict.num_kept + sum(strict.drop_reasons.values())
    rows = [row for table in read_stage(run, "manifest").values() for row in table.to_pylist() if row["kept"]]
    assert all(row["itm_score"] >= 0.9 and (row["rank"] or 1) <= 1 for row in rows)
    assert reselect(run).num_new_shards == 0, "what is not given stays"
    looser = reselect(run, threshold=0.1)
    assert (looser.threshold, looser.keep) == (0.1, 1)
    beside = reselect(RunDir.open(run.path, "beside"), keep=1)
    assert (beside.threshold, beside.num_kept) == (0.1, looser.num_kept), "it starts from the default generation's"
    with pytest.raises(FingerprintMismatchError, match="select .* --threshold 0.5 --keep 2"):
        annotate(run, ["captions", "clip", "itm", "manifest"], models.caption(), models.rank(), models.filter())
    reselect(run, threshold=0.5, keep=2)
    assert read_stage(run, "manifest") == before
    with pytest.raises(UsageError, match="the filter saw the top 2"):
        reselect(run, keep=3)
    with pytest.raises(UsageError, match="threshold"):
        reselect(run, threshold=1.5)


def test_select_takes_captions_of_one_source(tmp_path: Path) -> None:
    models = save_models(tmp_path / "models")
    run = make_run(tmp_path / "run")
    settings = (models.caption(), models.rank(), models.filter(threshold=0.0))
    annotate(run, ["captions", "clip", "itm", "manifest"], *settings)
    everything = reselect(run)
    before = read_stage(run, "manifest")
    kept: dict[str, int] = {}
    for source in SOURCES:
        view = RunDir.open(run.path, source)
        summary = reselect(view, sources=[source])
        rows = [row for table in read_stage(view, "manifest").values() for row in table.to_pylist()]
        assert {row["source"] for row in rows if row["kept"]} == {source}
        others = {row["drop_reason"] for row in rows if row["source"] != source}
        assert others <= {"other_source", "empty"}
        assert reselect(view).num_new_shards == 0, "what is not given stays"
        assert f"of {source} captions keep" in reselect(view).line()
        assert verify_run(view).exit_code == 0
        kept[source] = summary.num_kept
    repeated = sum(row["drop_reason"] == "duplicate" for table in before.values() for row in table.to_pylist())
    assert sum(kept.values()) >= everything.num_kept >= sum(kept.values()) - repeated
    assert read_stage(run, "manifest") == before, "generations stand beside it"

    web = RunDir.open(run.path, "web")
    with pytest.raises(FingerprintMismatchError, match="--sources web,synthetic --generation web"):
        annotate(web, ["manifest"], *settings)
    reselect(web, sources=["synthetic", "web"])
    assert read_stage(web, "manifest") == before
    with pytest.raises(UsageError, match="sources is web, human; expected some of web, synthetic"):
        reselect(web, sources=["web", "human"])
