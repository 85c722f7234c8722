"""Questions about images with people's answers, as a dataset for `iterate_batches`.

In: files in VQA's form (`capfilt.data.questions`) and folders of images. Out: a row for each question. An epoch shows
each question once, with the answer of one of the people, drawn anew: an answer that many gave is drawn as often as
they are many. Pictures are decoded once where all of them fit into memory as uint8, else when their batch comes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from capfilt.data.commit import file_sha256
from capfilt.data.image_sources import ImageFile
from capfilt.data.images import ImageRefused, decode_image
from capfilt.data.questions import Question, read_questions
from capfilt.errors import UsageError
from capfilt.progress import Progress
from capfilt.train.batches import View
from capfilt.train.pictures import MEMORY_LIMIT_BYTES, Pictures


@dataclass(frozen=True)
class QuestionFiles:
    """Questions, people's answers to them, and the folder of their images."""

    questions: Path
    annotations: Path
    images_dir: Path


def read_question_pairs(
    files: Sequence[QuestionFiles],
    *,
    image_size_px: int,
    smallest_crop: float = 1.0,
    memory_limit_bytes: int = MEMORY_LIMIT_BYTES,
    progress: Progress | None = None,
) -> QuestionPairs:
    """The questions of all files; size, crop and limit are those of `Pictures`.

    Raises UsageError where a question has no answers, no image, or the id of another one.
    """
    questions: dict[str, Question] = {}
    for part in files:
        for question in read_questions(part.questions, part.annotations, part.images_dir):
            if str(question.id) in questions:
                raise UsageError(
                    f"{part.questions} has the question {question.id!r}, which another file has too; expected each "
                    "once. Give each file once."
                )
            questions[str(question.id)] = question
    return QuestionPairs(
        list(questions.values()), image_size_px=image_size_px, smallest_crop=smallest_crop,
        memory_limit_bytes=memory_limit_bytes, progress=progress,
    )  # fmt: skip


class QuestionPairs:
    """A dataset of questions, whose captions are answers; see `PairDataset`."""

    def __init__(
        self,
        questions: Sequence[Question],
        *,
        image_size_px: int,
        smallest_crop: float = 1.0,
        memory_limit_bytes: int = MEMORY_LIMIT_BYTES,
        progress: Progress | None = None,
    ) -> None:
        """Size, crop and limit are those of `Pictures`.

        Raises UsageError where one of the questions has no answers, or its image is not there."""
        self.keys: Sequence[str] = [str(question.id) for question in questions]
        self._texts = [question.text for question in questions]
        self._answers = _answers_of(questions)
        self._files, self._image_of_row = _images_of(questions)
        _, first = np.unique(self._image_of_row, return_index=True)
        self.image_rows: np.ndarray = first[self._image_of_row]
        self.image_ids = self.image_rows
        """int64 (rows,): the first row about the same image."""
        files = self._files
        self.pictures = Pictures(
            len(files), lambda number: partial(_decode, files[number]), image_size_px=image_size_px,
            smallest_crop=smallest_crop, memory_limit_bytes=memory_limit_bytes, progress=progress,
        )  # fmt: skip

    def question_of(self, row: int) -> str:
        """The question, as its file has it."""
        return self._texts[row]

    def captions_of(self, row: int) -> list[str]:
        """The answers, one of each person."""
        return list(self._answers[row])

    def order(self, seed: int, epoch: int, num_ranks: int = 1, batch_size: int = 1) -> np.ndarray:
        return np.random.default_rng((seed, epoch)).permutation(len(self.keys))

    def place_of(self, row: int) -> str:
        return self.keys[row]

    def open(self) -> None:
        self.pictures.open()

    def release(self) -> None:
        pass

    def read_pixels(self, rows: np.ndarray, views: Sequence[View] | None) -> np.ndarray:
        return self.pictures.read(self._image_of_row[rows], views)

    def digest(self) -> str:
        """sha256 over questions, answers, and the images' names and sizes: a training goes on only with the same."""
        digest = hashlib.sha256()
        for row in zip(self.keys, self._texts, self._answers, self._image_of_row.tolist(), strict=True):
            digest.update(json.dumps(row).encode())
        for file in self._files:
            digest.update(json.dumps([file.path.name, file.path.stat().st_size]).encode())
        return digest.hexdigest()

    def images_digest(self) -> str:
        """sha256 over the content of the images, in order; reads all of them."""
        digests = (file_sha256(file.path) for file in self._files)
        return hashlib.sha256(json.dumps(list(digests)).encode()).hexdigest()


def _decode(file: ImageFile) -> Image.Image:
    try:
        return decode_image(file.read())
    except (ImageRefused, OSError) as error:
        raise UsageError(
            f"The image {file.name} cannot be read: {error}. Fetch it again, or take its questions out."
        ) from error


def _answers_of(questions: Sequence[Question]) -> list[tuple[str, ...]]:
    """The answers that are not blank, for each question."""
    found: list[tuple[str, ...]] = []
    without: list[str] = []
    for question in questions:
        given = () if question.answers is None else question.answers.texts
        found.append(tuple(text.strip() for text in given if text.strip()))
        if not found[-1]:
            without.append(repr(question.id))
    if without:
        raise UsageError(
            f"{len(without):,} of {len(questions):,} questions have no answers, the first {', '.join(without[:3])}; "
            "expected answers to each. Give the annotations of the same questions."
        )
    return found


def _images_of(questions: Sequence[Question]) -> tuple[list[ImageFile], np.ndarray]:
    """The different images in the order of their first questions, and the number of each question's."""
    numbers: dict[ImageFile, int] = {}
    of_row: list[int] = []
    for question in questions:
        assert question.image is not None, "a folder of images was named"
        of_row.append(numbers.setdefault(question.image, len(numbers)))
    if missing := [file for file in numbers if not file.path.is_file()]:
        raise UsageError(
            f"{len(missing):,} of {len(numbers):,} images are not there, the first {missing[0].name}. Give the folder "
            "that holds them: --images DIR."
        )
    return list(numbers), np.array(of_row, np.int64)
