"""The commands at a run on an object store: all that they do at one on a disk; by several workers, in a training."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from capfilt.data.commit import read_table
from capfilt.data.rundir import RunDir
from capfilt.data.verify import verify_run
from capfilt.models.ranks import Ranks
from capfilt.settings import TrainSettings
from capfilt.train.batches import iterate_batches
from capfilt.train.pairs import read_pairs
from capfilt.world.site import SiteSettings, WorldSite
from tests.cli.conftest import QUIET, capfilt, capfilt_process
from tests.curation.downloads import rows_of
from tests.curation.small_runs import Models, save_models
from tests.curation.test_import_shards import picture, write_foreign
from tests.object_stores import objects_of
from tests.train.small_models import save_blip

NUM_TARS, NUM_SAMPLES = 4, 9


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return save_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def tars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tars(tmp_path_factory.mktemp("tars"))


@pytest.fixture
def recipe(models: Models, tmp_path: Path) -> Path:
    (tmp_path / "small.toml").write_text(models.recipe(num_captions=3))
    return tmp_path / "small.toml"


def write_tars(folder: Path) -> Path:
    """Tars to import; one picture of each cannot be decoded."""
    for number in range(NUM_TARS):
        members = [(f"{number}bad.jpg", b"no picture"), (f"{number}bad.txt", b"bad")]
        for sample in range(NUM_SAMPLES):
            key = f"{number}{sample}"
            members += [(f"{key}.jpg", picture(int(key))), (f"{key}.txt", b"a red dog")]
        write_foreign(folder / f"{number}.tar", members)
    return folder


def rows_of_stages(place: str | Path) -> dict[str, Any]:
    """The rows of all stages."""
    run = RunDir.open(place)
    return {
        f"{stage}/{shard}": read_table(run.stage_file(stage, shard))
        for stage in ("shards", "captions", "clip", "itm", "manifest")
        for shard in run.committed(stage)
    }


def test_every_command(address: str, tars: Path, models: Models, recipe: Path, tmp_path: Path) -> None:
    disk = tmp_path / "run"
    for place in (disk, address):
        for command in (
            ("import", tars / "*.tar", place), ("run", recipe, place),
            ("select", place, "--threshold", "0.3"), ("select", place, "--threshold", "0.5"),
            ("verify", place, "--deep"), ("export", place, "--output", tmp_path / "pairs.csv", "--overwrite"),
            ("report", place, "--output", tmp_path / "page.html", "--overwrite"),
        ):  # fmt: skip
            done = capfilt(*command)
            assert done.code == 0, (command, done)
    assert rows_of_stages(address) == rows_of_stages(disk)
    mine, theirs = (capfilt("stats", place, "--json").json() for place in (address, disk))
    assert mine.pop("run") == address
    assert theirs.pop("run") == str(disk)
    assert set(mine.pop("times")) == set(theirs.pop("times")) == {"captions", "clip", "itm"}
    assert mine == theirs
    (tmp_path / "labels.csv").write_text("key,caption_index,label\n00,-1,1\n01,-1,0\n02,-1,1\n")
    for words in (
        ("retrieval", models.root / "filter", "--references"), ("filter", "--labels", tmp_path / "labels.csv"),
    ):  # fmt: skip
        found = [capfilt("evaluate", *words, place, "--json") for place in (address, disk)]
        assert [done.code for done in found] == [0, 0], found
        mine, theirs = (done.json() for done in found)
        assert mine | {"seconds": 0} == theirs | {"seconds": 0}
    for place, name in ((disk, "here"), (address, "there")):
        done = capfilt("export", place, "--format", "webdataset", "--samples-per-shard", 10, "-o", tmp_path / name)
        assert done.code == 0, done.err
    here, there = ({path.name: path.read_bytes() for path in (tmp_path / n).iterdir()} for n in ("here", "there"))
    assert there == here
    assert "00000.tar" in here
    done = capfilt("export", address)
    assert (done.code, "Name a folder: --output DIR" in done.err) == (2, True), done.err
    again = capfilt("run", recipe, address, "--dry-run", "--probe", 4)
    assert "36 images in 4 shards" in again.out
    assert "an object store" in again.out
    assert f"capfilt run {recipe} {address}" in again.err
    assert "Nothing to import" in capfilt("import", tars / "*.tar", address).out
    fsspec.filesystem("s3").rm_file(RunDir.open(address).stage_file("shards", "00002").path)  # as `verify` advises
    done = capfilt("import", tars / "*.tar", address)
    assert done.code == 0, done.err
    assert rows_of_stages(address) == rows_of_stages(disk)
    assert capfilt("run", recipe, address, "--dry-run", "--json").json()["run"] == address


def test_a_download_and_its_failures_tried_again(address: str, tmp_path: Path) -> None:
    with WorldSite(SiteSettings(num_urls=60, behaviour_shares=QUIET)) as site:
        table = site.write_table(tmp_path / "urls.parquet")
        options = ("--allow-private-addresses", "--timeout", 5, "--num-processes", 1)
        for place in (tmp_path / "run", address):
            done = capfilt("download", table, place, "--num-shards", 3, *options)
            assert done.code == 0, done.err
            done = capfilt("retry", place, "--reason", "not_found", *options)
            assert done.code == 0, done.err
            assert capfilt("verify", place, "--deep").code == 0
    disk, store = (
        [{name: value for name, value in row.items() if name != "error_message"} for row in rows_of(RunDir.open(place))]
        for place in (tmp_path / "run", address)
    )
    assert store == disk


def test_a_training_reads_from_the_store_within_the_bound(
    address: str, tars: Path, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CAPFILT_CACHE_BYTES", "90000")  # two tars of four
    save_blip(tmp_path / "blip", captioner=True)
    losses = {}
    for place in (str(tmp_path / "run"), address):
        assert capfilt("import", tars / "*.tar", place).code == 0
        assert capfilt("run", recipe, place).code == 0
        assert capfilt("select", place, "--threshold", 0).code == 0
    for place in (str(tmp_path / "run"), address):
        output = tmp_path / f"model-{len(losses)}"
        done = capfilt(
            "train", "captioner", place, "--init", tmp_path / "blip", "--output", output, "--max-steps", 6,
            "--batch-size", 8, "--json",
        )  # fmt: skip
        assert done.code == 0, done.err
        losses[place] = done.json()["last_losses"]
    assert losses[address] == losses[str(tmp_path / "run")]
    kept = sum(path.stat().st_size for path in (tmp_path / "cache" / "tars").glob("*"))
    assert 0 < kept <= 90000
    whole = {  # streamed: shard by shard, by two ranks, each its own
        place: [
            batch
            for rank in range(2)
            for batch in itertools.islice(
                iterate_batches(
                    read_pairs([RunDir.open(place)], image_size_px=16, memory_limit_bytes=0),
                    TrainSettings(batch_size=4), ranks=Ranks(rank, 2),
                ), 6
            )
        ]
        for place in losses
    }  # fmt: skip
    for mine, theirs in zip(whole[address], whole[str(tmp_path / "run")], strict=True):
        assert mine.keys == theirs.keys
        np.testing.assert_array_equal(mine.pixels, theirs.pixels)


def test_by_workers_of_a_cluster(address: str, tars: Path, recipe: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="the extra `ray` is not installed")
    for place in (tmp_path / "run", address):
        assert capfilt("import", tars / "*.tar", place).code == 0
    assert capfilt("run", recipe, tmp_path / "run").code == 0
    process = capfilt_process("run", recipe, address, "--engine", "ray", "--num-workers", 2, "--cpus-per-worker", 1)
    _, said = process.communicate(timeout=240)
    assert process.returncode == 0, said
    assert rows_of_stages(address) == rows_of_stages(tmp_path / "run")
    assert verify_run(RunDir.open(address), deep=True).exit_code == 0


def test_a_download_by_workers_of_a_cluster(address: str, tmp_path: Path) -> None:
    """Their parts of the table come to them by the store."""
    pytest.importorskip("ray", reason="the extra `ray` is not installed")
    with WorldSite(SiteSettings(num_urls=60, behaviour_shares=QUIET)) as site:
        table = site.write_table(tmp_path / "urls.parquet")
        options = ("--allow-private-addresses", "--timeout", 5, "--num-processes", 1, "--num-shards", 6)
        assert capfilt("download", table, tmp_path / "run", *options).code == 0
        ray_options = ("--engine", "ray", "--num-workers", 2, "--cpus-per-worker", 1)
        process = capfilt_process("download", table, address, *options, *ray_options)
        _, said = process.communicate(timeout=240)
        assert process.returncode == 0, said
    disk, store = (rows_of(RunDir.open(place)) for place in (tmp_path / "run", address))
    assert [(row["key"], row["status"], row["sha256"]) for row in store] == [
        (row["key"], row["status"], row["sha256"]) for row in disk
    ]
    assert verify_run(RunDir.open(address), deep=True).exit_code == 0
    assert not [name for name in objects_of(address) if name.startswith(".")]


def test_what_needs_a_disk_says_so(address: str, tmp_path: Path) -> None:
    for options in ((), ("--dry-run",)):
        done = capfilt("run", "quickstart", address, *options)
        assert done.code == 2
        assert "a folder of this machine is needed there" in done.err
    assert fsspec.filesystem("s3").find(address) == [], "nothing was begun"
    assert capfilt("stats", address).code == 2
    for words in (("export", tmp_path, "-o"), ("report", tmp_path, "-o")):
        RunDir.create(tmp_path)
        done = capfilt(*words, f"{address}/file.csv")
        assert done.code == 2
        assert "is written to a disk of this machine" in done.err, done
    assert capfilt("download", "urls.csv", "gs://bucket/run").code == 2
    assert "pip install 'capfilt[gs]'" in capfilt("stats", "gs://bucket/run").err
