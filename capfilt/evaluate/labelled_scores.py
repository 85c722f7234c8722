"""Scores of pairs against labels: what a threshold keeps, areas under curves, calibration.

In: a score and a label (True: the text is true of the image) of each pair. Out: figures, by plain counting. A pair is
kept when its score is at least the threshold, as `capfilt filter` keeps it; equal scores are kept or dropped together.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

NUM_BINS = 10
"""Bins of equal width over [0, 1] for the calibration."""
GRID = tuple(round(0.05 * step, 2) for step in range(1, 20))
"""Thresholds of the sweep over probabilities; other scores are swept over their quantiles."""

Scores = NDArray[np.float64]
Labels = NDArray[np.bool_]


@dataclass(frozen=True)
class AtThreshold:
    """What a threshold does. Shares are 0 to 1; precision is None where nothing is kept, recall where nothing is true.

    F1 is 0 where nothing true is kept.
    """

    threshold: float
    num_kept: int
    kept_share: float
    precision: float | None
    """True pairs over kept pairs."""
    recall: float | None
    """Kept true pairs over true pairs."""
    f1: float
    accuracy: float
    """Pairs kept and true, or dropped and false, over all."""


@dataclass(frozen=True)
class Bin:
    """Pairs whose score lies in [low, high); the last bin holds 1 too."""

    low: float
    high: float
    num_pairs: int
    mean_score: float | None
    share_true: float | None


@dataclass(frozen=True)
class Calibration:
    """How far probabilities are from shares of true pairs."""

    expected_error: float
    """Mean over the pairs of |mean score - share true| of their bin (expected calibration error)."""
    brier: float
    """Mean of (score - label)²."""
    bins: tuple[Bin, ...]


@dataclass(frozen=True)
class ScoreFigures:
    """Figures of a set of pairs. What needs true and false pairs is None where there is but one kind."""

    num_pairs: int
    num_true: int
    share_true: float
    at_threshold: AtThreshold | None
    """At the threshold asked for; None where none was."""
    auc: float | None
    """Area under the ROC curve: how often a true pair scores higher than a false one, ties counted half."""
    average_precision: float | None
    """Sum over the falling thresholds of precision times the gain of recall, without interpolation."""
    best_f1: AtThreshold | None
    """The threshold of the best F1; of equal ones the highest."""
    at_precision: AtThreshold | None
    """The most that can be kept with at least the precision asked for; None where no threshold reaches it."""
    sweep: tuple[AtThreshold, ...]
    calibration: Calibration | None
    """None for scores that are no probabilities."""


def measure_scores(
    scores: Scores,
    labels: Labels,
    *,
    threshold: float | None = 0.5,
    target_precision: float = 0.95,
    is_probability: bool = True,
    num_bins: int = NUM_BINS,
) -> ScoreFigures:
    """All figures of pairs (n,), n at least 1; scores must be finite."""
    scores, labels = np.asarray(scores, np.float64), np.asarray(labels, np.bool_)
    if scores.shape != labels.shape or scores.ndim != 1 or not len(scores):
        raise ValueError(f"scores {scores.shape}, labels {labels.shape}; expected one of each for every pair")
    if not np.isfinite(scores).all():
        raise ValueError("scores must be finite")
    curve = _Curve.of(scores, labels)
    has_both = 0 < curve.num_true < curve.num_pairs
    return ScoreFigures(
        num_pairs=curve.num_pairs,
        num_true=curve.num_true,
        share_true=curve.num_true / curve.num_pairs,
        at_threshold=None if threshold is None else curve.at(threshold),
        auc=area_under_curve(scores[labels], scores[~labels]) if has_both else None,
        average_precision=curve.average_precision() if has_both else None,
        best_f1=curve.best_f1() if has_both else None,
        at_precision=curve.at_precision(target_precision) if has_both else None,
        sweep=tuple(curve.at(step) for step in (GRID if is_probability else quantiles(scores))),
        calibration=calibrate(scores, labels, num_bins) if is_probability else None,
    )


def area_under_curve(positive: NDArray[np.floating], negative: NDArray[np.floating]) -> float:
    """Probability that a positive scores higher than a negative, ties counted half (ROC AUC)."""
    scores = np.concatenate([positive, negative])
    _, places, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    ranks = (ends - (counts - 1) / 2)[places]
    wins = ranks[: len(positive)].sum() - len(positive) * (len(positive) + 1) / 2
    return float(wins / (len(positive) * len(negative)))


def calibrate(scores: Scores, labels: Labels, num_bins: int = NUM_BINS) -> Calibration:
    """Probabilities against shares of true pairs, in bins of equal width over [0, 1]."""
    bounds = np.linspace(0.0, 1.0, num_bins + 1)
    places = np.clip(np.searchsorted(bounds, scores, side="right") - 1, 0, num_bins - 1)
    counts = np.bincount(places, minlength=num_bins)
    sums = np.bincount(places, weights=scores, minlength=num_bins)
    num_true = np.bincount(places, weights=labels, minlength=num_bins)
    bins = tuple(
        Bin(
            float(bounds[b]), float(bounds[b + 1]), int(counts[b]),
            float(sums[b] / counts[b]) if counts[b] else None,
            float(num_true[b] / counts[b]) if counts[b] else None,
        )
        for b in range(num_bins)
    )  # fmt: skip
    return Calibration(
        expected_error=float(np.abs(sums - num_true).sum() / len(scores)),
        brier=float(np.mean((scores - labels) ** 2)),
        bins=bins,
    )


def quantiles(scores: Scores) -> list[float]:
    """Scores at 5 %, 10 %, … 95 %, each once: thresholds for scores of any range."""
    shares = np.array(GRID)
    return [float(value) for value in np.unique(np.quantile(scores, shares, method="inverted_cdf"))]


@dataclass(frozen=True)
class _Curve:
    """What each distinct score, taken as the threshold, keeps; the highest first."""

    thresholds: Scores
    kept: NDArray[np.int64]
    true_kept: NDArray[np.int64]

    @staticmethod
    def of(scores: Scores, labels: Labels) -> _Curve:
        distinct, places, counts = np.unique(scores, return_inverse=True, return_counts=True)
        num_true = np.bincount(places, weights=labels, minlength=len(distinct)).astype(np.int64)
        return _Curve(distinct[::-1], np.cumsum(counts[::-1]), np.cumsum(num_true[::-1]))

    @property
    def num_pairs(self) -> int:
        return int(self.kept[-1])

    @property
    def num_true(self) -> int:
        return int(self.true_kept[-1])

    def at(self, threshold: float) -> AtThreshold:
        place = int(np.searchsorted(-self.thresholds, -threshold, side="right")) - 1
        kept, true_kept = (0, 0) if place < 0 else (int(self.kept[place]), int(self.true_kept[place]))
        return AtThreshold(
            threshold=float(threshold),
            num_kept=kept,
            kept_share=kept / self.num_pairs,
            precision=true_kept / kept if kept else None,
            recall=true_kept / self.num_true if self.num_true else None,
            f1=2 * true_kept / (kept + self.num_true) if kept + self.num_true else 0.0,
            accuracy=(true_kept + self.num_pairs - self.num_true - (kept - true_kept)) / self.num_pairs,
        )

    def average_precision(self) -> float:
        gains = np.diff(self.true_kept, prepend=0) / self.num_true
        return float((gains * self.true_kept / self.kept).sum())

    def best_f1(self) -> AtThreshold:
        best = int(np.argmax(self.true_kept / (self.kept + self.num_true)))
        return self.at(float(self.thresholds[best]))

    def at_precision(self, target: float) -> AtThreshold | None:
        reaching = np.flatnonzero(self.true_kept / self.kept >= target)
        return self.at(float(self.thresholds[reaching[-1]])) if len(reaching) else None
