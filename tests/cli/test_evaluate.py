"""`capfilt evaluate captions` and `vqa`, from files in their published forms to figures."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

from capfilt.evaluate.vqa_accuracy import answer_accuracy
from tests import factories
from tests.cli.conftest import capfilt
from tests.evaluate.small_blip2 import save_blip2
from tests.train import small_models

NUM_IMAGES = 4
WORDS = [
    ["a red square on the left", "a square"],
    ["the top is blue"],
    ["green here", "what is the white square ?"],
    ["a"],
]


def write(path: Path, content: object) -> Path:
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stage-2 model and a captioner; COCO captions, VQA questions and annotations of four images."""
    folder = tmp_path_factory.mktemp("evaluate")
    save_blip2(folder / "opt", "opt")
    factories.save_captioner(folder / "captioner")
    (folder / "val2014").mkdir()
    names = [f"COCO_val2014_{n:012d}.jpg" for n in range(NUM_IMAGES)]
    for number, name in enumerate(names):
        factories.draw_picture(number).save(folder / "val2014" / name)
    write(folder / "captions.json", {
        "images": [{"id": n, "file_name": name} for n, name in enumerate(names)],
        "annotations": [{"id": 0, "image_id": n, "caption": text} for n, own in enumerate(WORDS) for text in own],
    })  # fmt: skip
    questions = [{"question_id": 10 * n, "image_id": n, "question": "what color is it ?"} for n in range(NUM_IMAGES)]
    write(folder / "questions.json", {"data_subtype": "val2014", "questions": questions})
    write(folder / "annotations.json", {"annotations": [annotation(n) for n in range(NUM_IMAGES)]})
    return folder


def annotation(image_id: int) -> dict[str, Any]:
    answers = ["short"] * (2 + image_id) + ["red"] * (8 - image_id)
    return {
        "question_id": 10 * image_id, "image_id": image_id, "question_type": "what color is", "answer_type": "other",
        "multiple_choice_answer": answers[0],
        "answers": [{"answer": a, "answer_confidence": "yes", "answer_id": n + 1} for n, a in enumerate(answers)],
    }  # fmt: skip


def plain_scores(results: list[dict[str, Any]]) -> dict[str, float]:
    tokenizer = PTBTokenizer()
    references = tokenizer.tokenize({r["image_id"]: [{"caption": t} for t in WORDS[r["image_id"]]] for r in results})
    captions = tokenizer.tokenize({r["image_id"]: [{"caption": r["caption"]}] for r in results})
    bleu = Bleu(4).compute_score(references, captions, verbose=0)[0]
    return {"CIDEr": 100 * Cider().compute_score(references, captions)[0], "BLEU-4": 100 * bleu[3]}


@pytest.mark.parametrize("model", ["opt", "captioner"])
def test_captions_of_a_model_from_images_to_figures(folder: Path, tmp_path: Path, model: str) -> None:
    saved = tmp_path / "results.json"
    command = ("evaluate", "captions", folder / model, "--references", folder / "captions.json", "--dtype", "float32")
    command += ("--images", folder / "val2014", "--device", "cpu", "--batch-size", 3)
    done = capfilt(*command, "--save-results", saved, "--json")
    assert done.code == 0, done.err
    found = done.json()
    results = json.loads(saved.read_text())
    assert [entry["image_id"] for entry in results] == list(range(NUM_IMAGES))
    scores = plain_scores(results)
    assert {name: found["metrics"][name] for name in scores} == pytest.approx(scores)
    assert (found["num_scored"], found["complete"], found["comparable"]) == (NUM_IMAGES, True, True)
    assert found["model"]["num_beams"] == {"opt": 5, "captioner": 3}[model]
    assert "writing" in done.err

    again = capfilt("evaluate", "captions", "--references", folder / "captions.json", "--results", saved)
    assert again.code == 0, again.err
    assert f"CIDEr       {scores['CIDEr']:6.2f}" in again.out
    assert again.out.splitlines()[-1].endswith(": 4 of 4 images")
    greedy = capfilt(*command, "--num-beams", 1, "--min-new-tokens", 0, "--max-new-tokens", 2, "--json")
    assert greedy.json()["metrics"] != found["metrics"]


def test_what_is_missing_is_counted_and_named(folder: Path, tmp_path: Path) -> None:
    content = json.loads((folder / "captions.json").read_text())
    content["images"].append({"id": 7, "file_name": "none.jpg"})
    content["annotations"].append({"image_id": 7, "caption": "a red square"})
    references = write(tmp_path / "captions.json", content)
    command = ("evaluate", "captions", folder / "captioner", "--references", references, "--images", folder / "val2014")
    done = capfilt(*command, "--json")
    assert done.code == 1
    assert [entry["id"] for entry in done.json()["unusable"]] == [7]
    assert "No such file" in done.json()["unusable"][0]["reason"]
    results = write(tmp_path / "r.json", [{"image_id": n, "caption": "a square"} for n in (0, 1, 2, 9)])
    done = capfilt("evaluate", "captions", "--references", references, "--results", results)
    assert done.code == 1
    assert "without caption  2: 3, 7" in done.err
    assert "unknown  1: 9" in done.err
    assert "3 of 5 images" in done.out


def test_without_java(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before any model is loaded, and nothing instead unless it is asked for."""
    results = write(tmp_path / "r.json", [{"image_id": n, "caption": "A red square."} for n in range(NUM_IMAGES)])
    monkeypatch.setenv("PATH", str(tmp_path))
    command = ("evaluate", "captions", "--references", folder / "captions.json")
    for scored in (("--results", results), (folder / "none", "--images", folder)):
        refused = capfilt(*command, *scored)
        assert refused.code == 2
        assert "There is no `java` on the PATH" in refused.err
        assert "default-jre-headless" in refused.err
    plain = capfilt(*command, "--results", results, "--tokenizer", "plain")
    assert plain.code == 0, plain.err
    assert "(plain words: compare with no published figures)" in plain.out


def test_scoring_files_needs_no_torch(folder: Path, tmp_path: Path) -> None:
    results = write(tmp_path / "r.json", [{"image_id": n, "caption": "a"} for n in range(NUM_IMAGES)])
    answers = write(tmp_path / "a.json", [{"question_id": 10 * n, "answer": "a"} for n in range(NUM_IMAGES)])
    captions = ["captions", "--references", folder / "captions.json", "--results", results]
    vqa = ["vqa", "--questions", folder / "questions.json", "--annotations", folder / "annotations.json"]
    code = f"""
import sys
from capfilt.cli.main import app
for arguments in {[list(map(str, captions)), [*map(str, vqa), "--results", str(answers)]]!r}:
    try:
        app(["evaluate", *arguments])
    except SystemExit as ended:
        assert ended.code == 0, ended.code
print("loaded", sorted({{"torch", "transformers"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "loaded []"


def test_references_of_other_forms(folder: Path, tmp_path: Path) -> None:
    karpathy = write(tmp_path / "dataset_coco.json", {"images": [
        {"filepath": "val2014", "filename": f"COCO_val2014_{n:012d}.jpg", "split": split, "cocoid": n,
         "sentences": [{"raw": text} for text in WORDS[n]]}
        for n, split in enumerate(["test", "val", "test", "restval"])
    ]})  # fmt: skip
    command = ("evaluate", "captions", folder / "captioner", "--images", folder, "--json", "--references", karpathy)
    assert capfilt(*command).json()["num_scored"] == 2
    assert capfilt(*command, "--split", "val", "--split", "restval").json()["num_scored"] == 2
    run = small_models.save_run(tmp_path / "run", [3, 2]).path
    done = capfilt("evaluate", "captions", folder / "captioner", "--references", run, "--json")
    assert (done.code, done.json()["num_scored"]) == (0, 5)


def test_answers_of_a_model_from_questions_to_accuracy(folder: Path, tmp_path: Path) -> None:
    saved = tmp_path / "answers.json"
    command = ("evaluate", "vqa", folder / "opt", "--questions", folder / "questions.json", "--images", folder)
    command += ("--device", "cpu", "--batch-size", 3)
    known = ("--annotations", folder / "annotations.json")
    done = capfilt(*command, *known, "--save-results", saved, "--json")
    assert done.code == 0, done.err
    answers = json.loads(saved.read_text())
    assert [entry["question_id"] for entry in answers] == [0, 10, 20, 30]
    people = [[a["answer"] for a in annotation(n)["answers"]] for n in range(NUM_IMAGES)]
    scores = [answer_accuracy(entry["answer"], own) for entry, own in zip(answers, people, strict=True)]
    assert done.json()["accuracy"] == pytest.approx(100 * sum(scores) / len(scores))
    assert done.json()["model"]["length_penalty"] == -1.0

    read = capfilt("evaluate", "vqa", "--questions", folder / "questions.json", *known, "--results", saved)
    assert read.code == 0, read.err
    assert read.out.splitlines()[0] == f"accuracy    {done.json()['accuracy']:6.2f}"
    unscored = capfilt(*command, "--save-results", tmp_path / "test.json", "--prompt", "Q: {} A:")
    assert unscored.code == 0, unscored.err
    assert "no annotations, no accuracy: 4 questions answered" in unscored.out


def test_vqa_by_hand(folder: Path, tmp_path: Path) -> None:
    answers = [{"question_id": 10 * n, "answer": text} for n, text in enumerate(["Short.", "the red", "none"])]
    done = capfilt(
        "evaluate", "vqa", "--questions", folder / "questions.json", "--annotations", folder / "annotations.json",
        "--results", write(tmp_path / "answers.json", answers), "--json",
    )  # fmt: skip
    assert done.code == 1
    assert done.json()["accuracy"] == pytest.approx((60 + 100 + 0) / 3)  # 2 of 10, 7 of 10, none of them
    assert done.json()["by_question_type"] == {"what color is": pytest.approx(160 / 3)}
    assert done.json()["without_answer"] == [30]


def test_wrong_usage(folder: Path, tmp_path: Path) -> None:
    references, results = folder / "captions.json", write(tmp_path / "r.json", [{"image_id": 0, "caption": "a"}])
    captions = ("evaluate", "captions", "--references", references)
    vqa = ("evaluate", "vqa", "--questions", folder / "questions.json")
    for arguments, said in (
        (captions, "Give either a MODEL or --results FILE"),
        ((*captions, folder / "opt", "--results", results), "Give either a MODEL or --results FILE"),
        ((*captions, "--results", results, "--save-results", "x"), "nothing to keep"),
        ((*captions, "--results", results, "--num-beams", 3), "--num-beams does nothing with --results"),
        ((*captions, folder / "opt"), "Give --images DIR"),
        ((*captions, folder / "opt", "--images", folder / "none"), "is no folder"),
        ((*captions, "--results", folder / "questions.json"), "expected JSON: a list"),
        ((*captions, "--results", results, "--tokenizer", "nltk"), "expected one of ptb, plain"),
        ((*captions, "--results", tmp_path / "none.json"), "No such file"),
        ((*vqa, folder / "captioner", "--images", folder, "--save-results", tmp_path / "x"), "answers no questions"),
        ((*vqa, folder / "opt", "--images", folder), "Give --annotations FILE"),
        ((*vqa, folder / "opt", "--images", folder, "--save-results", tmp_path / "x", "--prompt", "Q"), "no place"),
    ):
        done = capfilt(*arguments)
        assert done.code == 2, (arguments, done)
        assert said in done.err, (arguments, done)
