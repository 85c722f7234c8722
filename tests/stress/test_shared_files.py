"""Rows 16 and 17: what is written for browsers and spreadsheets does nothing there, whatever the texts hold."""

from __future__ import annotations

import base64
import csv
import io
import json
import random
import re
from html.parser import HTMLParser
from pathlib import Path

import pandas
import pyarrow as pa
import pytest
from PIL import Image

from capfilt.data.commit import read_commit_record
from capfilt.data.manifest import read_manifest
from capfilt.data.rundir import RunDir
from capfilt.data.schemas import SCHEMAS
from capfilt.data.sealed import read_sealed, sealed_bytes
from capfilt.data.spreadsheets import from_cell, to_cell
from tests.cli.conftest import capfilt
from tests.stress.conftest import FULL, Figure
from tests.stress.lives import COMMITS
from tests.stress.test_shown_text import TRICKS, UNSAFE, fuzzed

PAYLOADS = [
    "<script>alert(1)</script>", "</title><script>alert(1)</script>", "</pre><img src=x onerror=alert(1)>",
    '"><svg onload=alert(1)>', "' onmouseover='alert(1)", '" onfocus=alert(1) autofocus="', "<img src=//evil/x.png>",
    "<iframe src=javascript:alert(1)>", "<a href=javascript:alert(1)>x</a>", "javascript:alert(1)",
    "<link rel=stylesheet href=//evil/x.css>", "<style>@import '//evil/x.css'</style>", "<base href=//evil/>",
    "<meta http-equiv=refresh content='0;url=//evil/'>", "<form action=//evil/><button>x</button></form>",
    "<object data=//evil/x.swf>", "<embed src=//evil/x>", "<video src=//evil/x onerror=alert(1)>",
    "<math><mi xlink:href='javascript:alert(1)'>", "<svg><script>alert(1)</script></svg>",
    "<svg><animate onbegin=alert(1)>", "<!--><script>alert(1)</script>", "<![CDATA[<script>alert(1)</script>]]>",
    "<noscript><p title='</noscript><img src=x>'>", "&lt;script&gt;alert(1)&lt;/script&gt;", "&#60;script&#62;alert(1)",
    "<scr\0ipt>alert(1)</scr\0ipt>", "\u003cscript\u003ealert(1)", "＜script＞alert(1)＜/script＞",
    "<ScRiPt\n>alert(1)</sCrIpT>", "<x contenteditable onblur=alert(1)>", "<details open ontoggle=alert(1)>",
    "<body onload=alert(1)>", "<input onfocus=alert(1) autofocus>", "<marquee onstart=alert(1)>",
    "<template><script>alert(1)</script></template>", "<table background=//evil/x.png>",
    "<div style=background:url(//evil/x)>", "<img srcset='//evil/x 1x'>", "<picture><source srcset=//evil/x></picture>",
    "<audio src=//evil/x>", "<portal src=//evil/>", "data:text/html,<script>alert(1)</script>",
    "]]><script>alert(1)</script>", "{{constructor.constructor('alert(1)')()}}", "${alert(1)}", "<%= alert(1) %>",
    "\u2028<script>alert(1)</script>", "\u202e<script>", "</li></ul></body></html><script>x</script>", "<plaintext>",
    "<textarea><script>alert(1)</script>", "`onerror=alert(1)`", "<img/src/onerror=alert(1)>",
]  # fmt: skip
ALLOWED = {
    "html": {"lang"}, "head": set(), "meta": {"charset", "http-equiv", "content", "name"}, "title": set(),
    "style": set(), "body": set(), "h1": set(), "h2": set(), "pre": set(), "ul": set(), "li": set(), "p": set(),
    "bdi": set(), "small": set(), "img": {"src", "alt"},
}  # fmt: skip
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
FORMULA_SIGNS = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")
"""What spreadsheets take a cell for a formula by; not read from the code under test."""


class Page(HTMLParser):
    """What a browser would find: every tag with its attributes, and the text."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.others: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def handle_comment(self, data: str) -> None:
        self.others.append(data)

    def handle_pi(self, data: str) -> None:
        self.others.append(data)

    def unknown_decl(self, data: str) -> None:
        self.others.append(data)


def run_with_texts(path: Path, texts: list[str]) -> RunDir:
    """A run of one shard whose captions and addresses are these texts, in turn; every second time the keys too.

    A pair with such a key has no picture.
    """
    run = RunDir.create(path)
    for stage, commit in COMMITS.items():
        commit(run, **({"num_samples": len(texts)} if stage == "shards" else {}))
    table, record, _ = read_sealed(run.stage_file("manifest", "00000"))
    rows = table.to_pylist()
    for number, row in enumerate(rows):
        row["text"] = row["url"] = texts[number % len(texts)].encode("utf-8", "replace").decode()
        if number // len(texts) % 2:
            row["key"] = row["text"]
        row["itm_score"] = (row["itm_score"] if row["itm_score"] is not None else 0.5) or 0.5
    run.stage_file("manifest", "00000").write_bytes(
        sealed_bytes(pa.Table.from_pylist(rows, schema=table.schema), record)
    )
    return run


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


def test_a_page_shows_what_is_nearest_to_the_threshold(tmp_path: Path) -> None:
    run = run_with_texts(tmp_path / "run", ["a dog", "two cats", "a tree", "a house"])
    assert capfilt("report", run.path, "-o", tmp_path / "a.html", "--pairs", 2).code == 0
    page = Page((tmp_path / "a.html").read_text(encoding="utf-8"))
    manifest = read_manifest([run]).to_pylist()
    threshold = float(read_commit_record(run.stage_file("manifest", "00000")).fields["threshold"])
    for kept, heading in ((True, "Pairs kept"), (False, "Pairs dropped")):
        rows = [row for row in manifest if row["kept"] is kept and row["itm_score"] is not None]
        if rows:
            assert heading in page.text
    scores = [float(text) for text in re.findall(r"ITM (\d\.\d{3})", page.text)]
    nearest = sorted(
        abs(row["itm_score"] - threshold) for row in manifest if row["itm_score"] is not None and row["kept"]
    )
    assert scores
    assert abs(abs(scores[0] - threshold) - nearest[0]) < 0.002
    assert capfilt("report", run.path, "-o", tmp_path / "a.html").code == 2
    assert capfilt("report", run.path, "-o", tmp_path / "a.html", "--overwrite").code == 0
    picture = next(attributes["src"] for tag, attributes in page.tags if tag == "img")
    assert Image.open(io.BytesIO(base64.b64decode((picture or "").partition(",")[2]))).format == "JPEG"


FORMULAS = [
    "=1+1", "=cmd|'/c calc'!A0", "+1", "-1+2", "@SUM(A1)", "\t=1", "\r=1", "\n=1", "＝1+1", "＋1", "－1", "＠SUM(A1)",
    "'=1", "''", "\\0", "'\\", "a\0b", "=\0\\", "\0", "'\\\0", "a,b;c\td", '"=1"', '";=1', "a\n=1", " =1", "",
]  # fmt: skip


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


def test_json_lines_are_the_manifest(tmp_path: Path) -> None:
    run = run_with_texts(tmp_path / "run", [*FORMULAS, "ünïcode 🙂"])
    assert capfilt("export", run.path, "-o", tmp_path / "all.jsonl", "--dropped").code == 0
    assert capfilt("export", run.path, "-o", tmp_path / "kept.jsonl").code == 0
    found = [json.loads(line) for line in (tmp_path / "all.jsonl").read_text(encoding="utf-8").split("\n")[:-1]]
    expected = read_manifest([run]).to_pylist()
    assert [row | {"clip_score": None, "itm_score": None} for row in found] == [
        row | {"clip_score": None, "itm_score": None} for row in expected
    ]
    assert pa.array([row["itm_score"] for row in found], pa.float32()) == pa.array(
        [row["itm_score"] for row in expected], pa.float32()
    )
    kept = (tmp_path / "kept.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    assert [json.loads(line)["key"] for line in kept] == [row["key"] for row in expected if row["kept"]]


def test_what_cannot_be_written_is_said(tmp_path: Path) -> None:
    run = run_with_texts(tmp_path / "run", ["a dog", "two cats"])
    done = capfilt("export", run.path, "-o", tmp_path / "pairs.xlsx")
    assert (done.code, "expected one of .csv, .jsonl" in done.err) == (2, True)
    (tmp_path / "pairs.csv").write_text("mine")
    done = capfilt("export", run.path, "-o", tmp_path / "pairs.csv")
    assert (done.code, "give --overwrite" in done.err) == (2, True)
    assert (tmp_path / "pairs.csv").read_text() == "mine"
    done = capfilt("export", run.path, "-o", tmp_path / "nowhere" / "pairs.csv")
    assert (done.code, "There is no directory" in done.err) == (2, True)
    empty = RunDir.create(tmp_path / "empty")
    assert capfilt("export", empty.path, "-o", tmp_path / "e.csv").code == 2
    assert not (tmp_path / "e.csv").exists()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
