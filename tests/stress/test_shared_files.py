"""Rows 16 and 17: what is written for browsers and spreadsheets does nothing there, whatever the texts hold."""

from __future__ import annotations

import csv
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

ALLOWED = {
    "html": {"lang"}, "head": set(), "meta": {"charset", "http-equiv", "content", "name"}, "title": set(),
    "style": set(), "body": set(), "h1": set(), "h2": set(), "pre": set(), "ul": set(), "li": set(), "p": set(),
    "bdi": set(), "small": set(), "img": {"src", "alt"},
}  # fmt: skip
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
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
    assert metas == [{"http-equiv": "Content-Security-Policy", "content": POLICY}]
    first = [tag for tag, _ in page.tags].index
    assert first("meta") < first("style") < first("body"), "the policy is for what comes after it"
    assert page.others == []
    assert not UNSAFE.search(source.replace("\n", ""))
    shown = [payload for payload in PAYLOADS if payload.isprintable()]
    assert [payload for payload in shown if payload not in page.text] == []
    figure(16, f"{len(PAYLOADS)} payloads and {len(TRICKS)} tricks of terminals in texts, addresses, keys and the "
               f"run's name: {len(page.tags)} elements, no script, handler, link or address among them")  # fmt: skip


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
