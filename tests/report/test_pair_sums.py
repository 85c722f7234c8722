"""Sums of captions and pairs, beside the same one image at a time."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from capfilt.curation.selection import rank_captions, select_pairs
from capfilt.data.schemas import SCHEMAS
from capfilt.report.pair_sums import THRESHOLDS, CaptionSums, ImageSums, PairSums, scores_of_repeats

SCORES = st.one_of(st.none(), st.sampled_from([-0.5, 0.0, 0.25, 0.5]))
ITM = st.sampled_from([0.05, 0.3, 0.5, 0.7, 0.95])
IMAGES = st.lists(st.tuples(SCORES, st.lists(st.tuples(SCORES, st.booleans()), max_size=4)), max_size=8)
COLUMNS = ["key", "source", "text", "clip_score", "itm_score", "kept", "drop_reason"]


def manifest_rows(rows: list[dict[str, object]]) -> pa.Table:
    return pa.Table.from_pylist(rows, schema=pa.schema([SCHEMAS["manifest"].field(name) for name in COLUMNS]))


@given(IMAGES)
def test_whose_caption_is_the_best(images: list[tuple[float | None, list[tuple[float | None, bool]]]]) -> None:
    rows: list[dict[str, object]] = []
    kept = compared = first = 0
    for number, (web, synthetic) in enumerate(images):
        rows.append({"key": str(number), "source": "web", "clip_score": web, "kept": False})
        rows += [
            {"key": str(number), "source": "synthetic", "clip_score": score, "kept": is_kept}
            for score, is_kept in synthetic
        ]
        kept += any(is_kept for _, is_kept in synthetic)
        scores = [score for score, _ in synthetic if score is not None]
        if web is not None and scores:
            compared += 1
            first += max(scores) > web
    sums = ImageSums()
    sums.add(manifest_rows(rows))
    assert (sums.num_kept, sums.num_compared, sums.num_synthetic_first) == (kept, compared, first)


@given(st.lists(st.tuples(st.floats(0, 1, width=32), st.sampled_from([None, "low_itm", "low_clip"])), max_size=30))
def test_a_threshold_keeps_what_the_selection_keeps(judged: list[tuple[float, str | None]]) -> None:
    """Scores are float32 and thresholds float64: 0.9 as a score is below the threshold 0.9."""
    rows: list[dict[str, object]] = [
        {"source": "web", "text": "a", "itm_score": score, "kept": reason is None, "drop_reason": reason}
        for score, reason in [*judged, (0.9, None), (0.5, None)]
    ]
    sums = PairSums()
    sums.add(manifest_rows(rows))
    scores = [float(np.float32(row["itm_score"])) for row in rows if row["drop_reason"] != "low_clip"]  # type: ignore[arg-type]
    assert sums.num_candidates == len(scores)
    expected = [sum(score >= threshold for score in scores) for threshold in THRESHOLDS]
    assert sums.num_passing.tolist() == expected
    assert sums.num_chosen == sum(reason is None for _, reason in judged) + 2
    assert expected[90] == sum(score > 0.9 for score in scores)


WORDS = ["a dog", "a cat", "two cats", ""]
SHOWN = st.lists(
    st.tuples(
        st.sampled_from(WORDS), st.lists(st.sampled_from(WORDS), max_size=5), st.lists(ITM, min_size=4, max_size=4)
    ),
    min_size=1,
    max_size=5,
)
"""Of each image: the web caption, the synthetic ones, and the ITM score of each of WORDS."""


@given(SHOWN, st.integers(1, 3), st.booleans(), st.sampled_from([("web", "synthetic"), ("synthetic",)]))
def test_the_curve_is_what_other_selections_keep(
    images: list[tuple[str, list[str], list[float]]], keep: int, include_web: bool, sources: tuple[str, ...]
) -> None:
    clip_rows, itm_rows = list[dict[str, object]](), list[dict[str, object]]()
    for number, (web, synthetic, scores) in enumerate(images):
        captions = [
            (n, text, None if not text else len(text) / 10) for n, text in enumerate([web, *synthetic], start=-1)
        ]
        for caption in rank_captions(captions, include_web=include_web):
            own = {"key": str(number), "caption_index": caption.caption_index}
            score, text = caption.clip_score, caption.text
            others = {"source": "web" if caption.caption_index < 0 else "synthetic", "text": text, "rank": caption.rank}
            clip_rows.append(own | others | {"clip_score": score, "duplicate_of": caption.duplicate_of})
            itm_rows.append(own | {"itm_score": scores[WORDS.index(text)] if text else None})
    facts = pa.Table.from_pylist(
        [{"key": str(n), "url": "x", "width": 9, "height": 9, "sha256": "x"} for n in range(len(images))]
    )

    def selected(threshold: float) -> pa.Table:
        return select_pairs(
            "00000", facts, pa.Table.from_pylist(clip_rows, schema=SCHEMAS["clip"]),
            pa.Table.from_pylist(itm_rows, schema=SCHEMAS["itm"]), threshold=threshold, keep=keep,
            include_web=include_web, sources=sources,
        )  # fmt: skip

    for chosen in (0.1, 0.5, 0.9):
        table = selected(chosen)
        for source in ("web", "synthetic"):
            sums = PairSums()
            sums.add(table.filter(pa.compute.equal(table["source"], source)))
            if source == "synthetic":
                sums.leave_out(scores_of_repeats(table))
            for number in (0, 10, 50, 90, 100):
                rows = selected(THRESHOLDS[number]).to_pylist()
                assert sums.num_passing[number] == sum(row["kept"] for row in rows if row["source"] == source)


def test_the_sample_is_whole_images_spread_over_the_shard() -> None:
    texts = {f"{number:03d}": [f"Caption {number}, {turn}!" for turn in range(3)] for number in range(100)}
    rows = [{"key": key, "text": text} for key, own in texts.items() for text in own]
    sums = CaptionSums()
    sums.add(pa.Table.from_pylist(rows), 10)
    plain = [[text.lower().replace(",", " ").replace("!", " ") for text in own] for own in texts.values()]
    assert sums.sample == plain[::10]
    sums = CaptionSums()
    sums.add(pa.Table.from_pylist(rows), 1000)
    assert sums.sample == plain
    assert (sums.num_captions, sums.distinct) == (300, {3: 100})
