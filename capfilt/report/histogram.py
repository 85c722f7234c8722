"""Counts of values between bounds, and of values one by one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc


@dataclass
class Histogram:
    """Counts between bounds: `counts[i]` values lie in [bounds[i], bounds[i + 1]); the last bin has both."""

    bounds: list[float]
    counts: list[int]

    @classmethod
    def even(cls, low: float, high: float, bins: int) -> Histogram:
        """Bins of equal width, empty."""
        return cls(list(_even_bounds(low, high, bins)), [0] * bins)

    def add(self, values: np.ndarray) -> None:
        """Count `values`; those outside the bounds count in the first or last bin, what is no number in none."""
        bins = np.searchsorted(np.array(self.bounds[1:-1]), values[~np.isnan(values)], side="right")
        self._add_counts(np.bincount(bins, minlength=len(self.counts)))

    def merge(self, other: Histogram) -> None:
        """Add the counts of another one with the same bounds."""
        self._add_counts(np.asarray(other.counts))

    def median(self) -> float | None:
        """Middle of the bin that the middle value is in; None of nothing."""
        before = np.cumsum(self.counts)
        if not before[-1]:
            return None
        middle = int(np.searchsorted(before, (before[-1] + 1) // 2))
        return (self.bounds[middle] + self.bounds[middle + 1]) / 2

    def _add_counts(self, counts: np.ndarray) -> None:
        self.counts = (np.asarray(self.counts) + counts).tolist()


@cache
def _even_bounds(low: float, high: float, bins: int) -> tuple[float, ...]:
    return tuple(round(float(bound), 6) for bound in np.linspace(low, high, bins + 1))


@dataclass
class Spread:
    """Whole numbers summed up: how many, least, median, mean, most."""

    num: int
    least: int
    median: float
    mean: float
    most: int


def spread_of(counter: Mapping[int, int]) -> Spread | None:
    """Exact figures of whole numbers given as value → times; None of nothing."""
    if not counter:
        return None
    values = np.array(sorted(counter))
    times = np.array([counter[int(value)] for value in values])
    before = np.cumsum(times)
    num = int(before[-1])
    low, high = (values[np.searchsorted(before, rank + 1)] for rank in ((num - 1) // 2, num // 2))
    return Spread(num, int(values[0]), float(low + high) / 2, float((values * times).sum() / num), int(values[-1]))


def counts_of(column: pa.ChunkedArray) -> dict[Any, int]:
    """Value → times, nulls left out."""
    return {item["values"]: item["counts"] for item in pc.value_counts(pc.drop_null(column)).to_pylist()}


def by_count(counter: Mapping[str, int]) -> dict[str, int]:
    """The most frequent first, then by the alphabet."""
    return dict(sorted(counter.items(), key=lambda item: (-item[1], item[0])))
