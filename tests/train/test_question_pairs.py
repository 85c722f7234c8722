"""Questions as a dataset: answers drawn as often as people gave them, pictures once for each image."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from capfilt.data.image_sources import ImageFile
from capfilt.data.questions import Answers, Question
from capfilt.errors import UsageError
from capfilt.settings import TrainSettings
from capfilt.train.batches import iterate_batches, to_square
from capfilt.train.question_pairs import QuestionFiles, QuestionPairs, read_question_pairs
from capfilt.world.questions import write_world_questions
from tests.train import small_models


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> QuestionFiles:
    folder = tmp_path_factory.mktemp("questions")
    write_world_questions(folder, 10, questions_per_scene=3)
    return QuestionFiles(folder / "questions.json", folder / "annotations.json", folder / "images")


@pytest.fixture
def one_image(tmp_path: Path) -> ImageFile:
    Image.fromarray(small_models.draw_square("red", "left", 1)).save(tmp_path / "red.png")
    return ImageFile(tmp_path / "red.png")


def test_an_answer_is_drawn_as_often_as_people_gave_it(one_image: ImageFile) -> None:
    people = Answers(("red",) * 6 + (" maroon ",) * 3 + ("",), "other", "what color")
    questions = [Question(number, 1, "what color is it?", people, one_image) for number in range(2)]
    dataset = QuestionPairs(questions, image_size_px=8)
    batches = iterate_batches(dataset, TrainSettings(batch_size=2), with_pixels=False)
    drawn = Counter(text for _ in range(1500) for text in next(batches).texts)
    assert drawn.keys() == {"red", "maroon"}
    assert drawn["red"] / drawn.total() == pytest.approx(2 / 3, abs=0.03)


@pytest.mark.parametrize("memory_limit_bytes", [1 << 30, 0])
def test_pictures_questions_and_answers_belong_together(files: QuestionFiles, memory_limit_bytes: int) -> None:
    dataset = read_question_pairs([files], image_size_px=24, memory_limit_bytes=memory_limit_bytes)
    asked = json.loads(files.questions.read_text())["questions"]
    known = {
        a["question_id"]: a["multiple_choice_answer"] for a in json.loads(files.annotations.read_text())["annotations"]
    }
    assert dataset.keys == [str(entry["question_id"]) for entry in asked]
    rows = np.array([4, 0, 7])
    dataset.open()
    pixels = dataset.read_pixels(rows, None)
    for place, row in enumerate(rows.tolist()):
        picture = Image.open(files.images_dir / asked[row]["file_name"]).convert("RGB")
        assert np.array_equal(pixels[place], to_square(picture, 24))
        assert dataset.question_of(row) == asked[row]["question"]
        assert dataset.captions_of(row) == [known[asked[row]["question_id"]]] * 10
        first = next(n for n, entry in enumerate(asked) if entry["image_id"] == asked[row]["image_id"])
        assert dataset.image_rows[row] == first
    assert sorted(dataset.order(0, 3).tolist()) == list(range(len(asked)))


def test_digests_are_of_what_is_trained_on(files: QuestionFiles, one_image: ImageFile, tmp_path: Path) -> None:
    first, again = (read_question_pairs([files], image_size_px=24) for _ in range(2))
    assert (first.digest(), first.images_digest()) == (again.digest(), again.images_digest())
    yes, no = (Answers((answer,) * 10, "yes/no", "is it") for answer in ("yes", "no"))
    one, other = (QuestionPairs([Question(1, 1, "is it red?", a, one_image)], image_size_px=8) for a in (yes, no))
    assert one.digest() != other.digest()
    assert one.images_digest() == other.images_digest()


def test_what_cannot_be_trained_on_is_refused(files: QuestionFiles, one_image: ImageFile, tmp_path: Path) -> None:
    people = Answers(("red",) * 10, "other", "what color")
    (tmp_path / "text.png").write_text("no picture")
    text, gone = ImageFile(tmp_path / "text.png"), ImageFile(tmp_path / "gone.png")
    with pytest.raises(UsageError, match=r"1 of 2 questions have no answers, the first 8; expected answers to each"):
        QuestionPairs([Question(7, 1, "a?", people, one_image), Question(8, 1, "b?", None, one_image)], image_size_px=8)
    with pytest.raises(UsageError, match=r"1 of 2 images are not there, the first .*gone\.png\. Give the folder"):
        QuestionPairs([Question(7, 1, "a?", people, one_image), Question(8, 2, "b?", people, gone)], image_size_px=8)
    with pytest.raises(UsageError, match=r"The image .*text\.png cannot be read: .*Fetch it again"):
        QuestionPairs([Question(7, 1, "a?", people, text)], image_size_px=8).read_pixels(np.array([0]), None)
    with pytest.raises(UsageError, match="has the question 0, which another file has too"):
        read_question_pairs([files, files], image_size_px=24)
