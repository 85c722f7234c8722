"""Batches for training, straight from shards and manifest, or from arrays.

In: run directories (or images and captions in memory), batch size, seed. Out: an endless stream of `Batch`,
shuffled at shard and sample level, one kept caption drawn per image and epoch.

Order, caption, crop and flip are pure functions of (seed, epoch, key or row), so a stream opened at a cursor
gives exactly what an undisturbed one would have given from there. Where all pictures fit in memory as uint8
they are decoded once; otherwise the encoded bytes of a few shards are held and decoded one batch ahead.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from capfilt.errors import UsageError
from capfilt.models.ranks import ALONE, Ranks
from capfilt.settings import TrainSettings
from capfilt.weights.model_files import CLIP_MEAN, CLIP_STD


@dataclass(frozen=True, slots=True)
class Cursor:
    """A place in the endless stream: samples `position` … of the order of `epoch` come next."""

    epoch: int = 0
    position: int = 0

    def num_epochs(self, num_images: int, num_taken: int = 0) -> float:
        """Epochs of so many images that lie before it, less the images that were taken last."""
        return self.epoch + (self.position - num_taken) / num_images


@dataclass
class Batch:
    """Images of a step, each with one caption.

    `pixels` is uint8 (B, H, W, 3), or a float32 tensor (B, 3, H, W) that is normalised already. `rows` are
    the places of the samples in the dataset (for caches of frozen features), None where there is no dataset.
    `cursor` is where the stream goes on after this batch.
    """

    pixels: np.ndarray | Tensor
    texts: list[str]
    keys: list[str]
    cursor: Cursor
    rows: np.ndarray | None = None
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD
    image_ids: np.ndarray | None = None
    """Of the dataset, see `PairDataset.image_ids`."""
    names: list[str] = field(default_factory=list)
    """What the draws of each sample go by: its key, and the time where it is shown again in an epoch."""
    places: list[str] = field(default_factory=list)
    """Where people find each sample."""

    def images_on(self, device: torch.device | str) -> Tensor:
        """float32 (B, 3, H, W), normalised on the device, where the pixels go as bytes."""
        if isinstance(self.pixels, Tensor):
            return self.pixels.to(device)
        return normalise(self.pixels, self.mean, self.std, device)


def image_ids(batch: Batch, device: torch.device) -> Tensor | None:
    """Numbers (B,) that tell the images of a dataset apart; None where there is no dataset."""
    return None if batch.image_ids is None else torch.from_numpy(batch.image_ids).to(device)


class PairDataset(Protocol):
    """Images with their kept captions; what `iterate_batches` needs of a source."""

    keys: Sequence[str]
    image_ids: np.ndarray
    """int64, one for each row, 0 or more: equal where rows show equal pictures."""

    def order(self, seed: int, epoch: int, num_ranks: int = 1, batch_size: int = 1) -> np.ndarray:
        """The rows of an epoch, int64, pure in the arguments; may show some more than once, or not at all.

        A step's rows stand side by side, `batch_size` of each rank, in the order of the ranks.
        """
        ...

    def captions_of(self, row: int) -> list[str]:
        """The kept captions of an image, at least one."""
        ...

    def place_of(self, row: int) -> str:
        """Where people find a sample: its key, and its run where there are several."""
        ...

    def open(self) -> None:
        """Called before pixels are read again and again: those that fit into memory may be decoded, with progress."""
        ...

    def release(self) -> None:
        """Called when pixels are not read any more: gives up the memory that reading took."""
        ...

    def read_pixels(self, rows: np.ndarray, views: Sequence[View] | None) -> np.ndarray:
        """uint8 (B, H, W, 3) of the rows, each cut as its view says (None: whole images)."""
        ...


@dataclass(frozen=True, slots=True)
class View:
    """What is cut from one image before resizing, in shares of its edges, and whether it is mirrored."""

    left: float = 0.0
    top: float = 0.0
    width: float = 1.0
    height: float = 1.0
    mirrored: bool = False


class ArrayPairs:
    """A dataset in memory: uint8 images (N, H, W, 3), a list of captions each, keys."""

    def __init__(self, images_NHWC: np.ndarray, captions: Sequence[Sequence[str]], keys: Sequence[str]) -> None:
        if not len(images_NHWC) == len(captions) == len(keys):
            raise ValueError(f"{len(images_NHWC)} images, {len(captions)} caption lists, {len(keys)} keys")
        self.images, self.captions, self.keys = images_NHWC, captions, keys
        self.image_ids = np.arange(len(keys))

    def order(self, seed: int, epoch: int, num_ranks: int = 1, batch_size: int = 1) -> np.ndarray:
        return np.random.default_rng((seed, epoch)).permutation(len(self.keys))

    def captions_of(self, row: int) -> list[str]:
        return list(self.captions[row])

    def place_of(self, row: int) -> str:
        return self.keys[row]

    def open(self) -> None:
        pass

    def release(self) -> None:
        pass

    def read_pixels(self, rows: np.ndarray, views: Sequence[View] | None) -> np.ndarray:
        return crop_arrays(self.images[rows], views)


def from_arrays(
    images_NHWC: np.ndarray, captions: Sequence[Sequence[str]], keys: Sequence[str] | None = None
) -> ArrayPairs:
    """A dataset from uint8 images (N, S, S, 3) and each image's captions, which are taken as they are."""
    return ArrayPairs(images_NHWC, captions, keys or [f"{row:09d}" for row in range(len(captions))])


def iterate_batches(
    dataset: PairDataset,
    settings: TrainSettings,
    cursor: Cursor = Cursor(),
    *,
    ranks: Ranks = ALONE,
    mean: tuple[float, ...] = CLIP_MEAN,
    std: tuple[float, ...] = CLIP_STD,
    with_pixels: bool = True,
) -> Iterator[Batch]:
    """The endless stream of a rank's batches from `cursor` on; what fills no batch of all ranks ends an epoch.

    Every rank has as many batches in an epoch as the others. Of the settings: batch_size, seed, random_crop,
    random_flip. Without pixels (features are cached) the batches hold all but those. Raises UsageError
    where the images do not fill one batch of every rank.
    """
    size = settings.batch_size * ranks.num_ranks
    if len(dataset.order(settings.seed, 0, ranks.num_ranks, settings.batch_size)) < size:
        of_each = f" of {settings.batch_size} for each of {ranks.num_ranks} processes" if ranks.num_ranks > 1 else ""
        raise UsageError(
            f"{len(dataset.keys)} images with kept captions do not fill a batch of {size}{of_each}. "
            f"Lower --batch-size, or curate more with `capfilt run`."
        )
    plans = _plan(dataset, settings, cursor, ranks)
    if not with_pixels:
        no_pixels = np.empty((0, 0, 0, 3), np.uint8)
        return (_assemble(dataset, settings, plan, no_pixels, mean, std) for plan in plans)
    dataset.open()
    return _read_ahead(dataset, settings, plans, mean, std)


@dataclass(frozen=True, slots=True)
class _Plan:
    """One batch: its rows, and at which time of the epoch each of them is shown (0 the first)."""

    epoch: int
    rows: np.ndarray
    times: np.ndarray
    following: Cursor


def _plan(dataset: PairDataset, settings: TrainSettings, cursor: Cursor, ranks: Ranks) -> Iterator[_Plan]:
    epoch, position, own = cursor.epoch, cursor.position, settings.batch_size
    size = own * ranks.num_ranks
    while True:
        order = dataset.order(settings.seed, epoch, ranks.num_ranks, own)
        times = _times_shown(order, len(dataset.keys))
        while position + size <= len(order):
            first = position + ranks.offset(own)
            position += size
            yield _Plan(epoch, order[first : first + own], times[first : first + own], Cursor(epoch, position))
        epoch, position = epoch + 1, 0


def _times_shown(order: np.ndarray, num_rows: int) -> np.ndarray:
    """How often each entry, one of so many, stood there before: zeros where none repeats."""
    if len(order) <= num_rows and not np.bincount(order, minlength=num_rows).max(initial=0) > 1:
        return np.zeros(len(order), np.int8)
    by_row = np.argsort(order, kind="stable")
    ordered = order[by_row]
    starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
    times = np.empty(len(order), np.int64)
    times[by_row] = np.arange(len(order)) - np.repeat(starts, np.diff(starts, append=len(order)))
    return times


def _read_ahead(
    dataset: PairDataset,
    settings: TrainSettings,
    plans: Iterator[_Plan],
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> Iterator[Batch]:
    """Reads the next batch's pixels in a thread while the current step computes."""

    def read(plan: _Plan) -> np.ndarray:
        return dataset.read_pixels(plan.rows, _views(dataset, settings, plan))

    with ThreadPoolExecutor(1, thread_name_prefix="batches") as reader:
        plan = next(plans)
        pending: Future[np.ndarray] = reader.submit(read, plan)
        while True:
            pixels, current = pending.result(), plan
            plan = next(plans)
            pending = reader.submit(read, plan)
            yield _assemble(dataset, settings, current, pixels, mean, std)


def _assemble(
    dataset: PairDataset,
    settings: TrainSettings,
    plan: _Plan,
    pixels: np.ndarray,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> Batch:
    rows: list[int] = plan.rows.tolist()
    keys = [dataset.keys[row] for row in rows]
    texts = []
    names = _names(dataset, plan)
    for row, name in zip(rows, names, strict=True):
        captions = dataset.captions_of(row)
        texts.append(captions[draw(settings.seed, plan.epoch, name, "caption") % len(captions)])
    places = [dataset.place_of(row) for row in rows]
    ids = dataset.image_ids[plan.rows]
    return Batch(pixels, texts, keys, plan.following, plan.rows, mean, std, ids, names, places)


def _views(dataset: PairDataset, settings: TrainSettings, plan: _Plan) -> list[View] | None:
    if settings.random_crop == 1.0 and not settings.random_flip:
        return None
    seeds = [draw(settings.seed, plan.epoch, name, "view") for name in _names(dataset, plan)]
    return [draw_view(seed, settings.random_crop, settings.random_flip) for seed in seeds]


def _names(dataset: PairDataset, plan: _Plan) -> list[str]:
    """What the draws of an image go by: its key, and the time where it is shown again in an epoch."""
    rows: list[int] = plan.rows.tolist()
    keys = [dataset.keys[row] for row in rows]
    return [f"{key} {time}" if time else key for key, time in zip(keys, plan.times.tolist(), strict=True)]


def draw_captions(captions: Sequence[str], number: int, seed: int) -> list[str]:
    """`number` captions of an image, without repeating one before all were drawn."""
    rng, drawn = random.Random(seed), list[str]()
    while len(drawn) < number:
        drawn += rng.sample(captions, min(len(captions), number - len(drawn)))
    return drawn


def draw(seed: int, epoch: int, key: str, what: str) -> int:
    """64 random bits that depend on nothing but the arguments."""
    digest = hashlib.blake2b(f"{what}:{seed}:{epoch}:{key}".encode(), digest_size=8)
    return int.from_bytes(digest.digest(), "little")


@dataclass(frozen=True)
class Draws:
    """Random numbers of one batch of one process: they depend on nothing but seed, step and place in the step."""

    seed: int
    step: int
    part: int = 0
    """Which of the step's accumulated batches."""
    ranks: Ranks = ALONE

    def uniform(self, num: int, num_rows: int) -> Tensor:
        """float32 (num, num_rows) in [0, 1): this rank's rows of what one process would draw for all ranks' rows."""
        generator = torch.Generator().manual_seed(draw(self.seed, self.step, str(self.part), "uniform"))
        offset = self.ranks.offset(num_rows)
        return torch.rand(num, num_rows * self.ranks.num_ranks, generator=generator)[:, offset : offset + num_rows]

    def reseed(self) -> None:
        """Sets torch's generators, for dropout: another seed on every rank."""
        torch.manual_seed(draw(self.seed, self.step, f"{self.part} {self.ranks.rank}", "dropout"))


def draw_view(seed: int, smallest_area: float, flip: bool) -> View:
    """A random resized crop: area between `smallest_area` and all, aspect 3/4 to 4/3 of the image's own.

    The aspect is drawn among those with which the area fits into the image; an area of 1 is the whole image.
    """
    rng = random.Random(seed)
    area = rng.uniform(smallest_area, 1.0)
    widest = min(0.415, -math.log2(area))
    aspect = 2.0 ** rng.uniform(-widest, widest)
    width, height = min(1.0, (area * aspect) ** 0.5), min(1.0, (area / aspect) ** 0.5)
    left, top = rng.uniform(0.0, 1.0 - width), rng.uniform(0.0, 1.0 - height)
    return View(left, top, width, height, flip and rng.random() < 0.5)


def crop_arrays(
    pixels_BSSC: np.ndarray, views: Sequence[View] | None, size_px: int | None = None, pool: Executor | None = None
) -> np.ndarray:
    """Each square uint8 image cut as its view says, whole for None, and scaled to `size_px`, None for its own size.

    `pool` does it in several threads.
    """
    side_px: int = size_px or pixels_BSSC.shape[1]
    if views is None and side_px == pixels_BSSC.shape[1]:
        return pixels_BSSC
    shown = views or [View()] * len(pixels_BSSC)
    each = map if pool is None else pool.map
    return np.stack(
        list(each(lambda pixels, view: to_square(Image.fromarray(pixels), side_px, view), pixels_BSSC, shown))
    )


def to_square(image: Image.Image, size_px: int, view: View | None = None) -> np.ndarray:
    """uint8 (S, S, 3): the view of an RGB image, bicubic to a square as BLIP does, aspect not kept."""
    view = view or View()
    box = (
        view.left * image.width, view.top * image.height,
        (view.left + view.width) * image.width, (view.top + view.height) * image.height,
    )  # fmt: skip
    resized = image.resize((size_px, size_px), Image.Resampling.BICUBIC, box=box)
    pixels = np.asarray(resized)
    return pixels[:, ::-1] if view.mirrored else pixels


def normalise(
    pixels_BHWC: np.ndarray, mean: Sequence[float], std: Sequence[float], device: torch.device | str = "cpu"
) -> Tensor:
    """uint8 (B, H, W, 3) → float32 (B, 3, H, W), (value / 255 - mean) / std, computed on the device."""
    scale = torch.tensor([1.0 / (255.0 * s) for s in std], device=device).view(1, 3, 1, 1)
    shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)], device=device).view(1, 3, 1, 1)
    pixels = torch.from_numpy(np.ascontiguousarray(pixels_BHWC)).to(device)
    images = pixels.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    return images.mul_(scale).add_(shift)
