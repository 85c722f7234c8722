"""What a dry run says of amounts, time and room: beside what the run then takes."""

from __future__ import annotations

import hashlib
import shutil
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pytest

from capfilt.data.commit import commit_stage, read_commit_record, read_table
from capfilt.data.retries import RETRY_OF
from capfilt.data.rundir import RunDir
from capfilt.estimate import STAGE_BYTES_PER_IMAGE, Estimate, estimate
from capfilt.pipeline import run_recipe
from capfilt.plan import plan_recipe
from capfilt.progress import NullProgress, as_bytes
from capfilt.recipes import Recipe, SourceSettings, read_recipe
from capfilt.settings import DownloadSettings
from tests.cli.conftest import capfilt
from tests.curation.small_runs import Models, make_run, save_models

STAGES = ("captions", "clip", "itm", "manifest")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return save_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def recipe(models: Models, tmp_path: Path) -> Recipe:
    (tmp_path / "small.toml").write_text(models.recipe(num_captions=4))
    return read_recipe(str(tmp_path / "small.toml"))


def estimated(recipe: Recipe, path: Path, num_probed: int = 0) -> Estimate:
    return estimate(recipe, path, plan_recipe(recipe, path), num_probed=num_probed)


def files_of(path: Path) -> dict[str, str]:
    return {
        str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(path.rglob("*")) if file.is_file() and file.name != ".lock"
    }  # fmt: skip


def test_amounts_and_a_probe_beside_the_run_itself(recipe: Recipe, tmp_path: Path) -> None:
    """Rates differ by a factor of four at most: other tests may compute beside one of the two."""
    run = make_run(tmp_path / "run", num_shards=3, num_samples=40)
    before = files_of(run.path)
    found = estimated(recipe, run.path, 40)
    assert files_of(run.path) == before
    assert (found.num_shards, found.num_images, found.images_left, found.rows_left) == (3, 120, 120, 0)
    assert found.num_bytes == sum(run.tar_path(shard).stat().st_size for shard in run.shard_names())
    assert found.stages_left == STAGES
    assert found.probe is not None
    assert (found.probe.num_images, found.probe.computing) == (40, "float32 on cpu")
    assert found.hours == pytest.approx(120 / found.probe.images_per_second / 3600)
    watch = Watch()
    list(run_recipe(recipe, run.path, progress=watch))
    assert watch.seconds() / 4 < found.hours * 3600 < watch.seconds() * 4
    sizes = [run.stage_file(stage, shard).stat().st_size for stage in STAGES for shard in run.shard_names()]
    assert found.probe.bytes_per_image == pytest.approx(sum(sizes) / 120, rel=0.1)
    assert found.bytes_needed == round(120 * found.probe.bytes_per_image)
    after = estimated(recipe, run.path, 40)
    assert (after.images_left, after.stages_left, after.probe, after.bytes_needed) == (0, (), None, 0)


class Watch(NullProgress):
    """From the moment when the models are loaded to the last image."""

    def start(self, name: str, total: int | None, unit: str, /) -> None:
        self.began = self.ended = time.perf_counter()

    def advance(self, n: int = 1, /, *, already: bool = False, **fields: object) -> None:
        self.ended = time.perf_counter()

    def seconds(self) -> float:
        return self.ended - self.began


def test_a_probe_of_what_is_left(recipe: Recipe, tmp_path: Path) -> None:
    """Captions that are there are read, not made: the captioner is gone."""
    run = make_run(tmp_path / "run", num_shards=3, num_samples=8, broken=(1,))
    list(run_recipe(replace(recipe, rank=None, filter=None), run.path))
    gone = replace(recipe, caption=replace(recipe.caption, captioner="nobody/gone")) if recipe.caption else recipe
    found = estimated(gone, run.path, 4)
    assert found.stages_left == ("clip", "itm", "manifest")
    assert found.images_left == 24
    assert found.probe is not None
    assert found.probe.images_per_second > 0
    run.stage_file("captions", "00002").unlink()
    assert estimated(recipe, run.path, 4).stages_left == STAGES


def test_a_download_that_is_under_way(recipe: Recipe, tmp_path: Path) -> None:
    """Of 2,000 rows 20 are there: as many images and bytes again for each 20 of the others, if the recipe has them."""
    run = make_run(tmp_path / "run", num_shards=2, num_samples=10)
    make_longer(run, 2_000)
    assert estimated(recipe, run.path).rows_left == 0
    source = SourceSettings(table="urls.parquet")
    downloads = replace(recipe, source=source, download=DownloadSettings(url_column="url"))
    plans = plan_recipe(recipe, run.path)  # no table is here
    found = estimate(downloads, run.path, plans)
    assert (found.rows_left, found.images_left) == (1_980, 20 + 1_980)
    assert found.bytes_needed == round(1_980 * found.num_bytes / 20 + 2_000 * STAGE_BYTES_PER_IMAGE)
    assert found.fits
    list(run_recipe(recipe, run.path))
    whole = estimate(downloads, run.path, plan_recipe(recipe, run.path), num_probed=4)
    assert (whole.images_left, whole.stages_left) == (1_980, STAGES)
    assert whole.probe is not None


def test_runs_of_other_kinds(recipe: Recipe, tmp_path: Path) -> None:
    """Imported, which know no table, human captions, and shards of an attempt, which have a column more."""
    made = make_run(tmp_path / "made", num_shards=1, num_samples=6)
    assert capfilt("import", made.tar_path("00000"), tmp_path / "imported").code == 0
    assert estimated(recipe, tmp_path / "imported", 3).images_left == 6
    done = capfilt("run", tmp_path / "small.toml", tmp_path / "imported", "--dry-run", "--probe", 2)
    assert done.code == 0, done.err
    assert "2 images, float32 on cpu" in done.out
    run = make_run(tmp_path / "run", num_shards=2, num_samples=4)
    add_column(run, "00001")
    probe = estimated(recipe, run.path, 4).probe
    assert probe is not None
    assert probe.num_images == 4


def add_column(run: RunDir, shard: str) -> None:
    """As the shards of `capfilt retry` have one."""
    table = read_table(run.stage_file("shards", shard))
    commit_anew(run, shard, table.append_column(RETRY_OF, table["key"]), num_rows=8)


def make_longer(run: RunDir, num_rows: int) -> None:
    """Have the shards be those of a longer table."""
    for shard in run.shard_names():
        commit_anew(run, shard, read_table(run.stage_file("shards", shard)), num_rows)


def commit_anew(run: RunDir, shard: str, table: pa.Table, num_rows: int) -> None:
    path = run.stage_file("shards", shard)
    record = read_commit_record(path)
    path.unlink()
    with run.new_staging() as staging:
        tar = run.tar_path(shard).rename(staging / "shard.tar")
        commit_stage(
            run, "shards", shard, table, fields={}, input_digest=record.input_digest, rows_in=record.rows_in, tar=tar,
            extra={"num_shards": 2, "source_rows": num_rows},
        )  # fmt: skip


def test_the_command(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, named = make_run(tmp_path / "run", num_shards=2, num_samples=6), tmp_path / "small.toml"
    before = files_of(run.path)
    done = capfilt("run", named, run.path, "--dry-run", "--probe", 3, "--price-per-hour", 2.5)
    assert done.code == 0, done.err
    assert "12 images in 2 shards" in done.out
    assert "3 images, float32 on cpu:" in done.out
    assert " s of one such device, at 2.5 an hour 0.00" in done.out
    told = capfilt("run", named, run.path, "--dry-run", "--json").json()["estimate"]
    assert (told["images_left"], told["hours"], told["probe"]) == (12, None, None)
    assert files_of(run.path) == before
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: SimpleNamespace(free=10_000))
    full = capfilt("run", named, run.path, "--dry-run")
    assert full.code == 1
    assert "needs 12 kB; its disk has 10 kB left. Make room" in full.err
    assert capfilt("run", named, run.path, "--probe", 3).code == 2
    assert capfilt("run", named, run.path, "--dry-run", "--price-per-hour", 3).code == 2
    nothing = capfilt("run", named, tmp_path / "none", "--dry-run", "--probe", 3)
    assert nothing.code == 2


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0 bytes"), (1, "1 byte"), (999, "999 bytes"), (1_000, "1.0 kB"), (9_949, "9.9 kB"), (9_951, "10 kB"),
     (999_499, "999 kB"), (999_500, "1.0 MB"), (123_456_789, "123 MB"), (6_700_000_000_000, "6.7 TB"),
     (5 * 10**18, "5,000,000 TB")],
)  # fmt: skip
def test_bytes_are_told_in_the_largest_unit(number: int, text: str) -> None:
    assert as_bytes(number) == text
