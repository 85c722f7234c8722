"""VQA's files: questions and the answers that people gave (Goyal et al. 2017, VQAv2).

In: the questions JSON and, where answers are known, the annotations JSON. Out: `Question`s in the order of the file.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from capfilt.data.image_sources import ImageFile, check_images_dir, find_image
from capfilt.data.json_lists import Entry, Id, read_entries
from capfilt.errors import UsageError

NUM_ANSWERS = 10
"""People who answered each question."""


@dataclass(frozen=True, slots=True)
class Answers:
    """What people answered to a question."""

    texts: tuple[str, ...]
    """One of each person; VQAv2 has ten."""
    answer_type: str
    """yes/no, number or other."""
    question_type: str
    """How the question begins: "how many", …"""


@dataclass(frozen=True, slots=True)
class Question:
    """A question about an image."""

    id: Id
    image_id: Id
    text: str
    answers: Answers | None = None
    """None where they are not published, as for the test sets."""
    image: ImageFile | None = None
    """None where no folder of images was given."""


def read_questions(questions: Path, annotations: Path | None = None, images_dir: Path | None = None) -> list[Question]:
    """The questions of a file, each with its answers where an annotations file is given.

    An image is looked for under the names that COCO gives it, COCO_SUBTYPE_000000000001.jpg (`data_subtype`) and
    000000000001.jpg, also in a folder SUBTYPE; or under a question's own `file_name`.

    Raises UsageError where an entry is not as expected, or a question has answers of another image.
    """
    check_images_dir(images_dir)
    answers = {} if annotations is None else read_answers(annotations)
    subtype = _read_subtype(questions)
    found: dict[Id, Question] = {}
    sources: dict[Id, ImageFile | None] = {}
    for entry in read_entries(questions, {"questions"}):
        key, image_id = entry.id("question_id"), entry.id("image_id")
        if key in found:
            raise UsageError(f"{entry.where} is a second question with the id {key!r}; expected each once.")
        name = entry.optional_text("file_name")
        source_key = image_id if name is None else name
        if source_key not in sources:
            names = [name] if name else _coco_names(entry, image_id, subtype)
            sources[source_key] = find_image(images_dir, names, entry.where)
        image, known = sources[source_key], _answers_of(entry, key, image_id, answers)
        found[key] = Question(key, image_id, entry.text("question"), known, image)
    if not found:
        raise UsageError(f"{questions} has no questions; expected VQA's form: a list `questions`.")
    return list(found.values())


def read_answers(path: Path) -> dict[Id, tuple[Id, Answers]]:
    """Image id and answers by question id, from an annotations file."""
    found: dict[Id, tuple[Id, Answers]] = {}
    for entry in read_entries(path, {"annotations"}):
        key = entry.id("question_id")
        if key in found:
            raise UsageError(f"{entry.where} is a second entry with the question_id {key!r}; expected each once.")
        given = entry.list("answers")
        if len(given) != NUM_ANSWERS:
            raise UsageError(f"{entry.where} has {len(given)} answers; expected {NUM_ANSWERS}.")
        texts = (entry.part("answers", n, item).text("answer") for n, item in enumerate(given))
        answers = Answers(
            texts=tuple(map(sys.intern, texts)),  # most are said again and again
            answer_type=sys.intern(entry.text("answer_type")),
            question_type=sys.intern(entry.text("question_type")),
        )
        found[key] = entry.id("image_id"), answers
    if not found:
        raise UsageError(f"{path} has no annotations; expected VQA's form: a list `annotations`.")
    return found


def _answers_of(entry: Entry, key: Id, image_id: Id, answers: Mapping[Id, tuple[Id, Answers]]) -> Answers | None:
    if key not in answers:
        return None
    of_image, known = answers[key]
    if of_image != image_id:
        raise UsageError(f"{entry.where} is about image {image_id!r}; its answers are about {of_image!r}.")
    return known


def _read_subtype(path: Path) -> str:
    """`data_subtype`, such as val2014; test-dev2015 has the images of test2015."""
    for entry in read_entries(path, {"data_subtype"}):
        name = entry.checked_text("data_subtype", entry.value)
        return name.replace("test-dev", "test")
    return ""


def _coco_names(entry: Entry, image_id: Id, subtype: str) -> list[str]:
    if isinstance(image_id, str):
        raise UsageError(f"{entry.where} has the image_id {image_id!r}; expected COCO's number, or a `file_name`.")
    plain = f"{image_id:012d}.jpg"
    named = f"COCO_{subtype}_{plain}"
    return [named, f"{subtype}/{named}", plain, f"{subtype}/{plain}"] if subtype else [plain]
