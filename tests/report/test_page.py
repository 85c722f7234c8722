"""The page of a report: which pairs it shows, and that a file of one's own is not overwritten unasked."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path

from PIL import Image

from capfilt.data.commit import read_commit_record
from capfilt.data.manifest import read_manifest
from tests.cli.conftest import capfilt
from tests.hostile_texts import run_with_texts
from tests.report.pages import Page


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
