"""The page in headless Chromium: it renders, filters and sorts, asks no network, and runs no script but ours."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from capfilt.data.manifest import read_manifest
from capfilt.data.rundir import RunDir
from capfilt.data.sealed import read_sealed, sealed_bytes
from capfilt.report.page import write_report
from tests.hostile_texts import PAYLOADS, run_with_texts
from tests.train.small_models import save_run

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed (Debian: apt install chromium)")
SHOWN = "() => [...document.querySelectorAll('.captions li')].filter((e) => e.checkVisibility()).length"
CARDS = "() => [...document.querySelectorAll('.card')].filter((e) => e.checkVisibility()).map((e) => e.dataset.{})"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


class Opened:
    """A page, with what it logged and asked for."""

    def __init__(self, browser: Any, file: Path, **options: Any) -> None:
        self.page = browser.new_page(**options)
        self.logged: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.logged.append(message.text))
        self.page.on("pageerror", lambda error: self.logged.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.logged.append("dialog"), dialog.dismiss()))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(file.as_uri())

    def check_quiet(self, file: Path) -> None:
        assert self.logged == []
        assert [url for url in self.asked if not url.startswith("data:image/jpeg;base64,")] == [file.as_uri()]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """Pairs of both sources, some of which have no ITM score."""
    run = save_run(tmp_path_factory.mktemp("runs") / "run", [12, 9], drop_every=3)
    for shard in run.shard_names():
        table, record, _ = read_sealed(run.stage_file("manifest", shard))
        rows = table.to_pylist()
        for number, row in enumerate(rows):
            row |= {"source": ("web", "synthetic")[number % 2], "itm_score": number * 37 % 100 / 100}
        for row in rows[::5]:
            row |= {"itm_score": None, "kept": False, "drop_reason": "low_clip"}
        changed = pa.Table.from_pylist(rows, schema=table.schema)
        run.stage_file("manifest", shard).write_bytes(sealed_bytes(changed, record))
    return run


@pytest.fixture(scope="module")
def file(run: RunDir, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("pages") / "report.html"
    write_report(run, output, num_pairs=100)
    return output


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_renders_in_both_colours(browser: Any, file: Path, scheme: str) -> None:
    opened = Opened(browser, file, color_scheme=scheme, viewport={"width": 1200, "height": 800})
    background, ink = (
        opened.page.evaluate(f"() => getComputedStyle(document.body).{name}.match(/\\d+/g).map(Number)")
        for name in ("backgroundColor", "color")
    )
    assert contrast(background, ink) > 7, "WCAG AAA"
    assert (sum(background) < sum(ink)) == (scheme == "dark")
    for name in ("s0", "s1", "s2", "soft"):
        color = opened.page.evaluate(
            f"() => {{ const e = document.createElement('i'); e.style.color = 'var(--{name})'; document.body.append(e);"
            " return getComputedStyle(e).color.match(/\\d+/g).map(Number); }"
        )
        assert contrast(background, color) > 4.5, f"{name}: WCAG AA"
    widths = opened.page.evaluate("() => [document.documentElement.scrollWidth, innerWidth]")
    assert widths[0] <= widths[1]
    pictures = opened.page.evaluate("() => [...document.images].map((e) => e.complete && e.naturalWidth > 0)")
    assert pictures
    assert all(pictures)
    assert opened.page.evaluate("() => [...document.images].every((e) => e.alt !== '')")
    opened.check_quiet(file)


def contrast(first: list[float], second: list[float]) -> float:
    """WCAG 2.1's contrast ratio of two colours."""

    def luminance(color: list[float]) -> float:
        parts = [part / 255 for part in color[:3]]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(first), luminance(second)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_it_fits_a_telephone(browser: Any, file: Path) -> None:
    opened = Opened(browser, file, viewport={"width": 360, "height": 640})
    assert opened.page.evaluate("() => document.documentElement.scrollWidth") <= 360


def test_filters_and_orders(browser: Any, file: Path, run: RunDir) -> None:
    rows = read_manifest([run]).to_pylist()
    page = (opened := Opened(browser, file)).page
    assert page.evaluate(SHOWN) == len(rows)
    for verdict, num in (
        ("kept", sum(row["kept"] for row in rows)), ("dropped", sum(not row["kept"] for row in rows)),
    ):  # fmt: skip
        page.select_option("select[name=verdict]", verdict)
        assert page.evaluate(SHOWN) == num > 0
        assert f"{num} captions" in page.inner_text("#shown")
    page.select_option("select[name=verdict]", "")
    for source in ("web", "synthetic"):
        page.select_option("select[name=source]", source)
        assert page.evaluate(SHOWN) == sum(row["source"] == source for row in rows) < len(rows)
    page.select_option("select[name=source]", "")
    judged = sorted(row["itm_score"] for row in rows if row["itm_score"] is not None)
    page.fill("input[name=least]", "0.5")
    page.fill("input[name=most]", "0.95")
    assert page.evaluate(SHOWN) == sum(0.5 <= score <= 0.95 for score in judged) < len(judged) < len(rows)
    page.click("input[type=reset]")
    page.wait_for_function(f"() => ({SHOWN})() === {len(rows)}")
    for order, name, sign in (
        ("itm-up", "itm", 1), ("itm-down", "itm", -1), ("clip-up", "clip", 1), ("clip-down", "clip", -1),
        ("nearest", "distance", 1),
    ):  # fmt: skip
        page.select_option("select[name=order]", order)
        values = [sign * float(value) for value in page.evaluate(CARDS.format(name))]
        assert values == sorted(values)
    page.select_option("select[name=order]", "key")
    keys = page.evaluate(CARDS.format("key"))
    assert keys == sorted(keys)
    opened.check_quiet(file)


def test_without_scripts_all_is_there(browser: Any, file: Path, run: RunDir) -> None:
    page = Opened(browser, file, java_script_enabled=False).page
    assert page.locator(".captions li").count() == read_manifest([run]).num_rows
    assert not page.locator("#filters").is_visible(), "what does nothing is not shown"


def test_it_can_be_used_by_keyboard(browser: Any, file: Path) -> None:
    page = Opened(browser, file).page
    reached = set()
    for _ in range(60):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("() => document.activeElement.name || document.activeElement.tagName"))
    assert {"source", "verdict", "least", "most", "order", "SUMMARY"} <= reached


def test_no_text_of_the_run_runs(browser: Any, tmp_path: Path) -> None:
    run = run_with_texts(tmp_path / "<b>run", PAYLOADS)
    output = tmp_path / "report.html"
    write_report(run, output, num_pairs=1000)
    opened = Opened(browser, output)
    opened.page.wait_for_timeout(300)
    opened.check_quiet(output)
    assert opened.page.locator("script").count() == 1
    assert opened.page.evaluate("() => document.querySelectorAll('iframe, object, embed, a, link, base').length") == 0
