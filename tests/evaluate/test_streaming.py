"""Requests through a writer, batch by batch."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL.Image import Image

from capfilt.data.image_sources import ImageFile
from capfilt.evaluate.requests import expand_images, request_texts
from capfilt.evaluate.streaming import NOT_FINITE, Request, write_texts
from capfilt.evaluate.writers import load_writer
from capfilt.settings import GenerationSettings
from tests import factories


class Recorder:
    """A writer that says what it was given: the picture's size, and what it was asked."""

    batch_size = 3
    fields: dict[str, Any] = {}

    def __init__(self, most_at_once: int = 99) -> None:
        self.batches: list[int] = []
        self.num_prepared = 0
        self._most = most_at_once

    def prepare(self, image: Image) -> tuple[int, int]:
        self.num_prepared += 1
        return image.size

    def write(self, pictures: Sequence[Any], keys: Sequence[str], prompts: Sequence[str]) -> list[str | None]:
        if len(pictures) > self._most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.batches.append(len(pictures))
        return [
            None if prompt == "nan" else f"{size[0]} {prompt}" for size, prompt in zip(pictures, prompts, strict=True)
        ]


@pytest.fixture
def requests(pictures_dir: Path) -> list[Request]:
    return list(request_texts([pictures_dir / f"{n}.png" for n in (0, 1, 2, 3, 4)], []))


def test_texts_come_in_order_and_in_batches(requests: list[Request]) -> None:
    writer = Recorder()
    found = list(write_texts(writer, requests))
    assert [written.text for written in found] == ["40 ", "41 ", "42 ", "43 ", "44 "]
    assert writer.batches == [3, 2]
    assert [written.request for written in found] == requests


def test_what_cannot_be_used_takes_its_own_place_alone(pictures_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "text.jpg").write_text("no picture")
    os.mkfifo(tmp_path / "pipe.png")
    paths = [pictures_dir / "0.png", pictures_dir / "broken.png", tmp_path / "text.jpg", tmp_path / "none.jpg"]
    paths += [tmp_path / "pipe.png", pictures_dir / "1.png"]
    found = list(write_texts(Recorder(), request_texts(paths, [])))
    assert [written.text for written in found] == ["40 ", None, None, None, None, "41 "]
    problems = [written.problem or "" for written in found]
    for problem, said in zip(
        problems, ["", "truncated_image", "not_an_image", "No such file", "no plain file", ""], strict=True
    ):
        assert said in problem
        assert bool(said) == bool(problem)


def test_a_batch_of_which_nothing_can_be_used(pictures_dir: Path) -> None:
    writer = Recorder()
    paths = [
        pictures_dir / "broken.png",
        pictures_dir / "none.png",
        pictures_dir / "broken.png",
        pictures_dir / "1.png",
    ]
    assert [written.text for written in write_texts(writer, request_texts(paths, []))] == [None, None, None, "41 "]
    assert writer.batches == [1]


def test_an_image_with_several_prompts_is_decoded_once(pictures_dir: Path) -> None:
    writer = Recorder()
    requests = request_texts([pictures_dir / "0.png", pictures_dir / "1.png"], ["a", "b", "nan"])
    found = list(write_texts(writer, requests, batch_size=6))
    assert [written.text for written in found] == ["40 a", "40 b", None, "41 a", "41 b", None]
    assert found[2].problem == NOT_FINITE
    assert writer.num_prepared == 2


def test_a_batch_that_is_too_large_is_halved(requests: list[Request]) -> None:
    writer = Recorder(most_at_once=1)
    assert [written.text for written in write_texts(writer, requests, 5)] == ["40 ", "41 ", "42 ", "43 ", "44 "]
    with pytest.raises(torch.OutOfMemoryError):
        list(write_texts(Recorder(most_at_once=0), requests))


def test_requests_are_taken_as_they_are_needed(pictures_dir: Path) -> None:
    """Two batches are under way at most: of a stream without end the first texts come."""
    taken = 0

    def endless() -> Iterator[Request]:
        nonlocal taken
        while True:
            taken += 1
            yield Request(taken, ImageFile(pictures_dir / "0.png"), str(taken))

    stream = write_texts(Recorder(), endless())
    assert next(stream).text == "40 1"
    assert taken == 6
    stream.close()


@pytest.mark.parametrize("kind", ["opt", "captioner"])
def test_the_batch_size_does_not_change_the_texts(writers_dir: Path, pictures_dir: Path, kind: str) -> None:
    writer = load_writer(writers_dir / kind, "caption", GenerationSettings(device="cpu", dtype="float32"))
    paths = expand_images([str(pictures_dir)])
    whole = list(write_texts(writer, request_texts(paths, [])))
    assert [written.text is None for written in whole] == [False] * 5 + [True]
    for batch_size in (1, 2):
        assert list(write_texts(writer, request_texts(paths, []), batch_size)) == whole
    pictures = [writer.prepare(factories.draw_picture(n, width_px=40 + n, height_px=50)) for n in range(5)]
    assert [w.text for w in whole[:5]] == writer.write(pictures, [str(w.request.id) for w in whole[:5]], [""] * 5)
