"""Kendall's tau between a score and human judgments on a short scale, where both have ties.

In: scores and judgments. Out: tau-b or tau-c. Judgments have few levels: pairs are counted level against level, so the
time is that of sorting the scores once for every level.

For Flickr8k's expert judgments the field states tau-c, each expert's judgment being a row of its own (Hessel et al.
2021, CLIPScore: 5,664 pairs x 3 judgments, the pairs of an image and its own caption left out).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class KendallTau:
    """Agreement in order, -1 to 1; both variants, None where a side has one value only."""

    num_rows: int
    tau_b: float | None
    """(P - Q) / √((pairs not tied in the score) (pairs not tied in the judgment))."""
    tau_c: float | None
    """2 (P - Q) / (n² (m - 1) / m), m the smaller number of distinct values (Stuart)."""


def kendall_tau(scores: NDArray[np.floating], judgments: NDArray[np.integer]) -> KendallTau:
    """Of n rows; P pairs of rows are in the same order in both, Q in opposite order."""
    scores, judgments = np.asarray(scores), np.asarray(judgments)
    if scores.shape != judgments.shape or scores.ndim != 1:
        raise ValueError(f"scores {scores.shape}, judgments {judgments.shape}; expected one of each for every row")
    if not np.isfinite(scores).all():
        raise ValueError("scores must be finite")
    num_rows = len(scores)
    _, score_counts = np.unique(scores, return_counts=True)
    levels, level_counts = np.unique(judgments, return_counts=True)
    num_distinct = min(len(score_counts), len(level_counts))
    if num_distinct < 2:
        return KendallTau(num_rows, None, None)
    excess = 0  # P - Q
    below = np.sort(scores[judgments == levels[0]])
    for level in levels[1:]:
        own = scores[judgments == level]
        lower = np.searchsorted(below, own, side="left").sum()
        not_higher = np.searchsorted(below, own, side="right").sum()
        excess += int(lower) - (len(own) * len(below) - int(not_higher))
        below = np.sort(np.concatenate([below, own]))
    all_pairs = num_rows * (num_rows - 1) // 2
    untied = [all_pairs - int((counts * (counts - 1) // 2).sum()) for counts in (score_counts, level_counts)]
    return KendallTau(
        num_rows,
        tau_b=excess / (untied[0] ** 0.5 * untied[1] ** 0.5),
        tau_c=2 * excess * num_distinct / (num_rows**2 * (num_distinct - 1)),
    )
