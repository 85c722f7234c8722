"""The page of a report: which images it shows, whose numbers it has, and that a file of one's own stays."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path

import pytest
from PIL import Image

from capfilt.data.commit import read_commit_record
from capfilt.data.manifest import read_manifest
from capfilt.data.rundir import RunDir
from capfilt.report.page import write_report
from capfilt.report.stats import compute_stats
from tests.cli.conftest import capfilt
from tests.hostile_texts import run_with_texts
from tests.report.pages import Page
from tests.report.test_stats import write_rest, write_shards
from tests.train.small_models import save_run


def test_the_images_nearest_the_threshold_come_first(tmp_path: Path) -> None:
    run = run_with_texts(tmp_path / "run", ["a dog", "two cats", "a tree", "a house"])
    assert capfilt("report", run.path, "-o", tmp_path / "a.html", "--pairs", 2).code == 0
    page = Page((tmp_path / "a.html").read_text(encoding="utf-8"))
    threshold = float(read_commit_record(run.stage_file("manifest", "00000")).fields["threshold"])
    cards = [attributes for tag, attributes in page.tags if (tag, attributes.get("class")) == ("li", "card")]
    distances = [float(str(attributes["data-distance"])) for attributes in cards]
    assert distances == sorted(distances)
    scores = [row["itm_score"] for row in read_manifest([run]).to_pylist() if row["itm_score"] is not None]
    assert distances[0] == pytest.approx(min(abs(score - threshold) for score in scores), abs=1e-6)
    assert capfilt("report", run.path, "-o", tmp_path / "a.html").code == 2
    assert capfilt("report", run.path, "-o", tmp_path / "a.html", "--overwrite").code == 0
    picture = next(attributes["src"] for tag, attributes in page.tags if tag == "img")
    assert Image.open(io.BytesIO(base64.b64decode((picture or "").partition(",")[2]))).format == "JPEG"


def test_an_image_is_shown_with_all_its_pairs(tmp_path: Path) -> None:
    run = save_run(tmp_path / "run", [9, 8], drop_every=3)
    summary = write_report(run, tmp_path / "a.html", num_pairs=100)
    rows = read_manifest([run]).to_pylist()
    assert (summary.num_pairs, summary.num_images) == (len(rows), 17)
    page = Page((tmp_path / "a.html").read_text(encoding="utf-8"))
    verdicts = [str(attributes["data-verdict"]) for tag, attributes in page.tags if "data-verdict" in attributes]
    assert sorted(verdicts) == sorted(row["drop_reason"] or "kept" for row in rows)
    few = write_report(run, tmp_path / "b.html", num_pairs=2)
    assert few.num_images < 9


def test_every_reason_has_its_images(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path / "run")
    write_shards(run)
    write_rest(run)
    write_report(run, tmp_path / "a.html", num_pairs=1)
    page = Page((tmp_path / "a.html").read_text(encoding="utf-8"))
    options = [attributes["value"] for tag, attributes in page.tags if tag == "option"]
    assert {"kept", "dropped", "duplicate", "low_clip", "low_itm", "web", "synthetic"} <= set(options)


def test_the_figures_are_those_of_stats(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path / "run")
    write_shards(run)
    write_rest(run)
    write_report(run, tmp_path / "a.html")
    text, stats = Page((tmp_path / "a.html").read_text(encoding="utf-8")).text, compute_stats(run)
    assert f"{stats.download.num_images:,} of {stats.download.num_rows:,} rows" in text
    assert "2 of 8" in text
    for reason in stats.download.by_reason:
        assert reason in text
    assert "timeout266.7%" in text.replace(" ", "").replace("\n", ""), "two of three"
    assert re.search(r"0\.50\s*0\.0%\s*50\.0%", text.replace("\n", " ")), "the curve's table: half is kept at 0.5"
    for version in read_commit_record(run.stage_file("manifest", "00000")).versions.values():
        assert version in text


def test_maps_are_drawn_where_they_are_asked_for(tmp_path: Path) -> None:
    run = save_run(tmp_path / "run", [6])
    asked: list[str] = []

    def explain(picture: Image.Image, text: str) -> tuple[str, Image.Image]:
        asked.append(text)
        return f"said of {text}", Image.new("RGB", picture.size, (255, 0, 0))

    write_report(run, tmp_path / "a.html", explain=explain, num_explained=2)
    assert len(asked) == 2
    page = Page((tmp_path / "a.html").read_text(encoding="utf-8"))
    maps = [attributes for tag, attributes in page.tags if tag == "img" and "looks" in str(attributes["alt"])]
    assert len(maps) == 2
    picture = Image.open(io.BytesIO(base64.b64decode(str(maps[0]["src"]).partition(",")[2])))
    assert picture.getpixel((3, 3)) == pytest.approx((254, 0, 0), abs=3)
    assert f"said of {asked[0]}" in page.text


def test_the_command_explains_by_a_model(tmp_path: Path) -> None:
    run = save_run(tmp_path / "run", [4])
    output = tmp_path / "a.html"
    done = capfilt("report", run.path, "-o", output, "--explain", "embedded", "--explained", 1, "--json")
    assert done.json()["num_images"] == 4
    assert output.read_text(encoding="utf-8").count("where a model looks: match probability") == 1
