"""The texts of a whole data set: kept as they come, and taken up again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL.Image import Image

from capfilt.data.image_sources import ImageFile
from capfilt.data.result_files import write_answer_results, write_caption_results
from capfilt.errors import FingerprintMismatchError, RunLockedError, UsageError
from capfilt.evaluate.generation import Unusable, check_results_path, partial_path, write_all
from capfilt.evaluate.streaming import Request


class Interruptible:
    """Writes prompts in capitals, and is interrupted at its n-th batch."""

    batch_size = 2

    def __init__(self, interrupted_at: int = 99, **fields: Any) -> None:
        self.fields: dict[str, Any] = {"model": "owner/name", **fields}
        self.asked: list[str] = []
        self._left = interrupted_at

    def prepare(self, image: Image) -> Image:
        return image

    def write(self, pictures: Sequence[Any], keys: Sequence[str], prompts: Sequence[str]) -> list[str | None]:
        self._left -= 1
        if not self._left:
            raise KeyboardInterrupt
        self.asked += prompts
        return [prompt.upper() for prompt in prompts]


@pytest.fixture
def requests(pictures_dir: Path) -> list[Request]:
    names = ["0.png", "1.png", "2.png", "broken.png", "3.png", "4.png"]
    return [Request(n if n else "x", ImageFile(pictures_dir / name), f"p{n}é") for n, name in enumerate(names)]


TEXTS = {"x": "P0É", 1: "P1É", 2: "P2É", 4: "P4É", 5: "P5É"}


def test_all_texts_and_what_is_unusable(requests: list[Request], pictures_dir: Path) -> None:
    found = write_all(Interruptible(), requests)
    assert found.texts == TEXTS
    (broken,) = found.unusable
    assert (broken.id, broken.image) == (3, str(pictures_dir / "broken.png"))
    assert "truncated_image" in broken.reason
    assert isinstance(broken, Unusable)


def test_an_interrupted_command_goes_on(requests: list[Request], tmp_path: Path) -> None:
    results = tmp_path / "results.json"
    with pytest.raises(KeyboardInterrupt):
        write_all(Interruptible(interrupted_at=3), requests, results)
    kept = partial_path(results)
    assert [json.loads(line)["text"] for line in kept.read_text().splitlines()[1:]] == ["P0É", "P1É", "P2É"]
    with open(kept, "a", encoding="utf-8") as file:
        file.write('{"id": 4, "te')  # as a crash leaves it
    second = Interruptible()
    found = write_all(second, requests, results)
    assert found.texts == TEXTS
    assert list(found.texts) == list(TEXTS)
    assert second.asked == ["p4é", "p5é"]
    assert [entry.id for entry in found.unusable] == [3]  # tried again
    third = Interruptible()
    assert write_all(third, requests, results).texts == TEXTS
    assert third.asked == []


def test_what_another_model_or_other_images_began_is_not_mixed(requests: list[Request], tmp_path: Path) -> None:
    results = tmp_path / "results.json"
    write_all(Interruptible(), requests, results)
    with pytest.raises(FingerprintMismatchError, match="another model, other settings"):
        write_all(Interruptible(num_beams=5), requests, results)
    with pytest.raises(FingerprintMismatchError):
        write_all(Interruptible(), requests[1:], results)
    (tmp_path / "model").mkdir()
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(b"1")
    trained, other = Interruptible(model=str(weights.parent)), tmp_path / "other.json"
    write_all(trained, requests, other)
    assert write_all(trained, requests, other).texts == TEXTS
    weights.write_bytes(b"another")
    with pytest.raises(FingerprintMismatchError):
        write_all(trained, requests, other)
    partial_path(results).write_text("x\n")
    with pytest.raises(UsageError, match="Remove it to begin anew"):
        write_all(Interruptible(), requests, results)


def test_two_commands_do_not_write_one_file(requests: list[Request], tmp_path: Path) -> None:
    results = tmp_path / "results.json"

    class Nested(Interruptible):
        def write(self, pictures: Sequence[Any], keys: Sequence[str], prompts: Sequence[str]) -> list[str | None]:
            with pytest.raises(RunLockedError, match="Another command is writing"):
                write_all(Interruptible(), requests, results)
            return super().write(pictures, keys, prompts)

    assert write_all(Nested(), requests, results).texts == TEXTS


def test_where_results_cannot_be_written(tmp_path: Path) -> None:
    check_results_path(None)
    check_results_path(tmp_path / "x.json")
    for path in (tmp_path, tmp_path / "none" / "x.json"):
        with pytest.raises(UsageError, match="cannot be written"):
            check_results_path(path)


@pytest.mark.parametrize("content", [b"\xff\xd8\xff\xe0", b'{"annotations": []}', b'[{"caption": "a"}]', b"[[]]", b" "])
def test_another_file_is_not_replaced(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(UsageError, match="no results file; it would be lost"):
        check_results_path(tmp_path / "x.json")


def test_results_are_replaced(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    for write in (write_caption_results, write_answer_results):
        for texts in ({1: "a dog"}, {}):
            write(path, texts)
            check_results_path(path)
    path.write_text("")
    check_results_path(path)
