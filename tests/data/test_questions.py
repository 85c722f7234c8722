"""VQA's questions and annotations, written here in their published form."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from capfilt.data.image_sources import ImageFile
from capfilt.data.questions import read_questions
from capfilt.errors import UsageError

QUESTIONS = {
    "info": {"version": "2.0"}, "task_type": "Open-Ended", "data_type": "mscoco", "data_subtype": "val2014",
    "questions": [
        {"image_id": 262148, "question": "Where is he looking?", "question_id": 262148000},
        {"image_id": 262148, "question": "How many people?", "question_id": 262148001},
        {"image_id": 5, "question": "Is it red?", "question_id": 5000},
    ],
}  # fmt: skip


def annotation(question_id: int, image_id: int, answers: list[str], answer_type: str = "other") -> dict[str, Any]:
    return {
        "question_type": "how many", "answer_type": answer_type, "multiple_choice_answer": answers[0],
        "answers": [{"answer": a, "answer_confidence": "yes", "answer_id": n + 1} for n, a in enumerate(answers)],
        "image_id": image_id, "question_id": question_id,
    }  # fmt: skip


ANNOTATIONS = {
    "annotations": [
        annotation(262148001, 262148, ["2"] * 7 + ["3"] * 3, "number"),
        annotation(262148000, 262148, ["down"] * 10),
    ]
}


def write(path: Path, content: object) -> Path:
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def test_questions_with_their_answers(tmp_path: Path) -> None:
    questions = write(tmp_path / "questions.json", QUESTIONS)
    found = read_questions(questions, write(tmp_path / "annotations.json", ANNOTATIONS), tmp_path)
    assert [question.text for question in found] == ["Where is he looking?", "How many people?", "Is it red?"]
    assert found[1].answers is not None
    assert found[1].answers.texts == ("2",) * 7 + ("3",) * 3
    assert (found[1].answers.answer_type, found[1].answers.question_type) == ("number", "how many")
    assert found[2].answers is None
    assert found[0].image is found[1].image
    assert found[0].image == ImageFile(tmp_path / "COCO_val2014_000000262148.jpg")
    assert read_questions(questions)[0].image is None


@pytest.mark.parametrize(
    ("name", "subtype"),
    [
        ("val2014/COCO_val2014_000000000005.jpg", "val2014"),
        ("000000000005.jpg", "val2014"),
        ("test2015/COCO_test2015_000000000005.jpg", "test-dev2015"),
        ("000000000005.jpg", None),
    ],
)
def test_names_of_images(tmp_path: Path, name: str, subtype: str | None) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(b"")
    content = QUESTIONS | {"data_subtype": subtype}
    if subtype is None:
        del content["data_subtype"]
    assert read_questions(write(tmp_path / "q.json", content), images_dir=tmp_path)[2].image == ImageFile(
        tmp_path / name
    )


def test_a_name_of_its_own(tmp_path: Path) -> None:
    entry = {"image_id": "cat", "question": "Is it?", "question_id": "q1", "file_name": "sub/cat.png"}
    (found,) = read_questions(write(tmp_path / "q.json", {"questions": [entry]}), images_dir=tmp_path)
    assert (found.id, found.image_id, found.image) == ("q1", "cat", ImageFile(tmp_path / "sub" / "cat.png"))


@pytest.mark.parametrize(
    ("questions", "annotations", "said"),
    [
        ({"questions": []}, ANNOTATIONS, "has no questions"),
        (QUESTIONS, {"annotations": []}, "has no annotations"),
        ({"questions": QUESTIONS["questions"][:1] * 2}, ANNOTATIONS, r"questions\[1\] is a second question"),
        (QUESTIONS, {"annotations": ANNOTATIONS["annotations"][:1] * 2}, r"annotations\[1\] is a second entry"),
        (QUESTIONS, {"annotations": [annotation(5000, 6, ["a"] * 10)]}, "about image 5; its answers are about 6"),
        (QUESTIONS, {"annotations": [annotation(5000, 5, ["a"] * 9)]}, "has 9 answers; expected 10"),
        ({"questions": [{"image_id": "x", "question": "q", "question_id": 1}]}, ANNOTATIONS, "expected COCO's number"),
        (
            {"questions": [{"image_id": 1, "question": "q", "question_id": 1, "file_name": "/etc/passwd"}]},
            ANNOTATIONS,
            "expected a path below",
        ),
    ],
)
def test_files_that_are_refused(tmp_path: Path, questions: object, annotations: object, said: str) -> None:
    paths = write(tmp_path / "q.json", questions), write(tmp_path / "a.json", annotations)
    with pytest.raises(UsageError, match=said):
        read_questions(*paths, tmp_path)
