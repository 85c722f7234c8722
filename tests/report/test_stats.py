"""Statistics of a run that the commit protocol wrote, against counts made by hand."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from capfilt.cli.console import to_plain
from capfilt.data.commit import commit_stage, file_sha256, input_digest, read_table
from capfilt.data.reasons import Quarantined
from capfilt.data.rundir import RunDir
from capfilt.data.schemas import SCHEMAS
from capfilt.data.tars import write_tar
from capfilt.errors import UsageError
from capfilt.report.charts import histogram
from capfilt.report.histogram import Histogram, spread_of
from capfilt.report.stats import compute_stats
from capfilt.report.stats_view import stats_lines
from tests.train.small_models import save_run

CAPTIONS = {
    "a": ["a red star", "a red star", "two stars", "a star"],
    "b": ["a \x1b[31mblue\u202e moon", "the moon", "a moon", "moon"],
}


def picture(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (width % 255, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def write_shards(run: RunDir) -> None:
    images = {"a": (40, 50), "b": (200, 100)}
    with run.new_staging() as staging:
        tar = staging / "x.tar"
        data = {key: picture(*size) for key, size in images.items()}
        members = [
            member
            for key, content in data.items()
            for member in ((f"{key}.png", content), (f"{key}.txt", b"web"), (f"{key}.json", b"{}"))
        ]
        index = write_tar(tar, members)[::3]
        rows = []
        for (key, (width, height)), member in zip(images.items(), index, strict=True):
            copy = staging / key
            copy.write_bytes(data[key])
            rows.append(
                dict(
                    key=key,
                    url=f"http://x/{key}",
                    caption="web",
                    status="success",
                    width=width,
                    height=height,
                )
                | dict(original_width=width, original_height=height, sha256=file_sha256(copy))
                | dict(image_offset=member.offset, image_length=member.length, image_ext="png")
            )
        failed = {"c": "timeout", "d": "timeout", "e": "not_found"}
        rows += [
            dict(key=key, url="http://y/", status="failed_to_download", reason=reason) for key, reason in failed.items()
        ]
        commit_stage(
            run, "shards", "00000", pa.Table.from_pylist(rows, schema=SCHEMAS["shards"]),
            fields={}, input_digest="", rows_in=5, tar=tar,
            quarantine=[Quarantined(key=key, reason=reason) for key, reason in failed.items()],
        )  # fmt: skip


def write_rest(run: RunDir) -> None:
    captions = [dict(key=k, caption_index=i, text=t) for k, texts in CAPTIONS.items() for i, t in enumerate(texts)]
    tables = {"captions": captions, "clip": [], "itm": [], "manifest": []}
    scores = {
        -1: (None, None, 0.2),
        0: (0.9, 1, 0.95),
        1: (0.9, None, None),
        2: (0.5, 2, 0.4),
        3: (0.1, 3, None),
    }
    reasons = {-1: "low_itm", 0: None, 1: "duplicate", 2: "low_itm", 3: "low_clip"}
    for key, texts in CAPTIONS.items():
        for i, text in enumerate(["Web: a shop's picture", *texts], start=-1):
            clip, rank, itm = scores[i]
            source = "web" if i < 0 else "synthetic"
            tables["clip"].append(dict(key=key, caption_index=i, source=source, text=text, clip_score=clip, rank=rank))
            if itm is not None:
                tables["itm"].append(dict(key=key, caption_index=i, itm_score=itm))
            tables["manifest"].append(
                dict(
                    shard="00000",
                    key=key,
                    caption_index=i,
                    source=source,
                    text=text,
                    clip_score=clip,
                    rank=rank,
                )
                | dict(itm_score=itm, kept=reasons[i] is None, drop_reason=reasons[i])
            )
    for stage, rows in tables.items():
        table = pa.Table.from_pylist(rows, schema=SCHEMAS[stage])
        digest = input_digest(run, stage, "00000")
        commit_stage(run, stage, "00000", table, fields={}, input_digest=digest, rows_in=2)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    run = RunDir.create(tmp_path_factory.mktemp("stats") / "run")
    write_shards(run)
    write_rest(run)
    return run


def test_download(run: RunDir) -> None:
    found = compute_stats(run).download
    assert (found.num_rows, found.num_images) == (5, 2)
    assert found.by_reason == {"timeout": 2, "not_found": 1}
    assert found.by_status == {"failed_to_download": 3, "success": 2}
    assert found.width_px is not None
    assert (found.width_px.least, found.width_px.median, found.width_px.most) == (40, 120, 200)
    assert {name: n for name, n in found.shorter_edge_px.items() if n} == {"32-63": 1, "64-127": 1}


def test_pairs(run: RunDir) -> None:
    stats = compute_stats(run)
    web, synthetic = stats.pairs["web"], stats.pairs["synthetic"]
    assert (web.num_pairs, web.num_kept, web.by_drop_reason) == (2, 0, {"low_itm": 2})
    assert (synthetic.num_pairs, synthetic.num_kept) == (8, 2)
    assert synthetic.by_drop_reason == {"duplicate": 2, "low_clip": 2, "low_itm": 2}
    assert stats.num_images_kept == 2
    assert web.words is not None
    assert web.words.mean == 4  # web, a, shop's, picture
    assert synthetic.top_words["a"] == 2
    assert synthetic.top_words["star"] == 1
    assert sum(synthetic.itm_score.counts) == 4
    assert sum(web.clip_score.counts) == 0


def test_kept_rate_against_threshold_counts_what_only_the_threshold_drops(run: RunDir) -> None:
    curve = compute_stats(run).pairs["synthetic"].kept_by_threshold
    assert (curve["0.0"], curve["0.4"], curve["0.5"], curve["0.99"]) == (1.0, 1.0, 0.5, 0.0)


def test_diversity(run: RunDir) -> None:
    found = compute_stats(run).diversity
    assert found is not None
    assert found.captions_per_image == 4
    assert found.distinct_per_image is not None
    assert found.distinct_per_image.median == 3.5
    assert found.distinct_share == 7 / 8


def test_view_is_safe_narrow_and_complete(run: RunDir) -> None:
    text = "\n".join(stats_lines(compute_stats(run)))
    for heading in ("Download", "Pairs", "Captions", "CLIP score", "ITM score", "Kept rate", "Top words"):
        assert heading in text
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert "The server answered 404." in text
    assert max(map(len, text.splitlines())) <= 110
    assert all(line.isascii() for line in stats_lines(compute_stats(run), plain=True))


def test_json_round_trip(run: RunDir) -> None:
    document = json.loads(json.dumps(to_plain(compute_stats(run)), allow_nan=False))
    assert document["pairs"]["synthetic"]["num_kept"] == 2
    assert document["shards_by_stage"]["manifest"] == 1


def test_a_run_under_way_has_the_figures_of_its_stages(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path / "run")
    with pytest.raises(UsageError, match="capfilt download"):
        compute_stats(run)
    write_shards(run)
    stats = compute_stats(run)
    assert stats.pairs == {}
    assert stats.diversity is None
    assert "(not begun)" in "\n".join(stats_lines(stats))


def test_kept_images_are_a_share_of_those_that_have_a_manifest(tmp_path: Path) -> None:
    run = save_run(tmp_path / "run", [6, 4], drop_every=3)
    run.stage_file("manifest", "00001").unlink()
    stats = compute_stats(run)
    kept = {row["key"] for row in read_table(run.stage_file("manifest", "00000")).to_pylist() if row["kept"]}
    assert (stats.num_images_kept, stats.num_images_judged, stats.download.num_images) == (len(kept), 6, 10)
    assert f"{len(kept)} of 6 images ({len(kept) / 6:.1%}) have" in "\n".join(stats_lines(stats))


def test_long_captions_are_counted_together(run: RunDir) -> None:
    stats = compute_stats(run)
    stats.pairs["web"].words_histogram = {3: 2, 80: 7, 61: 1}
    assert stats.pairs["web"].lengths(60) == [0, 0, 0, 2, *[0] * 56, 8]
    drawn = "".join(histogram("Words", range(62), {"web": stats.pairs["web"].lengths(60)}, is_open=True))
    assert re.findall(r"(\d[^<]*)</th><td[^>]*>([\d.]+%)", drawn)[0] == ("3 to 4", "20.0%")
    assert re.findall(r"(\d[^<]*)</th><td[^>]*>([\d.]+%)", drawn)[-1][1] == "80.0%"
    assert "60 and more" in "".join(histogram("Words", range(62), {"web": [0] * 60 + [8]}, is_open=True))


def test_spread_and_histogram() -> None:
    assert spread_of({}) is None
    spread = spread_of({1: 1, 2: 1, 10: 1, 11: 1})
    assert spread is not None
    assert (spread.num, spread.median, spread.mean) == (4, 6.0, 6.0)
    histogram = Histogram.even(0, 1, 2)
    histogram.add(np.array([-3.0, 0.5, 1.0, 9.0, np.nan]))
    assert histogram.counts == [1, 3]
