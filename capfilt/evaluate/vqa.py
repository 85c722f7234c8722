"""How well questions about images are answered: by a model, or by a results file, against ten people's answers.

In: questions (`capfilt.data.questions`) and a writer, or answers by question id. Out: VQA accuracy in percent, overall,
by type of answer and of question, and every question that is not in it, with why.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from capfilt.data.json_lists import Id
from capfilt.data.questions import Question
from capfilt.data.result_files import write_answer_results
from capfilt.errors import UsageError
from capfilt.evaluate.generation import (
    Generated,
    Unusable,
    check_results_path,
    refuse_nothing_written,
    write_data_set,
)
from capfilt.evaluate.streaming import Request, TextWriter
from capfilt.evaluate.vqa_accuracy import answer_accuracy
from capfilt.progress import Progress

_NO_FOLDER = "Questions are to be answered, but no folder of images is named. Give --images DIR."


@dataclass(frozen=True, kw_only=True)
class VqaEvaluation:
    """VQA accuracy, and what it is of."""

    accuracy: float | None
    """In percent; None where no answers are published."""
    by_answer_type: dict[str, float]
    by_question_type: dict[str, float]
    num_scored: int
    """Questions that have both an answer of the model and people's; the figures are of them."""
    num_questions: int
    without_answer: list[Id]
    """Questions of which the results have no answer."""
    without_annotation: list[Id]
    """Questions of which the annotations have no answers."""
    unknown: list[Id]
    """Ids of the results that the questions file does not have."""
    unusable: list[Unusable] = field(default_factory=list)
    """Questions whose image could not be read or worked on."""
    model: dict[str, Any] = field(default_factory=dict)
    """Model, prompt and decoding; empty for the answers of a file."""

    @property
    def exit_code(self) -> int:
        """0, or 1 where the figures are not of all questions."""
        return int(bool(self.without_answer or self.without_annotation or self.unknown or self.unusable))

    def line(self) -> str:
        """The summary."""
        if self.accuracy is None:
            return f"no annotations, no accuracy: {self.num_questions - len(self.unusable):,} questions answered"
        types = ", ".join(f"{name} {value:.2f}" for name, value in self.by_answer_type.items())
        return f"accuracy {self.accuracy:.2f} ({types}): {self.num_scored:,} of {self.num_questions:,} questions"


def evaluate_answers(questions: Sequence[Question], answers: Mapping[Id, str]) -> VqaEvaluation:
    """Score answers by question id, over the questions that have both. UsageError where no id is in both."""
    known = {question.id: question for question in questions}
    if not known.keys() & answers.keys():
        named, expected = next(iter(answers), None), next(iter(known), None)
        raise UsageError(
            f"No question has both: the answers are to {named!r}, …, the questions are {expected!r}, …. "
            "Give files of the same questions."
        )
    scores: list[float] = []
    by_answer_type: dict[str, list[float]] = {}
    by_question_type: dict[str, list[float]] = {}
    for key, answer in answers.items():
        if key not in known or (people := known[key].answers) is None:
            continue
        scores.append(answer_accuracy(answer, people.texts))
        by_answer_type.setdefault(people.answer_type, []).append(scores[-1])
        by_question_type.setdefault(people.question_type, []).append(scores[-1])
    return VqaEvaluation(
        accuracy=_percent(scores) if scores else None,
        by_answer_type={name: _percent(own) for name, own in sorted(by_answer_type.items())},
        by_question_type={name: _percent(own) for name, own in sorted(by_question_type.items())},
        num_scored=len(scores),
        num_questions=len(known),
        without_answer=[key for key in known if key not in answers],
        without_annotation=[key for key, question in known.items() if question.answers is None],
        unknown=[key for key in answers if key not in known],
    )


def answer_questions(
    writer: TextWriter,
    questions: Sequence[Question],
    results: Path | None = None,
    progress: Progress | None = None,
) -> Generated:
    """Answer the questions, and write VQA's results file where one is named.

    Raises UsageError where a question has no image, FingerprintMismatchError and RunLockedError as `write_all`.
    """
    requests = [Request(q.id, q.image, q.text) for q in questions if q.image is not None]
    if len(requests) < len(questions):
        raise UsageError(_NO_FOLDER)
    return write_data_set(writer, requests, results, write_answer_results, progress, unit="question")


def check_inputs(questions: Sequence[Question], results: Path | None = None) -> None:
    """Raises UsageError for what would fail after the answers are written; call it before a model is loaded."""
    if any(question.image is None for question in questions):
        raise UsageError(_NO_FOLDER)
    check_results_path(results)
    if results is None and not any(question.answers for question in questions):
        raise UsageError("No question has answers to compare with. Give --annotations FILE, or --save-results FILE.")


def evaluate_answerer(
    writer: TextWriter,
    questions: Sequence[Question],
    *,
    results: Path | None = None,
    progress: Progress | None = None,
) -> VqaEvaluation:
    """Answer the questions and score the answers; where none has published answers, they are only written."""
    check_inputs(questions, results)
    has_answers = any(question.answers for question in questions)
    generated = answer_questions(writer, questions, results, progress)
    refuse_nothing_written(generated, "questions could be answered")
    found = evaluate_answers(questions, generated.texts)
    unusable = {entry.id for entry in generated.unusable}
    left = [key for key in found.without_answer if key not in unusable]
    without = found.without_annotation if has_answers else []
    parts = {"without_answer": left, "without_annotation": without, "unusable": generated.unusable}
    return VqaEvaluation(**{**vars(found), **parts, "model": generated.fields})


def _percent(scores: Iterable[float]) -> float:
    values = list(scores)
    return 100 * sum(values) / len(values)
