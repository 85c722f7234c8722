"""Sums of captions and pairs, beside the same one image at a time."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from capfilt.data.schemas import SCHEMAS
from capfilt.report.pair_sums import THRESHOLDS, CaptionSums, ImageSums, PairSums

SCORES = st.one_of(st.none(), st.sampled_from([-0.5, 0.0, 0.25, 0.5]))
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
