"""Fine-tuning BLIP-2 through the command line, and what can be done with the result."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image
from transformers import Blip2ForConditionalGeneration

from tests.cli.conftest import capfilt
from tests.evaluate.small_blip2 import save_blip2
from tests.train import small_models

STEPS = ("--max-steps", 2, "--batch-size", 4, "--accumulation-steps", 1, "--warmup-steps", 0, "--device", "cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """RUN, a stage-2 model, and questions as VQAv2 has them: COCO's names of images, ten answers that differ."""
    folder = tmp_path_factory.mktemp("tuning")
    small_models.save_run(folder / "run", [12])
    small_models.save_generation(folder / "run", "first")
    save_blip2(folder / "stage2", "opt")
    (folder / "images" / "train2014").mkdir(parents=True)
    questions, annotations = [], []
    for image_id, color in enumerate(small_models.COLORS, start=9):
        picture = Image.fromarray(small_models.draw_square(color, "left", image_id))
        picture.save(folder / "images" / "train2014" / f"COCO_train2014_{image_id:012d}.jpg")
        for number in range(2):
            ids = {"image_id": image_id, "question_id": 1000 * image_id + number}
            questions.append({**ids, "question": "What color is the square?"})
            given = [{"answer_id": n + 1, "answer": color if n < 7 else "a square"} for n in range(10)]
            annotations.append({
                **ids, "answers": given, "answer_type": "other", "question_type": "what color",
                "multiple_choice_answer": color,
            })  # fmt: skip
    head = {"info": {}, "license": {}, "data_type": "mscoco", "data_subtype": "train2014"}
    asked = {**head, "task_type": "Open-Ended", "questions": questions}
    (folder / "questions.json").write_text(json.dumps(asked))
    (folder / "annotations.json").write_text(json.dumps({**head, "annotations": annotations}))
    return folder


def files_of(folder: Path) -> tuple[object, ...]:
    given = ("--questions", folder / "questions.json", "--annotations", folder / "annotations.json")
    return (*given, "--images", folder / "images")


def test_questions_are_trained_on_and_answered(folder: Path, tmp_path: Path) -> None:
    command = ("train", "blip2-vqa", "--init", folder / "stage2", "--output", tmp_path / "out", *files_of(folder))
    command += ("--image-size-px", 48, "--train-image-encoder", *STEPS)
    done = capfilt(*command)
    assert done.code == 0, done.err
    assert "blip2-vqa: 2 steps, mean loss" in done.out
    assert f"Next: capfilt evaluate vqa {tmp_path / 'out'} --questions FILE" in done.err
    assert "nothing to do, 2 steps are done" in capfilt(*command).out
    Blip2ForConditionalGeneration.from_pretrained(tmp_path / "out")
    found = capfilt("evaluate", "vqa", tmp_path / "out", *files_of(folder), "--json")
    assert found.code == 0, found.err
    assert found.json()["num_scored"] == 8


def test_captions_are_trained_on_and_written(folder: Path, tmp_path: Path) -> None:
    command = ("train", "blip2-captions", folder / "run", "--init", folder / "stage2", "--output", tmp_path / "out")
    done = capfilt(*command, "--image-size-px", 0, "--generation", "first", *STEPS)
    assert done.code == 0, done.err
    assert f"Next: capfilt generate {tmp_path / 'out'} IMAGE --prompt 'a photo of'" in done.err
    fields = json.loads((tmp_path / "out" / "training.json").read_text())["fields"]
    assert (fields["training"], fields["prompt"], fields["image_size_px"]) == ("blip2-captions", "a photo of", 0)
    picture = next((folder / "images" / "train2014").iterdir())
    one = capfilt("generate", tmp_path / "out", picture, "--prompt", "a photo of", "--max-new-tokens", 5)
    assert one.code == 0, one.err
    scored = capfilt(
        "evaluate", "captions", tmp_path / "out", "--references", folder / "run", "--tokenizer", "plain", "--json"
    )
    assert scored.code == 0, scored.err
    assert scored.json()["model"]["prompt"] == "a photo of"


@pytest.mark.parametrize(
    ("training", "given", "said"),
    [
        ("blip2-vqa", ("--annotations", "x"), "1 --questions, 2 --annotations, 1 --images; expected as many"),
        ("blip2-vqa", ("--set", "run_weights=1"), "no setting run_weights"),
        ("blip2-vqa", ("--prompt", "Question:"), "expected a text with {} for the question"),
        ("blip2-vqa", (), "image_size_px is 490; expected a multiple of the encoder's patches, 8 px"),
        ("blip2-captions", (), "image_size_px is 364; expected a multiple of the encoder's patches, 8 px"),
        (
            "blip2-captions",
            ("--train-image-encoder", "--feature-cache-dir", "f"),
            "expected None where the image encoder trains",
        ),
    ],
)
def test_wrong_usage(folder: Path, tmp_path: Path, training: str, given: tuple[object, ...], said: str) -> None:
    data = files_of(folder) if training == "blip2-vqa" else (folder / "run",)
    done = capfilt("train", training, *data, "--init", folder / "stage2", "--output", tmp_path / "out", *given)
    assert done.code == 2
    assert said in done.err
