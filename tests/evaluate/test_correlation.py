"""Kendall's tau against pair counting and scipy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import kendalltau

from capfilt.evaluate.correlation import kendall_tau

ROWS = st.lists(
    st.tuples(st.sampled_from([0.0, 0.25, 0.5, 0.75]) | st.floats(0, 1), st.integers(1, 4)), min_size=1, max_size=25
)


@given(ROWS)
def test_against_pair_counting(rows: list[tuple[float, int]]) -> None:
    found = kendall_tau(np.array([score for score, _ in rows]), np.array([judgment for _, judgment in rows]))
    distinct = min(len({score for score, _ in rows}), len({judgment for _, judgment in rows}))
    assert found.num_rows == len(rows)
    if distinct < 2:
        assert found.tau_b is found.tau_c is None
        return
    pairs = [(a, b) for number, a in enumerate(rows) for b in rows[:number]]
    excess = sum(np.sign(a[0] - b[0]) * np.sign(a[1] - b[1]) for a, b in pairs)
    untied = [sum(a[side] != b[side] for a, b in pairs) for side in (0, 1)]
    assert found.tau_b == pytest.approx(excess / np.sqrt(untied[0] * untied[1]))
    assert found.tau_c == pytest.approx(2 * excess / (len(rows) ** 2 * (distinct - 1) / distinct))


def test_against_scipy_at_the_size_of_flickr8k() -> None:
    rng = np.random.default_rng(0)
    judgments = rng.choice([1, 2, 3, 4], 17_000, p=[0.6, 0.2, 0.15, 0.05])
    scores = np.round(rng.normal(0.2 + 0.02 * judgments, 0.05), 3)
    found = kendall_tau(scores, judgments)
    for variant, ours in (("b", found.tau_b), ("c", found.tau_c)):
        assert ours == pytest.approx(kendalltau(scores, judgments, variant=variant).statistic, abs=1e-12)
    assert found.tau_c is not None
    assert found.tau_c > 0.1


def test_the_order_and_its_opposite() -> None:
    judgments = np.array([1, 1, 2, 2])
    assert kendall_tau(np.array([0.1, 0.2, 0.3, 0.4]), judgments).tau_c == pytest.approx(1.0)
    assert kendall_tau(np.array([0.4, 0.3, 0.2, 0.1]), judgments).tau_c == pytest.approx(-1.0)
