"""Real photographs with real alt-text from a site on loopback to the manifest, through the public commands.

By default 48 photographs go through the embedded models; CAPFILT_NUM_PHOTOGRAPHS=1000 takes all of them.
CAPFILT_FULL_SIZE=1 sends 32 through random models of the released sizes (3.5 GB of files, minutes on a CPU).
`pytest -rP` shows the figures.
"""

from __future__ import annotations

import io
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from capfilt.data.commit import read_table
from capfilt.data.manifest import WEB_CAPTION_INDEX, read_manifest
from capfilt.data.reasons import DROP_REASONS
from capfilt.data.rundir import RunDir
from capfilt.data.shards import read_samples
from tests import full_size
from tests.cli.conftest import capfilt
from tests.photographs import PhotographSite, Row, needs_photographs, read_photographs

NUM_PHOTOGRAPHS = int(os.environ.get("CAPFILT_NUM_PHOTOGRAPHS", "48"))
NUM_FULL_SIZE = 32
NUM_CAPTIONS, KEEP = 10, 2

pytestmark = [needs_photographs, pytest.mark.network]


@dataclass(frozen=True)
class Curated:
    """A run that went through every command, with what the site knows of each of its rows."""

    run: Path
    truth: list[Row]
    download: dict[str, Any]
    stats: dict[str, Any]
    manifest: list[dict[str, Any]]

    def shard_rows(self) -> list[dict[str, Any]]:
        run = RunDir.open(self.run)
        return [row for name in run.shard_names() for row in read_table(run.stage_file("shards", name)).to_pylist()]


def curate(folder: Path, num_photographs: int, **options: tuple[object, ...]) -> Curated:
    """URL table → download → caption → rank → filter → stats → verify; `options` by command."""
    run, table = folder / "run", folder / "urls.parquet"
    said: dict[str, Any] = {}
    with PhotographSite(read_photographs(num_photographs)) as site:
        site.write_table(table)
        truth = list(site.rows())
        fetch = ("download", table, run, "--num-shards", 4, "--allow-private-addresses")
        said["download"] = succeed(*fetch)
        assert "Nothing to download" in capfilt(*fetch).out
    for command in ("caption", "rank", "filter"):
        said[command] = succeed(command, run, *options[command])
    verified = succeed("verify", run, "--deep")
    assert (verified["findings"], verified["unfinished"]) == ([], [])
    stats = succeed("stats", run)
    for command, summary in said.items():
        sys.stdout.write(f"{command}: {summary}\n")
    sys.stdout.write(f"pairs: { {source: _counts(pairs) for source, pairs in stats['pairs'].items()} }\n")
    sys.stdout.write(f"images with a kept pair: {stats['num_images_kept']}; verify --deep: {verified}\n")
    return Curated(run, truth, said["download"], stats, read_manifest([run]).to_pylist())


def succeed(*arguments: object) -> Any:
    """The JSON result of a command that must end with 0."""
    done = capfilt(*arguments, "--json")
    assert done.code == 0, (arguments, done)
    return done.json()


def _counts(pairs: dict[str, Any]) -> dict[str, Any]:
    return {name: pairs[name] for name in ("num_pairs", "num_kept", "by_drop_reason", "words")}


def check_every_url(curated: Curated) -> None:
    """Each row of the table is a row of the shards, with its photograph or the reason why there is none."""
    rows, truth = curated.shard_rows(), curated.truth
    assert [(row["url"], row["caption"]) for row in rows] == [(row.url, row.web_caption) for row in truth]
    assert [row["reason"] for row in rows] == [row.reason for row in truth]
    assert [row["status"] == "success" for row in rows] == [row.reason is None for row in truth]
    failures = Counter(row.reason for row in truth if row.reason is not None)
    assert curated.download["failures"] == failures
    assert curated.download["num_succeeded"] + failures.total() == curated.download["num_rows"] == len(truth)
    assert curated.stats["download"]["num_rows"] == len(truth)
    assert curated.stats["download"]["by_reason"] == failures
    for row, expected in zip(rows, truth, strict=True):
        if expected.reason is None:
            assert (row["width"], row["height"]) == (224, 224)
        if expected.behaviour == "plain":  # a photograph that needs no change keeps its bytes
            assert row["sha256"] == sha256(expected.photograph.jpeg).hexdigest()


def check_odd_pictures(curated: Curated) -> None:
    """Photographs that came turned, in CMYK, with 16 bits or by a detour look as they lie in the tar."""
    run = RunDir.open(curated.run)
    truth = {row.url: row for row in curated.truth if row.behaviour != "plain"}
    seen = set()
    for name in run.shard_names():
        for sample in read_samples(run, name):
            if (row := truth.get(sample.url)) is not None:
                found, original = (
                    np.asarray(Image.open(io.BytesIO(data)).convert("RGB").resize((12, 12), Image.Resampling.BOX), int)
                    for data in (sample.image, row.photograph.jpeg)
                )
                assert np.abs(found - original).mean() < 5, row.behaviour
                seen.add(row.behaviour)
    assert len(seen) > 3


def check_every_photograph(curated: Curated, num_captions: int) -> None:
    """Each photograph has its web row and its synthetic rows, every score in range and every drop with a reason."""
    assert set(curated.stats["quarantine"]) <= {"shards"}
    found = {row["url"]: row for row in curated.shard_rows() if row["status"] == "success"}
    captions = {row.url: row.web_caption for row in curated.truth}
    by_url: dict[str, list[dict[str, Any]]] = {url: [] for url in found}
    for pair in curated.manifest:
        by_url[pair["url"]].append(pair)
    for url, pairs in by_url.items():
        assert [pair["caption_index"] for pair in pairs] == [WEB_CAPTION_INDEX, *range(num_captions)]
        assert [pair["source"] for pair in pairs] == ["web"] + ["synthetic"] * num_captions
        assert pairs[0]["text"] == captions[url]
        assert {(pair["key"], pair["sha256"]) for pair in pairs} == {(found[url]["key"], found[url]["sha256"])}
        ranks = sorted(pair["rank"] for pair in pairs if pair["rank"] is not None)
        assert ranks == list(range(1, len(ranks) + 1))
    for pair in curated.manifest:
        clip_score, itm_score, drop_reason = pair["clip_score"], pair["itm_score"], pair["drop_reason"]
        assert pair["kept"] == (drop_reason is None)
        assert pair["kept"] or drop_reason in DROP_REASONS
        assert (clip_score is None) == (drop_reason == "empty") == (not pair["text"].strip())
        assert clip_score is None or -1 <= clip_score <= 1
        is_judged = clip_score is not None and (pair["source"] == "web" or (pair["rank"] or KEEP + 1) <= KEEP)
        assert (itm_score is not None) == is_judged
        assert itm_score is None or 0 <= itm_score <= 1


def check_models_see(curated: Curated) -> None:
    """Captions and scores follow the photograph: nothing here is the same for all."""
    synthetic = [pair for pair in curated.manifest if pair["source"] == "synthetic"]
    num_images = curated.download["num_succeeded"]
    assert len({pair["text"] for pair in synthetic}) > num_images
    for score in ("clip_score", "itm_score"):
        values = {pair[score] for pair in curated.manifest if pair[score] is not None}
        assert len(values) > num_images
        assert max(values) - min(values) > 0.01


@pytest.mark.timeout(600 + NUM_PHOTOGRAPHS)
def test_photographs_through_the_embedded_models(tmp_path: Path) -> None:
    curated = curate(
        tmp_path,
        NUM_PHOTOGRAPHS,
        caption=("--captioner", "embedded", "--num-captions", NUM_CAPTIONS),
        rank=("--clip-model", "embedded", "--keep", KEEP),
        filter=("--filter-model", "embedded"),
    )
    check_every_url(curated)
    check_odd_pictures(curated)
    check_every_photograph(curated, NUM_CAPTIONS)
    check_models_see(curated)
    num_human = sum(row.is_human for row in curated.truth)
    assert abs(num_human - len(curated.truth) / 2) <= 1
    assert curated.download["num_succeeded"] == NUM_PHOTOGRAPHS


@pytest.fixture
def full_size_models(tmp_path: Path) -> Iterator[Path]:
    """Captioner, filter and CLIP checkpoint of the released sizes; removed when the test is over."""
    folder = tmp_path / "models"
    full_size.save_captioner(folder / "captioner")
    full_size.save_filter(folder / "filter")
    full_size.save_clip(folder / "clip.safetensors")
    yield folder
    shutil.rmtree(folder)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(
    os.environ.get("CAPFILT_FULL_SIZE", "") != "1",
    reason="minutes and 3.5 GB of random weights; CAPFILT_FULL_SIZE=1 runs it",
)
def test_photographs_through_models_of_the_released_sizes(tmp_path: Path, full_size_models: Path) -> None:
    clip = ("--clip-model", full_size.CLIP_NAME, "--clip-weights", full_size_models / "clip.safetensors")
    curated = curate(
        tmp_path,
        NUM_FULL_SIZE,
        caption=("--captioner", full_size_models / "captioner", "--num-captions", NUM_CAPTIONS, "--batch-size", 8),
        rank=(*clip, "--keep", KEEP, "--batch-size", 8),
        filter=("--filter-model", full_size_models / "filter", "--threshold", 0.43, "--batch-size", 8),
    )
    check_every_url(curated)
    check_odd_pictures(curated)
    check_every_photograph(curated, NUM_CAPTIONS)
    check_models_see(curated)
    assert curated.download["num_succeeded"] == NUM_FULL_SIZE
