"""Figures of scores against labels, each against a plain count."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from capfilt.evaluate.labelled_scores import area_under_curve, calibrate, measure_scores

SCORES = st.lists(st.sampled_from([0.0, 0.1, 0.5, 0.7, 1.0]), min_size=1, max_size=20)
PAIRS = st.lists(
    st.tuples(st.sampled_from([0.0, 0.05, 0.3, 0.5, 0.500001, 0.7, 0.95, 1.0]) | st.floats(0, 1), st.booleans()),
    min_size=1,
    max_size=30,
)


def split(pairs: list[tuple[float, bool]]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([score for score, _ in pairs]), np.array([label for _, label in pairs])


def counts_at(pairs: list[tuple[float, bool]], threshold: float) -> tuple[int, int, int, int]:
    """True and false pairs kept, true and false pairs dropped."""
    kept = [label for score, label in pairs if score >= threshold]
    dropped = [label for score, label in pairs if not score >= threshold]
    return sum(kept), len(kept) - sum(kept), sum(dropped), len(dropped) - sum(dropped)


@given(SCORES, SCORES)
def test_area_under_curve_counts_pairs(positive: list[float], negative: list[float]) -> None:
    wins = [1.0 if p > n else 0.5 if p == n else 0.0 for p in positive for n in negative]
    assert area_under_curve(np.array(positive), np.array(negative)) == pytest.approx(np.mean(wins))


@given(PAIRS, st.sampled_from([0.0, 0.5, 0.7, 1.0]) | st.floats(0, 1))
def test_a_threshold_keeps_what_reaches_it(pairs: list[tuple[float, bool]], threshold: float) -> None:
    found = measure_scores(*split(pairs), threshold=threshold)
    for step in (found.at_threshold, *found.sweep):
        assert step is not None
        true_kept, false_kept, true_dropped, false_dropped = counts_at(pairs, step.threshold)
        kept = true_kept + false_kept
        assert (step.num_kept, step.kept_share) == (kept, kept / len(pairs))
        assert step.precision == (true_kept / kept if kept else None)
        assert step.recall == (true_kept / found.num_true if found.num_true else None)
        assert step.accuracy == (true_kept + false_dropped) / len(pairs)
        errors = false_kept + true_dropped
        assert step.f1 == (pytest.approx(2 * true_kept / (2 * true_kept + errors)) if true_kept or errors else 0.0)


@given(PAIRS, st.sampled_from([0.3, 0.5, 0.8, 1.0]))
def test_thresholds_chosen_are_the_best_of_all(pairs: list[tuple[float, bool]], target: float) -> None:
    found = measure_scores(*split(pairs), target_precision=target)
    if found.num_true in (0, len(pairs)):
        assert found.auc is found.average_precision is found.best_f1 is found.at_precision is None
        return
    steps = {score: counts_at(pairs, score) for score, _ in pairs}
    f1 = {score: 2 * tp / (2 * tp + fp + fn) for score, (tp, fp, fn, _) in steps.items()}
    assert found.best_f1 is not None
    assert found.best_f1.f1 == pytest.approx(max(f1.values()))
    reaching = [score for score, (tp, fp, _, _) in steps.items() if tp / (tp + fp) >= target - 1e-12]
    assert (found.at_precision and found.at_precision.threshold) == (min(reaching) if reaching else None)


@given(PAIRS)
def test_average_precision_sums_over_falling_thresholds(pairs: list[tuple[float, bool]]) -> None:
    found = measure_scores(*split(pairs))
    if found.average_precision is None:
        return
    total = last_recall = 0.0
    for score in sorted({score for score, _ in pairs}, reverse=True):
        true_kept, false_kept, true_dropped, _ = counts_at(pairs, score)
        recall = true_kept / (true_kept + true_dropped)
        total += (recall - last_recall) * true_kept / (true_kept + false_kept)
        last_recall = recall
    assert found.average_precision == pytest.approx(total)


@given(PAIRS, st.integers(1, 12))
def test_calibration_by_bins(pairs: list[tuple[float, bool]], num_bins: int) -> None:
    scores, labels = split(pairs)
    found = calibrate(scores, labels, num_bins)
    assert sum(one.num_pairs for one in found.bins) == len(pairs)
    error = 0.0
    for number, one in enumerate(found.bins):
        is_last = number == num_bins - 1
        own = [(s, y) for s, y in pairs if one.low <= s < one.high or (is_last and s == 1.0)]
        assert one.num_pairs == len(own)
        if own:
            mean, share = np.mean([s for s, _ in own]), np.mean([y for _, y in own])
            assert (one.mean_score, one.share_true) == (pytest.approx(mean), pytest.approx(share))
            error += len(own) / len(pairs) * abs(mean - share)
    assert found.expected_error == pytest.approx(error)
    assert found.brier == pytest.approx(np.mean([(s - y) ** 2 for s, y in pairs]))


def test_scores_of_any_range_are_swept_over_their_quantiles() -> None:
    scores = np.linspace(-0.2, 0.4, 101)
    found = measure_scores(scores, scores > 0.1, threshold=None, is_probability=False)
    assert found.calibration is None
    assert found.at_threshold is None
    assert len(found.sweep) == 19
    assert {step.threshold for step in found.sweep} <= set(scores.tolist())
    assert found.auc == 1.0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_scores_that_are_no_numbers_are_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="finite"):
        measure_scores(np.array([0.1, bad]), np.array([True, False]))
