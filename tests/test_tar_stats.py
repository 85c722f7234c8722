"""Statistics of a folder of tars, beside those of a run that imported them."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from capfilt.curation.import_shards import import_shards
from capfilt.data.rundir import RunDir
from capfilt.errors import UsageError
from capfilt.report.stats import compute_stats
from capfilt.tar_stats import compute_tar_stats
from capfilt.world.site import SiteSettings, WorldSite
from tests import factories
from tests.cli.conftest import capfilt
from tests.curation.test_import_shards import write_foreign


def picture(seed: int, width: int, height: int, kind: str) -> bytes:
    buffer = io.BytesIO()
    factories.draw_picture(seed, width_px=width, height_px=height).save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two tars: pictures of two formats, captions in texts and in JSON, four broken samples, a cut end."""
    tars = tmp_path / "tars"
    tars.mkdir()
    (tars / "folder.tar").mkdir()
    write_foreign(
        tars / "00000.tar",
        [
            ("1.jpg", picture(1, 40, 30, "JPEG")), ("1.txt", b"A red dog, on grass"),
            ("2.png", picture(2, 300, 90, "PNG")), ("2.json", b'{"caption": "two cats", "url": "http://a.example/x"}'),
            ("3.txt", b"no picture"), ("4.jpg", b"no picture either"), ("4.txt", b"x"),
            ("5.jpg", picture(5, 40, 30, "JPEG")), ("5.txt", b"\xff\xfe"),
        ],
    )  # fmt: skip
    write_foreign(tars / "00001.tar", [("6.webp", picture(6, 64, 64, "WEBP")), ("6.txt", b"a tree")])
    whole = (tars / "00001.tar").read_bytes()
    write_foreign(tars / "00001.tar", [("6.webp", picture(6, 64, 64, "WEBP")), ("6.txt", b"a tree"), ("7.txt", b"z")])
    cut = (tars / "00001.tar").read_bytes()[: len(whole) - 1024 + 300]
    (tars / "00001.tar").write_bytes(cut)
    return tars


def test_the_figures_are_those_of_an_import(folder: Path, tmp_path: Path) -> None:
    run = RunDir.create(tmp_path / "run")
    import_shards([str(path) for path in sorted(folder.glob("*.tar")) if path.is_file()], run)
    expected, found = compute_stats(run).download, compute_tar_stats(folder).download
    assert found.num_images == expected.num_images == 3
    assert found.by_reason == expected.by_reason
    assert found.by_format == expected.by_format == {"jpg": 1, "png": 1, "webp": 1}
    for name in ("width_px", "height_px", "shorter_edge_px", "aspect", "num_rows", "num_hosts"):
        assert getattr(found, name) == getattr(expected, name)


def test_shards_and_captions(folder: Path) -> None:
    found = compute_tar_stats(folder)
    assert found.shards_by_stage == {"shards": 2}
    assert found.shards.images is not None
    assert (found.shards.images.least, found.shards.images.most) == (1, 2)
    assert found.pairs["web"].words_histogram == {2: 2, 5: 1}
    assert found.pairs["web"].top_words["a"] == 2
    assert not found.has_manifest


def test_the_command(folder: Path, tmp_path: Path) -> None:
    shown = capfilt("stats", folder)
    assert "3 of 7 samples" in shown.out or "3 of 7 rows" in shown.out
    assert "kept" not in shown.out
    assert "capfilt import" in shown.err
    assert capfilt("stats", folder, "--json").json()["download"]["num_images"] == 3
    assert "Captions" in capfilt("stats", folder, "--section", "all").out
    with pytest.raises(UsageError, match="no tars"):
        compute_tar_stats(tmp_path)
    assert capfilt("stats", tmp_path / "none").code == 2


IMG2DATASET = """
import sys
import img2dataset

if __name__ == "__main__":
    img2dataset.download(
        url_list=sys.argv[1], input_format="parquet", url_col="url", caption_col="text", output_folder=sys.argv[2],
        output_format="webdataset", processes_count=1, thread_count=4, image_size=32, number_sample_per_shard=6,
    )
"""


def test_what_img2dataset_could_not_download(tmp_path: Path) -> None:
    with WorldSite(SiteSettings(num_urls=200)) as site:
        plain = [row.url for row in site.rows() if row.behaviour == "plain"][:5]
        bad = [
            next(row.url for row in site.rows() if row.behaviour == behaviour) for behaviour in ("not_found", "html")
        ]
        urls = [*plain, *bad, "http://127.0.0.1:1/x.jpg", "http://nowhere.invalid/x.jpg"]
        pq.write_table(pa.table({"url": urls, "text": ["a dog"] * len(urls)}), tmp_path / "urls.parquet")
        command = [sys.executable, "-c", IMG2DATASET, tmp_path / "urls.parquet", tmp_path / "tars"]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
    found = compute_tar_stats(tmp_path / "tars").download
    assert (found.num_images, found.num_rows) == (5, 9)
    assert found.by_reason == {"bad_image": 1, "connection_error": 1, "dns_error": 1, "not_found": 1}
    here, nowhere = found.worst_hosts
    assert (here.host, here.num_rows, sum(here.by_reason.values())) == ("127.0.0.1", 8, 3)
    assert (nowhere.host, nowhere.by_reason) == ("nowhere.invalid", {"dns_error": 1})
