"""Rows 16 and 17: what is written for browsers and spreadsheets does nothing there, whatever the texts hold."""

from __future__ import annotations

import base64
import csv
import hashlib
import random
import re
from pathlib import Path

import pandas
import pyarrow as pa
import pytest

from capfilt.data.manifest import read_manifest
from capfilt.data.rundir import RunDir
from capfilt.data.schemas import SCHEMAS
from capfilt.data.spreadsheets import from_cell, to_cell
from tests.cli.conftest import capfilt
from tests.hostile_texts import FORMULAS, PAYLOADS, TRICKS, UNSAFE, fuzzed, run_with_texts
from tests.report.pages import Page
from tests.stress.conftest import FULL, Figure

NAMELESS = ("head", "title", "style", "body", "main", "h1", "h2", "dl", "dt", "dd", "figure", "figcaption", "details",
            "summary", "table", "caption", "tr", "p", "bdi", "small", "script")  # fmt: skip
ALLOWED: dict[str, set[str]] = dict.fromkeys(NAMELESS, set()) | {
    "html": {"lang"}, "meta": {"charset", "http-equiv", "content", "name"}, "div": {"class"}, "dl": {"class"},
    "img": {"src", "alt"}, "span": {"class"}, "th": {"scope"}, "td": {"class"}, "ul": {"class", "id"},
    "li": {"class", "data-distance", "data-itm", "data-clip", "data-key", "data-source", "data-verdict"},
    "svg": {"class", "viewbox", "aria-hidden", "role", "aria-label"}, "rect": {"class", "x", "y", "width", "height"},
    "polygon": {"class", "points"}, "polyline": {"class", "points"}, "line": {"class", "x1", "y1", "x2", "y2"},
    "text": {"x", "y", "text-anchor"}, "form": {"id", "hidden"}, "label": set(), "select": {"name"},
    "option": {"value"}, "input": {"name", "type", "min", "max", "step", "value"}, "output": {"id", "role"},
}  # fmt: skip
"""Tag → attributes; none of them runs or loads anything but `src`, which is looked at."""
SHIPPED = {"style": "page.css", "script": "gallery.js"}
ROOT = Path(__file__).resolve().parent.parent.parent
FORMULA_SIGNS = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")
"""What spreadsheets take a cell for a formula by; not read from the code under test."""


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    return run_with_texts(tmp_path_factory.mktemp("hostile") / "<b>run", [*PAYLOADS, *TRICKS.values()])


def test_pages(hostile: RunDir, tmp_path: Path, figure: Figure) -> None:
    output = tmp_path / "report.html"
    done = capfilt("report", hostile.path, "-o", output, "--pairs", 1000)
    assert done.code == 0, done.err
    source = output.read_text(encoding="utf-8")
    page = Page(source)
    assert {tag for tag, _ in page.tags} <= set(ALLOWED)
    for tag, attributes in page.tags:
        assert set(attributes) <= ALLOWED[tag], (tag, attributes)
        if tag == "img":
            assert re.fullmatch(r"data:image/jpeg;base64,[A-Za-z0-9+/=]+", attributes["src"] or "")
    metas = [attributes for tag, attributes in page.tags if tag == "meta" and "http-equiv" in attributes]
    assert metas == [{"http-equiv": "Content-Security-Policy", "content": policy_of(source)}]
    first = [tag for tag, _ in page.tags].index
    assert first("meta") < first("style") < first("body"), "the policy is for what comes after it"
    assert [tag for tag, _ in page.tags].count("script") == source.count("<script") == source.count("</script") == 1
    assert page.others == []
    assert not UNSAFE.search(source.replace("\n", ""))
    shown = [payload for payload in PAYLOADS if payload.isprintable()]
    assert [payload for payload in shown if payload not in page.text] == []
    figure(16, f"{len(PAYLOADS)} payloads and {len(TRICKS)} tricks of terminals in texts, addresses, keys and the "
               f"run's name: {len(page.tags)} elements, no handler, link or address, no script but ours")  # fmt: skip


def policy_of(source: str) -> str:
    """The policy that lets nothing be loaded, and nothing run but the one script, by the digests of what is there."""
    own = {name: (ROOT / "capfilt" / "report" / file).read_text() for name, file in SHIPPED.items()}
    for name, text in own.items():
        assert f"<{name}>{text}</{name}>" in source, "what is shipped, and nothing from the run"
    digests = {name: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for name, text in own.items()}
    return (
        f"default-src 'none'; img-src data:; style-src 'sha256-{digests['style']}'; "
        f"script-src 'sha256-{digests['script']}'; base-uri 'none'; form-action 'none'"
    )


def test_cells_are_plain_and_reversible(figure: Figure) -> None:
    rng, texts = random.Random(17), list(FORMULAS)
    texts += ["".join(rng.choice("=+-@'\\\0\t\r\n＝a1 ") for _ in range(rng.randrange(6))) for _ in range(5000)]
    texts += [fuzzed(rng) for _ in range(5000 if FULL else 500)]
    for text in texts:
        cell = to_cell(text)
        assert from_cell(cell) == text
        assert not cell.startswith(FORMULA_SIGNS)
        assert "\0" not in cell
    assert len({to_cell(text) for text in texts}) == len(set(texts))
    figure(17, f"{len(texts):,} texts: no cell a formula, every one read back as it was")


def test_csv_files_in_their_readers(tmp_path: Path, figure: Figure) -> None:
    texts = [text.encode("utf-8", "replace").decode() for text in [*FORMULAS, *TRICKS.values()]]
    run = run_with_texts(tmp_path / "run", texts)
    expected = read_manifest([run]).to_pylist()
    output = tmp_path / "pairs.csv"
    done = capfilt("export", run.path, "-o", output, "--dropped")
    assert done.code == 0, done.err
    with open(output, encoding="utf-8", newline="") as file:
        by_csv = list(csv.DictReader(file))
    columns = [field.name for field in SCHEMAS["manifest"] if field.type == pa.string()]
    assert {"key", "url", "source", "text"} < set(columns)
    frame = pandas.read_csv(output, keep_default_na=False, lineterminator="\n", dtype=dict.fromkeys(columns, str))
    assert len(by_csv) == len(frame) == len(expected)
    for own, plain, row in zip(frame.to_dict("records"), by_csv, expected, strict=True):
        for name in columns:
            assert from_cell(own[name]) == from_cell(plain[name]) == (row[name] or "")
            assert not plain[name].startswith(FORMULA_SIGNS)
        assert float(own["itm_score"]) == pytest.approx(row["itm_score"], abs=0, rel=1e-7)
        assert (own["caption_index"], bool(own["kept"])) == (row["caption_index"], row["kept"])
        assert (
            plain["clip_score"] == ""
            if row["clip_score"] is None
            else pa.scalar(float(plain["clip_score"]), pa.float32()) == pa.scalar(row["clip_score"], pa.float32())
        )
    figure(17, f"{len(FORMULAS)} formulas and {len(TRICKS)} tricks through CSV in {len(columns)} columns: the same by "
               "Python's csv and pandas, numbers intact")  # fmt: skip
