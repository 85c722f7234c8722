"""`evaluate vqa` as a function: accuracies by hand, and what is said of questions that do not count."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from capfilt.data.image_sources import ImageFile
from capfilt.data.images import decode_image
from capfilt.data.questions import Answers, Question
from capfilt.errors import UsageError
from capfilt.evaluate.vqa import answer_questions, check_inputs, evaluate_answerer, evaluate_answers
from capfilt.evaluate.writers import load_writer
from capfilt.settings import GenerationSettings

CPU = GenerationSettings(device="cpu", dtype="float32")


def people(same: str, num: int, answer_type: str, question_type: str) -> Answers:
    return Answers((same,) * num + ("never said",) * (10 - num), answer_type, question_type)


QUESTIONS = [
    Question(10, 1, "Is it red?", people("yes", 10, "yes/no", "is it")),
    Question(11, 1, "How many dogs?", people("2", 2, "number", "how many")),
    Question(12, 1, "Is it blue?", people("no", 1, "yes/no", "is it")),
    Question(13, 2, "Where?"),
    Question(14, 2, "Why?", people("so", 10, "other", "why")),
]


def test_accuracy_overall_and_by_type() -> None:
    found = evaluate_answers(QUESTIONS, {10: "Yes.", 11: "two", 12: "no", 13: "here", 99: "x"})
    assert found.accuracy == pytest.approx(100 * (1.0 + 0.6 + 0.3) / 3)
    assert found.by_answer_type == pytest.approx({"number": 60.0, "yes/no": 65.0})
    assert found.by_question_type == pytest.approx({"how many": 60.0, "is it": 65.0})
    assert (found.num_scored, found.num_questions, found.exit_code) == (3, 5, 1)
    assert (found.without_answer, found.without_annotation, found.unknown) == ([14], [13], [99])
    assert found.line() == "accuracy 63.33 (number 60.00, yes/no 65.00): 3 of 5 questions"
    with pytest.raises(UsageError, match="the answers are to 7, …, the questions are 10, …"):
        evaluate_answers(QUESTIONS, {7: "x"})


@pytest.fixture
def questions(pictures_dir: Path) -> list[Question]:
    sources = [ImageFile(pictures_dir / name) for name in ("0.png", "1.png", "broken.png")]
    known = people("red", 10, "other", "what color")
    texts = ["what color is the square", "what is on the left", "what is here"]
    return [Question(10 * n + m, n, text, known, sources[n]) for n in range(3) for m, text in enumerate(texts)]


def test_a_model_from_questions_to_accuracy(writers_dir: Path, questions: list[Question], tmp_path: Path) -> None:
    results = tmp_path / "answers.json"
    writer = load_writer(writers_dir / "opt", "answer", CPU)
    found = evaluate_answerer(writer, questions, results=results)
    saved = {entry["question_id"]: entry["answer"] for entry in json.loads(results.read_text())}
    assert list(saved) == [0, 1, 2, 10, 11, 12]
    assert saved == answer_questions(writer, questions).texts
    assert [entry.id for entry in found.unusable] == [20, 21, 22]
    assert (found.num_scored, found.without_answer, found.exit_code) == (6, [], 1)
    assert found.accuracy == evaluate_answers(questions, saved).accuracy
    assert found.model["prompt"] == "Question: {} Answer:"
    reference = load_writer(writers_dir / "opt", "answer", CPU)
    for question in questions[:6]:
        picture = writer.prepare(_open(question.image))
        assert saved[question.id] == reference.write([picture], ["x"], [question.text])[0]


def _open(source: ImageFile | None) -> Image.Image:
    assert source is not None
    return decode_image(source.read())


def test_questions_of_a_test_set_are_answered_and_saved(
    writers_dir: Path, questions: list[Question], tmp_path: Path
) -> None:
    bare = [Question(q.id, q.image_id, q.text, None, q.image) for q in questions[:3]]
    writer = load_writer(writers_dir / "t5", "answer", CPU)
    found = evaluate_answerer(writer, bare, results=tmp_path / "answers.json")
    assert (found.accuracy, found.exit_code) == (None, 0)
    assert found.line() == "no annotations, no accuracy: 3 questions answered"
    for call, said in (
        (lambda: check_inputs(bare), "Give --annotations FILE, or --save-results FILE"),
        (lambda: check_inputs(QUESTIONS), "Give --images DIR"),
        (lambda: evaluate_answerer(writer, questions[6:]), "None of 3 questions could be answered"),
    ):
        with pytest.raises(UsageError, match=said):
            call()
