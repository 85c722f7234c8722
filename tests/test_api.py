"""The Python interface: the captions and scores of the commands themselves, pictures in any form, clear errors."""

from __future__ import annotations

import io
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import capfilt
from capfilt.api import Captioner, Filter, Ranker, curate
from capfilt.curation.annotate import annotate
from capfilt.data.manifest import read_manifest
from capfilt.data.rundir import RunDir
from capfilt.data.samples import Sample
from capfilt.data.schemas import WEB_CAPTION_INDEX
from capfilt.data.shards import read_samples
from capfilt.data.verify import verify_run
from capfilt.errors import UsageError
from capfilt.recipes import read_recipe
from tests import factories
from tests.curation.small_runs import Models, make_run, read_stage, save_models


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return save_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def curated(models: Models, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A run that the stages curated."""
    run = make_run(tmp_path_factory.mktemp("runs") / "run")
    stages = ["captions", "clip", "itm", "manifest"]
    annotate(run, stages, caption=models.caption(), rank=models.rank(include_web=True), filter=models.filter())
    return run


@pytest.fixture(scope="module")
def samples(curated: RunDir) -> list[Sample]:
    return [sample for shard in curated.shard_names() for sample in read_samples(curated, shard)]


def pictures_of(samples: list[Sample]) -> list[Image.Image]:
    return [Image.open(io.BytesIO(sample.image)) for sample in samples]


def rows_of(run: RunDir, stage: str) -> list[dict[str, object]]:
    return [row for table in read_stage(run, stage).values() for row in table.to_pylist()]


def test_a_captioner_writes_what_the_command_writes(models: Models, curated: RunDir, samples: list[Sample]) -> None:
    captioner = Captioner(str(models.root / "captioner"), num_captions=4, dtype="float32", batch_size=3)
    written = captioner(pictures_of(samples), [sample.key for sample in samples])
    stored: dict[str, list[object]] = {}
    for row in rows_of(curated, "captions"):
        stored.setdefault(str(row["key"]), []).append(row["text"])
    assert dict(zip((sample.key for sample in samples), written, strict=True)) == stored


def test_scores_are_those_of_the_stages(models: Models, curated: RunDir, samples: list[Sample]) -> None:
    clip = {(row["key"], row["caption_index"]): row for row in rows_of(curated, "clip") if row["text"]}
    itm = {(row["key"], row["caption_index"]): row["itm_score"] for row in rows_of(curated, "itm")}
    indices = {sample.key: sorted(index for key, index in clip if key == sample.key) for sample in samples}
    texts = [[str(clip[sample.key, index]["text"]) for index in indices[sample.key]] for sample in samples]

    ranked = Ranker(str(models.root / "clip"), dtype="float32", batch_size=4)(pictures_of(samples), texts)
    scores = Filter(str(models.root / "filter"), dtype="float32", batch_size=4)(pictures_of(samples), texts)
    num_judged = 0
    for sample, captions, own in zip(samples, ranked, scores, strict=True):
        for index, caption, score in zip(indices[sample.key], captions, own, strict=True):
            row = clip[sample.key, index]
            assert caption.clip_score == pytest.approx(row["clip_score"], abs=1e-5)
            assert caption.rank == row["rank"]
            assert (caption.duplicate_of is None) == (row["duplicate_of"] is None)
            if (sample.key, index) in itm:
                num_judged += 1
                assert score == pytest.approx(itm[sample.key, index], abs=1e-5)
    assert num_judged == len(itm) > 20
    assert any(index == WEB_CAPTION_INDEX for own in indices.values() for index in own), "web captions were compared"


def test_the_best_texts_come_first(models: Models) -> None:
    ranker = Ranker(str(models.root / "clip"), keep=2, dtype="float32")
    picture, texts = factories.draw_picture(1), ["a red dog", "two cats", "a red dog", "a tree"]
    ranked = sorted(ranker([picture], [texts])[0], key=lambda caption: -(caption.clip_score or 0))
    expected = list(dict.fromkeys(caption.text for caption in ranked))[:2]
    assert ranker.best([picture], [texts]) == [expected]
    assert ranker.best([picture], [[]]) == [[]]


def test_files_count_as_their_pictures_and_content_is_the_key(models: Models, tmp_path: Path) -> None:
    captioner = Captioner(str(models.root / "captioner"), dtype="float32", num_captions=3, batch_size=2)
    pictures = [factories.draw_picture(seed) for seed in (1, 2, 1)]
    for number, picture in enumerate(pictures):
        picture.save(tmp_path / f"{number}.png")
    found = captioner(pictures)
    assert captioner([tmp_path / "0.png", str(tmp_path / "1.png"), tmp_path / "2.png"]) == found
    assert found[0] == found[2] != found[1]
    assert [len(captions) for captions in found] == [3, 3, 3]
    turned = pictures[0].transpose(Image.Transpose.ROTATE_90)
    exif = turned.getexif()
    exif[0x0112] = 6  # to be turned back by 90 degrees
    turned.save(tmp_path / "turned.png", exif=exif)
    assert captioner([tmp_path / "turned.png"]) == captioner([Image.open(tmp_path / "turned.png")]) == [found[0]]


def test_an_opened_picture_of_any_mode_counts_as_its_file(models: Models, tmp_path: Path) -> None:
    captioner = Captioner(str(models.root / "captioner"), dtype="float32", num_captions=3, batch_size=4)
    clear = factories.draw_picture(1).convert("RGBA")
    clear.putalpha(factories.draw_picture(2).convert("L"))
    deep = Image.fromarray(np.asarray(factories.draw_picture(3).convert("L"), np.uint16) * 257)
    pictures = {"clear": clear, "deep": deep, "palette": clear.quantize(16), "grey": clear.convert("LA")}
    files = [tmp_path / f"{name}.png" for name in pictures]
    for picture, file in zip(pictures.values(), files, strict=True):
        picture.save(file)
    assert captioner([Image.open(file) for file in files]) == captioner(files) == captioner(list(pictures.values()))


def test_what_cannot_be_is_said(models: Models, tmp_path: Path) -> None:
    captioner = Captioner(str(models.root / "captioner"), dtype="float32")
    picture = factories.draw_picture(0)
    (tmp_path / "text.jpg").write_text("no picture")
    with pytest.raises(UsageError, match=r"text\.jpg cannot be used"):
        captioner([picture, tmp_path / "text.jpg"])
    with pytest.raises(UsageError, match="No such file"):
        captioner([tmp_path / "none.jpg"])
    with pytest.raises(UsageError, match="cannot be used"):
        captioner(["a\0b.jpg"])
    with pytest.raises(UsageError, match="One picture was given"):
        captioner(str(tmp_path / "text.jpg"))
    with pytest.raises(UsageError, match=r"of the type ndarray; .*fromarray"):
        captioner([np.asarray(picture)])  # type: ignore[list-item]
    with pytest.raises(UsageError, match="2 keys for 1 picture"):
        captioner([picture], ["a", "b"])
    judge = Filter(str(models.root / "filter"), dtype="float32")
    with pytest.raises(UsageError, match="Lists of texts: 1, pictures: 2"):
        judge([picture, picture], [["a dog"]])
    with pytest.raises(UsageError, match="a text instead of a list"):
        judge([picture], ["a dog"])  # type: ignore[list-item]
    with pytest.raises(UsageError, match="a text instead of a list"):
        judge([picture], "a dog")
    with pytest.raises(UsageError, match="a text instead of a list"):
        judge([picture], ["a dog", "a cat"])  # type: ignore[list-item]
    with pytest.raises(UsageError, match="num_captions"):
        Captioner(str(models.root / "captioner"), num_captions=0)
    with pytest.raises(TypeError, match="temprature"):
        Captioner(str(models.root / "captioner"), temprature=1.0)
    assert captioner([]) == judge([], []) == []


def test_a_recipe_is_done_to_a_run_once(models: Models, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (tmp_path / "small.toml").write_text(models.recipe(num_captions=3, threshold=0.0))
    steps = curate(str(tmp_path / "small.toml"), run.path)
    assert [step.name for step in steps] == ["annotate"]
    kept = capfilt.read_manifest([run], kept_only=True)
    assert kept.num_rows > 14
    assert verify_run(run, deep=True).exit_code == 0
    before = {path: path.stat().st_mtime_ns for path in run.path.glob("manifest/*.parquet")}
    curate(str(tmp_path / "small.toml"), run.path)
    assert {path: path.stat().st_mtime_ns for path in run.path.glob("manifest/*.parquet")} == before

    recipe = read_recipe(str(tmp_path / "small.toml"))
    assert recipe.filter is not None
    stricter = replace(recipe, filter=replace(recipe.filter, threshold=0.99))
    curate(stricter, str(run.path), generation="strict")
    assert read_manifest([RunDir.open(run.path, "strict")], kept_only=True).num_rows < kept.num_rows


def test_an_import_costs_no_torch_and_names_are_the_interface() -> None:
    said = subprocess.run(
        [sys.executable, "-c", "import capfilt, sys; dir(capfilt); assert 'torch' not in sys.modules; "
         "from capfilt import Captioner; assert 'torch' in sys.modules"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert said.returncode == 0, said.stderr
    assert capfilt.__all__ == [
        "Captioner", "CuratedDataset", "Filter", "RankedCaption", "Ranker", "curate", "read_manifest",
    ]  # fmt: skip
    assert set(capfilt.__all__) <= set(dir(capfilt))
    for name in capfilt.__all__:
        assert getattr(capfilt, name).__doc__, f"{name} has no docstring"
    with pytest.raises(AttributeError, match="no attribute 'Captionist'"):
        _ = capfilt.Captionist  # type: ignore[attr-defined]
    assert (Path(capfilt.__file__).parent / "py.typed").is_file()
