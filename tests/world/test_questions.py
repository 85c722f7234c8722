"""Questions about scenes in VQA's files: what evaluation and training read, with answers that are right."""

from __future__ import annotations

from pathlib import Path

from capfilt.data.images import decode_image
from capfilt.data.questions import read_questions
from capfilt.world.lexicon import KIND_NOUNS
from capfilt.world.questions import write_world_questions
from capfilt.world.scenes import draw_scene


def test_the_files_are_vqas_and_the_answers_are_right(tmp_path: Path) -> None:
    write_world_questions(tmp_path, 80, first_seed=300, split="test", questions_per_scene=3)
    found = read_questions(tmp_path / "questions.json", tmp_path / "annotations.json", tmp_path / "images")
    assert 80 < len(found) <= 240
    assert len({(question.image_id, question.text) for question in found}) == len(found)
    kinds = {nouns[0][1]: kind for kind, nouns in KIND_NOUNS.items()}
    types = set()
    for question in found:
        scene = draw_scene(300 + int(question.image_id), "test")
        assert question.answers is not None
        assert question.image is not None
        decode_image(question.image.read())
        (answer,) = set(question.answers.texts)
        types.add(question.answers.answer_type)
        words = question.text.removesuffix("?").split()
        if words[:3] == ["do", "you", "see"]:
            assert answer == ("yes" if kinds[words[-1]] in {group.kind for group in scene.groups} else "no")
            assert question.answers.answer_type == "yes/no"
        if words[:2] == ["how", "many"]:
            (count,) = {group.count for group in scene.groups if group.kind == kinds[words[2]]}
            assert answer == ("one", "two", "three", "four", "five")[count - 1]
            assert (question.answers.answer_type, question.answers.question_type) == ("number", "how many")
    assert types == {"yes/no", "number", "other"}


def test_the_same_seeds_give_the_same_files(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_world_questions(tmp_path / name, 5)
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.*"))
    assert len(files) == 7
    assert all((tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes() for file in files)
