"""`evaluate captions` as a function: which images count, and what is said of the others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from capfilt.data.annotations import CaptionedImage
from capfilt.data.image_sources import ImageFile
from capfilt.data.rundir import RunDir
from capfilt.errors import UsageError
from capfilt.evaluate.caption_metrics import score_captions
from capfilt.evaluate.captions import (
    caption_images,
    check_inputs,
    evaluate_captioner,
    evaluate_captions,
    read_references,
)
from capfilt.evaluate.generation import partial_path
from capfilt.evaluate.writers import load_writer
from capfilt.settings import GenerationSettings
from tests.train import small_models

IMAGES = [CaptionedImage(1, ("a red square",)), CaptionedImage(2, ("a dog", "one dog")), CaptionedImage(3, ())]
CPU = GenerationSettings(device="cpu", dtype="float32")


def test_figures_are_of_the_images_that_have_both() -> None:
    found = evaluate_captions(IMAGES, {1: "red square", 3: "x", "4": "y"})
    assert found.metrics == score_captions({1: "red square"}, {1: ("a red square",)}).metrics
    assert (found.num_scored, found.num_images, found.exit_code, found.comparable) == (1, 3, 1, True)
    assert (found.without_caption, found.without_reference, found.unknown) == ([2], [3], ["4"])
    whole = evaluate_captions(IMAGES[:2], {2: "dog", 1: "red square"}, tokenizer="plain")
    assert (whole.num_scored, whole.exit_code, whole.comparable) == (2, 0, False)
    assert "compare with no published figures" in whole.line()


def test_no_image_in_common() -> None:
    with pytest.raises(UsageError, match=r"captions are of 'a\.jpg', …, the references of 1, …"):
        evaluate_captions(IMAGES, {"a.jpg": "x"})


@pytest.fixture
def images(pictures_dir: Path) -> list[CaptionedImage]:
    names = ["0.png", "1.png", "broken.png", "2.png"]
    return [CaptionedImage(n, (f"a red square {n}",), ImageFile(pictures_dir / name)) for n, name in enumerate(names)]


def test_a_model_from_images_to_figures(writers_dir: Path, images: list[CaptionedImage], tmp_path: Path) -> None:
    results = tmp_path / "results.json"
    writer = load_writer(writers_dir / "captioner", "caption", CPU)
    found = evaluate_captioner(writer, images, results=results)
    saved = {entry["image_id"]: entry["caption"] for entry in json.loads(results.read_text())}
    assert list(saved) == [0, 1, 3]
    assert found.metrics == score_captions(saved, {n: (f"a red square {n}",) for n in saved}).metrics
    assert [entry.id for entry in found.unusable] == [2]
    assert (found.without_caption, found.num_scored, found.exit_code) == ([], 3, 1)
    assert found.model["num_beams"] == 3
    assert not partial_path(results).exists()
    again = caption_images(writer, images)
    assert again.texts == saved


def test_images_without_references_are_captioned_where_results_are_saved(
    writers_dir: Path, images: list[CaptionedImage], tmp_path: Path
) -> None:
    bare = [CaptionedImage(image.id, (), image.image) for image in images if image.id != 2]
    writer = load_writer(writers_dir / "captioner", "caption", CPU)
    found = evaluate_captioner(writer, bare, results=tmp_path / "r.json")
    assert (found.metrics, found.exit_code) == ({}, 0)
    assert "no references, no figures" in found.line()
    assert len(json.loads((tmp_path / "r.json").read_text())) == 3
    with pytest.raises(UsageError, match="nothing can be scored"):
        evaluate_captioner(writer, bare)
    with pytest.raises(UsageError, match="None of 1 images could be captioned; the first: .*broken"):
        evaluate_captioner(writer, images[2:3])


def test_what_is_found_out_before_a_model_is_loaded(
    images: list[CaptionedImage], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_inputs(images)
    for call, said in (
        (lambda: check_inputs(IMAGES), "Give --images DIR"),
        (lambda: check_inputs(images, results=tmp_path / "none" / "x"), "cannot be written"),
        (lambda: check_inputs(images, "nltk"), "expected one of ptb, plain"),
    ):
        with pytest.raises(UsageError, match=said):
            call()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UsageError, match="java"):
        check_inputs(images)


def test_references_of_a_run_are_what_it_keeps(tmp_path: Path) -> None:
    run: RunDir = small_models.save_run(tmp_path / "run", [4, 3], drop_every=2)
    images = read_references(run.path)
    assert [len(image.captions) for image in images] == [2, 2, 2, 2]
    assert all(image.image is not None for image in images)
    empty = small_models.save_run(tmp_path / "empty", [1], drop_every=1)
    with pytest.raises(UsageError, match="keeps no caption of any image"):
        read_references(empty.path)
