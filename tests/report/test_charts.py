"""Charts, read back out of their SVG."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest

from capfilt.report.charts import BAR_WIDTH, BOTTOM, HEIGHT, LEFT, TOP, WIDTH, bar_table, curve, histogram
from tests.hostile_texts import PAYLOADS
from tests.report.pages import Page


def points_of(html: str, kind: str) -> list[tuple[float, float]]:
    found = re.search(rf'class="{kind}" points="([^"]*)"', html)
    assert found is not None
    return [(float(x), float(y)) for x, y in (point.split(",") for point in found[1].split())]


def test_a_histogram_s_areas_are_the_shares() -> None:
    counts = {"web": [0, 1, 3, 0], "synthetic": [0, 4, 0, 4]}
    html = "".join(histogram("ITM score", [0.0, 0.25, 0.5, 0.75, 1.0], counts, mark=0.5))
    ground, top = HEIGHT - BOTTOM, TOP
    web = points_of(html, "s0 area")[1:-1]
    heights = [(ground - y) / (ground - top) for _, y in web[::2]]
    assert heights == pytest.approx([0.25 / 0.75, 1.0, 0.0], abs=0.01), "from the first to the last bin that is filled"
    assert web[0][0] == LEFT
    assert web[-1][0] == WIDTH - LEFT
    mark = re.search(r'class="mark" x1="([\d.]+)"', html)
    assert mark is not None
    assert float(mark[1]) == pytest.approx(LEFT + (WIDTH - 2 * LEFT) / 3, abs=0.1), "0.5 of 0.25 to 1"
    assert "25.0%" in html
    assert "75.0%" in html
    assert "".join(histogram("nothing", [0.0, 1.0], {"web": [0]})) == ""


def test_a_curve_falls_as_its_values() -> None:
    html = "".join(curve("kept", [0.0, 0.5, 1.0], {"web": [1.0, 0.5, 0.25]}, mark=0.5))
    found = points_of(html, "s0 line")
    assert all(first[1] < second[1] for first, second in pairwise(found))
    assert found[0] == (LEFT, TOP)
    assert found[1][0] == pytest.approx(WIDTH / 2, abs=0.1)
    assert "threshold 0.5" in html


def test_bars_are_as_long_as_their_shares() -> None:
    html = "".join(bar_table("reasons", [("timeout", 3, "slow"), ("gone", 1, ""), ("none", 0, "")], 4))
    assert re.findall(r'width="(\d+)"', html) == [str(BAR_WIDTH * 3 // 4), str(BAR_WIDTH // 4), "0"]
    assert "75.0%" in html
    assert "".join(bar_table("empty", [], 4)) == ""


def test_names_are_text() -> None:
    for payload in PAYLOADS:
        html = "".join(bar_table(payload, [(payload, 1, payload)], 1))
        html += "".join(histogram(payload, [0.0, 1.0], {payload: [1]}))
        tags = {tag for tag, _ in Page(html).tags}
        assert tags <= {
            "table", "caption", "tr", "th", "td", "svg", "rect", "figure", "figcaption", "span", "polygon", "line",
            "text", "details", "summary",
        }  # fmt: skip
