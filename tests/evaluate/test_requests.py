"""Images and prompts as they are named on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from capfilt.errors import UsageError
from capfilt.evaluate.requests import expand_images, read_image_prompts, read_prompts, request_texts


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "sub").mkdir()
    for name in ("b.JPG", "a.png", "notes.txt", "sub/c.webp", "odd", "w[1].png"):
        (tmp_path / name).write_bytes(b"")
    return tmp_path


def names(folder: Path, *given: str) -> list[str]:
    return [str(path.relative_to(folder)) for path in expand_images([str(folder / name) for name in given])]


def test_files_folders_and_patterns(folder: Path) -> None:
    assert names(folder, "") == ["a.png", "b.JPG", "w[1].png", "sub/c.webp"]
    assert names(folder, "odd", "a.png", "a.png") == ["odd", "a.png", "a.png"]
    assert names(folder, "*.png", "sub") == ["a.png", "w[1].png", "sub/c.webp"]
    assert names(folder, "**/*.webp") == ["sub/c.webp"]
    assert names(folder, "w[1].png") == ["w[1].png"]  # a file that is there is no pattern
    assert names(folder, "a.png", "none.png") == ["a.png", "none.png"]


@pytest.mark.parametrize(
    ("name", "said"), [("none.png", "is not there"), ("*.gif", "No file matches"), ("empty", "holds no images")]
)
def test_names_of_nothing(folder: Path, name: str, said: str) -> None:
    (folder / "empty").mkdir()
    with pytest.raises(UsageError, match=said):
        expand_images([str(folder / name)])


def test_every_prompt_for_every_image() -> None:
    found = [(str(r.id), r.prompt) for r in request_texts([Path("a"), Path("b")], ["x", "y"])]
    assert found == [("a", "x"), ("a", "y"), ("b", "x"), ("b", "y")]
    assert [r.prompt for r in request_texts([Path("a")], [])] == [""]


def test_files_of_prompts(tmp_path: Path) -> None:
    plain, lines = tmp_path / "prompts.txt", tmp_path / "prompts.jsonl"
    plain.write_text("what color?\n\n where? \r\n")
    assert read_prompts(plain) == ["what color?", "where?"]
    lines.write_text("\n".join(json.dumps({"image": f"{n}.png", "prompt": f"p{n}"}) for n in range(2)) + "\n\n")
    assert [(r.id, r.prompt) for r in read_image_prompts(lines)] == [("0.png", "p0"), ("1.png", "p1")]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("\n", "has no lines"),
        ('{"image": "a"}', "line 1 has no 'prompt'"),
        ('{"image": "a", "prompt": "x"}\n{', "line 2 is not JSON"),
        ('{"image": 7, "prompt": "x"}', "has 'image' 7; expected a text"),
        ("[1]", "expected an object with 'image'"),
    ],
)
def test_lines_that_are_refused(tmp_path: Path, content: str, said: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(content)
    with pytest.raises(UsageError, match=said):
        read_image_prompts(path)
    path.write_bytes(b"\xff")
    with pytest.raises(UsageError, match="not text in UTF-8"):
        read_prompts(path)
