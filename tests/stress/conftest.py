"""The reliability matrix: what each row measured is printed at the end, a line a row.

A row is a file of tests, which give their figure with `figure(row, text)`. `make test` runs a sample of every row,
`make stress` (CAPFILT_STRESS=1) all of it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

FULL = os.environ.get("CAPFILT_STRESS", "") == "1"
"""Whether all of a row is run, not a sample."""

Figure = Callable[[int | str, str], None]

LONGEST_TEST_SECONDS = 3600 if FULL else 300
"""After which a test that names no time of its own is taken for hanging."""

_PROPERTY = "reliability"


@pytest.fixture
def figure(request: pytest.FixtureRequest) -> Figure:
    """Notes what a test of a row measured; the notes travel with the test's report, from other processes too.

    What has no row of the matrix has a name.
    """

    def note(row: int | str, text: str) -> None:
        name = f"row {row:02d}" if isinstance(row, int) else row
        request.node.user_properties.append((_PROPERTY, f"{name}: {text}"))

    return note


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Gives the tests of this folder their time."""
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent) and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(LONGEST_TEST_SECONDS))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Prints the figures of the tests that passed."""
    reports = [report for report in terminalreporter.stats.get("passed", []) if report.when == "call"]
    figures = sorted({text for report in reports for name, text in report.user_properties if name == _PROPERTY})
    if figures:
        terminalreporter.section("reliability, full" if FULL else "reliability, a sample")
        for text in figures:
            terminalreporter.write_line(text)
