"""One pass over a shard: batches that do not fit into a device's memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from capfilt.curation.shard_pass import CaptionLane, ClipLane, Item, run_lanes
from capfilt.errors import CapfiltError
from capfilt.weights.model_files import ImagePreparation
from tests.curation.small_runs import encode_picture

PICTURE = encode_picture(0)


class SmallDevice:
    """Stands for a captioner and for a CLIP whose device holds `capacity` images; texts and scores tell the picture."""

    device = torch.device("cpu")
    preparation: ImagePreparation | None = None

    def __init__(self, batch_size: int, capacity: int) -> None:
        self.batch_size, self.capacity = batch_size, capacity
        self.seen: list[int] = []
        self.num_released = 0

    def prepare(self, image: Any) -> Any:
        return image.size

    def release(self) -> None:
        self.num_released += 1

    def encode(self, images: Sequence[Any]) -> torch.Tensor:
        self.seen.append(len(images))
        if len(images) > self.capacity:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return torch.zeros(len(images), 1)

    def caption_features(self, features: torch.Tensor, keys: Sequence[str]) -> list[list[str]]:
        assert len(features) == len(keys)
        return [[f"picture {key}"] for key in keys]

    def score(self, images: Sequence[Any], texts: Sequence[Sequence[str]]) -> list[list[float]]:
        self.encode(images)
        return [[len(text) / 100 for text in own] for own in texts]


def items(number: int) -> Iterator[Item]:
    for index in range(number):
        image = b"no picture" if index % 5 == 3 else PICTURE
        yield Item(f"{index:09d}", "a web caption", image, "", len(image))


def test_batch_that_does_not_fit_is_halved_from_then_on() -> None:
    captioner, clip = SmallDevice(batch_size=16, capacity=5), SmallDevice(batch_size=8, capacity=8)
    found = list(run_lanes(items(50), [CaptionLane(captioner), ClipLane(clip, include_web=False)]))
    assert [item.key for item in found] == [f"{index:09d}" for index in range(50)]
    sound = [item for item in found if item.failure is None]
    assert len(sound) == 40
    assert [item.captions for item in sound] == [[f"picture {item.key}"] for item in sound]
    assert all(len(item.ranked) == 2 and not item.prepared for item in sound)
    assert captioner.seen[:4] == [16, 8, 4, 4]
    assert max(captioner.seen[4:]) <= 5
    assert (captioner.batch_size, captioner.num_released) == (4, 2)
    assert (clip.batch_size, max(clip.seen)) == (8, 8)


def test_a_device_that_holds_not_even_one_image_is_named_with_what_to_do() -> None:
    with pytest.raises(CapfiltError, match=r"one image in the stage captions \(CUDA out of memory.*--device cpu"):
        list(run_lanes(items(3), [CaptionLane(SmallDevice(batch_size=2, capacity=0))]))


def test_other_errors_of_a_model_are_not_taken_for_lack_of_memory() -> None:
    class Broken(SmallDevice):
        def encode(self, images: Sequence[Any]) -> torch.Tensor:
            raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        list(run_lanes(items(3), [CaptionLane(Broken(batch_size=2, capacity=2))]))


def test_an_image_without_captions_is_set_aside() -> None:
    class Blind(SmallDevice):
        def caption_features(self, features: torch.Tensor, keys: Sequence[str]) -> list[list[str]]:
            return [[] if key.endswith("2") else [f"picture {key}"] for key in keys]

    found = list(run_lanes(items(3), [CaptionLane(Blind(batch_size=2, capacity=2), keeps_features=True)]))
    assert [item.failed_stage for item in found] == ["", "", "captions"]
    failure = found[2].failure
    assert failure is not None
    assert (failure.reason, failure.detail) == ("scoring_failed", "the captioner's logits are not finite")
    assert found[2].features is None


def test_decoders_leave_the_cores_to_the_model() -> None:
    seen: list[int] = []

    class Counting(SmallDevice):
        def prepare(self, image: Any) -> Any:
            seen.append(torch.get_num_threads())

    def count_elsewhere() -> int:
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(torch.get_num_threads).result()

    here = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        list(run_lanes(items(10), [CaptionLane(Counting(batch_size=2, capacity=2))]))
        assert set(seen) == {1}
        assert torch.get_num_threads() == count_elsewhere() == 3
        with pytest.raises(CapfiltError):
            list(run_lanes(items(10), [CaptionLane(Counting(batch_size=2, capacity=0))]))
        assert torch.get_num_threads() == count_elsewhere() == 3
        left_early = run_lanes(items(10), [CaptionLane(Counting(batch_size=2, capacity=2))])
        next(left_early)
        del left_early
        assert torch.get_num_threads() == count_elsewhere() == 3
    finally:
        torch.set_num_threads(here)


def test_a_picture_is_prepared_once_for_models_that_want_the_same() -> None:
    class Preparing(SmallDevice):
        def __init__(self, preparation: ImagePreparation | None, device: str = "cpu") -> None:
            super().__init__(batch_size=2, capacity=2)
            self.preparation, self.device, self.num_prepared = preparation, torch.device(device), 0

        def prepare(self, image: Any) -> Any:
            self.num_prepared += 1
            return (self.preparation, image.size)

        def score(self, images: Sequence[Any], texts: Sequence[Sequence[str]]) -> list[list[float]]:
            assert images == [(self.preparation, (48, 40))] * len(texts)
            return super().score(images, texts)

    small = ImagePreparation(32)
    captioner = Preparing(small)
    others = [
        Preparing(ImagePreparation(48)),
        Preparing(None),
        Preparing(None),
        Preparing(small),
        Preparing(small, "meta"),
    ]
    lanes = [CaptionLane(captioner), *(ClipLane(model, include_web=False) for model in others)]
    for number, lane in enumerate(lanes):
        lane.stage = f"stage {number}"
    found = list(run_lanes(items(3), lanes))
    assert [item.failure for item in found] == [None] * 3
    assert [model.num_prepared for model in (captioner, *others)] == [3, 3, 3, 3, 0, 3]
