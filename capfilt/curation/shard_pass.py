"""One pass over the images of a shard: each is decoded once, then captioned, ranked and filtered as asked.

Where captioner and filter have the same image encoder, the filter takes the captioner's features.

In: samples in the order of their keys, and a lane for each stage. Out: the same samples in the same order,
with what the stages found or why one of them failed. A lane works on batches of its own size, so that a stage finds
the same alone, together with others, and after an interruption; where a device's memory does not hold a batch, it is
halved.

Pictures are decoded and resized by a few threads while the models compute; only a bounded number of them is
held at a time, whatever the size of the shard.
"""

from __future__ import annotations

import math
import os
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch

from capfilt.curation.selection import RankedCaption, captions_to_filter, rank_captions
from capfilt.data.images import ImageRefused, decode_image
from capfilt.data.reasons import Quarantined
from capfilt.data.samples import Sample
from capfilt.data.schemas import WEB_CAPTION_INDEX
from capfilt.data.texts import first_line
from capfilt.errors import CapfiltError
from capfilt.weights.devices import is_out_of_memory

NUM_DECODERS = 2
"""Threads that decode for models on a CPU; one feeds a large model, two a small one."""
MOST_DECODERS = 16
"""Threads that decode for a GPU, where there are as many cores."""


@dataclass(slots=True)
class Item:
    """One sample on its way through the lanes."""

    key: str
    web_caption: str
    image: bytes
    """Encoded; empty as soon as it is decoded, so that a shard's pictures do not pile up."""
    sha256: str
    num_bytes: int
    captions: list[str] = field(default_factory=list)
    """Synthetic captions, by caption_index."""
    ranked: list[RankedCaption] = field(default_factory=list)
    """Web caption and synthetic captions with CLIP scores."""
    itm_scores: list[tuple[int, float | None]] = field(default_factory=list)
    """(caption_index, ITM score) of the captions the filter looked at."""
    prepared: dict[str, Any] = field(default_factory=dict)
    """Lane → the picture as its model wants it."""
    features: Any = None
    """Image features (P + 1, D) by the captioner, for a filter that sees with the same image encoder."""
    failed_stage: str = ""
    failure: Quarantined | None = None

    @classmethod
    def of(cls, sample: Sample) -> Item:
        """The item of a sample, nothing found yet."""
        return cls(sample.key, sample.web_caption, sample.image, sample.sha256, len(sample.image))

    def fail(self, stage: str, reason: str, detail: str) -> None:
        """Take the sample out at `stage`."""
        self.failed_stage = stage
        self.failure = Quarantined(
            key=self.key, reason=reason, detail=detail, sha256=self.sha256, num_bytes=self.num_bytes
        )
        self.prepared.clear()
        self.features = None


class Lane(ABC):
    """One stage of the pass, filled by a model: its batches are the model's, and become smaller with the model's."""

    stage: str

    def __init__(self, model: Any) -> None:
        self.model = model
        self.was_halved = False
        self.seconds = 0.0
        """That `work` took, so far."""
        self.prepare: Callable[[Any], Any] | None = model.prepare
        """An RGB picture as the model wants it; called in a decoding thread. None where it needs no picture."""
        self.prepared_as = None if model.preparation is None else (model.preparation, model.device.type)
        """What `prepare` does and for which device; lanes that have the same share the prepared picture."""

    @abstractmethod
    def work(self, items: Sequence[Item], /) -> None:
        """Fill in what the stage finds in items that did not fail. Done again after an error, it gives the same."""

    @property
    def batch_size(self) -> int:
        """Images at a time."""
        return self.model.batch_size

    def halve(self, number: int) -> None:
        """Take half of `number` images at a time from now on; buffers for more are let go."""
        self.model.batch_size = (number + 1) // 2
        self.was_halved = True
        if release := getattr(self.model, "release", None):
            release()
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()

    def prepared(self, items: Sequence[Item]) -> list[Any]:
        """The pictures of a batch."""
        return [item.prepared[self.stage] for item in items]


class CaptionLane(Lane):
    """Fills `captions`, and `features` for a filter that can use them."""

    stage = "captions"

    def __init__(self, captioner: Any, *, keeps_features: bool = False) -> None:
        super().__init__(captioner)
        self._keeps_features = keeps_features

    def work(self, items: Sequence[Item]) -> None:
        """Write the captions of a batch."""
        features_BPD = self.model.encode(self.prepared(items))
        texts = self.model.caption_features(features_BPD, [item.key for item in items])
        for item, own, features_PD in zip(items, texts, features_BPD, strict=True):
            item.captions = own
            item.features = features_PD if self._keeps_features else None
            if not own:
                item.fail(self.stage, "scoring_failed", "the captioner's logits are not finite")


class ClipLane(Lane):
    """Fills `ranked`: scores of every text, ranks of the distinct ones."""

    stage = "clip"

    def __init__(self, scorer: Any, *, include_web: bool) -> None:
        super().__init__(scorer)
        self._include_web = include_web

    def work(self, items: Sequence[Item]) -> None:
        """Score and rank the captions of a batch. An empty text has no score."""
        texts = [[item.web_caption, *item.captions] for item in items]
        asked = [[text for text in own if text.strip()] for own in texts]
        scores = self.model.score(self.prepared(items), asked)
        for item, own, found in zip(items, texts, scores, strict=True):
            if not all(map(math.isfinite, found)):
                item.fail(self.stage, "scoring_failed", "a CLIP score is not finite")
                continue
            left = iter(found)
            captions = [
                (index, text, next(left) if text.strip() else None)
                for index, text in enumerate(own, start=WEB_CAPTION_INDEX)
            ]
            item.ranked = rank_captions(captions, include_web=self._include_web)


class ItmLane(Lane):
    """Fills `itm_scores`: of the top K, and of the web caption unless it was ranked."""

    stage = "itm"

    def __init__(self, scorer: Any, *, keep: int, include_web: bool, uses_features: bool = False) -> None:
        super().__init__(scorer)
        self._keep, self._include_web = keep, include_web
        if uses_features:
            self.prepare = None

    def work(self, items: Sequence[Item]) -> None:
        """Score a batch. A sample without any text has one row without a score, and so is accounted for."""
        chosen = [captions_to_filter(item.ranked, keep=self._keep, include_web=self._include_web) for item in items]
        texts = [[caption.text for caption in own] for own in chosen]
        if self.prepare is None:
            scores = self.model.score_features([item.features for item in items], texts)
        else:
            scores = self.model.score(self.prepared(items), texts)
        for item, own, found in zip(items, chosen, scores, strict=True):
            item.features = None
            if not all(map(math.isfinite, found)):
                item.fail(self.stage, "scoring_failed", "an ITM score is not finite")
            elif own:
                indices = [caption.caption_index for caption in own]
                item.itm_scores = list(zip(indices, found, strict=True))
            else:
                item.itm_scores = [(WEB_CAPTION_INDEX, None)]


def run_lanes(items: Iterable[Item], lanes: Sequence[Lane]) -> Iterator[Item]:
    """Send items through the lanes, in order; each comes out when the last lane is done with it.

    An item that fails, in decoding or in a lane, comes out in its place and is not worked on further.
    """
    flow: Iterator[Item] = _decode_ahead(items, lanes)
    for lane in lanes:
        flow = _in_batches(flow, lane)
    return flow


def _in_batches(items: Iterator[Item], lane: Lane) -> Iterator[Item]:
    waiting: list[Item] = []
    num_sound = 0
    for item in items:
        waiting.append(item)
        num_sound += item.failure is None
        if num_sound >= lane.batch_size:
            _work(lane, [one for one in waiting if one.failure is None])
            yield from waiting
            waiting, num_sound = [], 0
    if num_sound:
        _work(lane, [one for one in waiting if one.failure is None])
    yield from waiting


def _work(lane: Lane, items: Sequence[Item]) -> None:
    """Send a batch through a lane; where a GPU's memory does not hold it, in halves, and so from then on."""
    done = 0
    while done < len(items):
        part = items[done : done + lane.batch_size]
        if not _fits(lane, part):
            lane.halve(len(part))
            continue
        for item in part:
            item.prepared.pop(lane.stage, None)
        done += len(part)


def _fits(lane: Lane, items: Sequence[Item]) -> bool:
    """Whether the lane did its work; False where memory ran out and fewer items at a time may do."""
    started = time.monotonic()
    try:
        lane.work(items)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        if len(items) == 1:
            raise CapfiltError(
                f"The device's memory does not hold one image in the stage {lane.stage} ({first_line(error)}). Give "
                "--device cpu, a smaller model, or --dtype bfloat16; what is committed stays."
            ) from error
        return False
    finally:
        lane.seconds += time.monotonic() - started
    return True


def _decode_ahead(items: Iterable[Item], lanes: Sequence[Lane]) -> Iterator[Item]:
    """Items with their pictures prepared for every lane, in order; decoded by threads, a few ahead."""
    source = iter(items)
    under_way: deque[tuple[Item, Future[None]]] = deque()
    num_threads = torch.get_num_threads()
    # With teams of OpenMP threads of their own, decoders make more threads than there are cores, and then the models'
    # team goes to sleep after every operation.
    with ThreadPoolExecutor(
        _count_decoders(lanes), thread_name_prefix="decode", initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        try:
            while True:
                while len(under_way) < 2 * lanes[0].batch_size and (item := next(source, None)) is not None:
                    under_way.append((item, pool.submit(_prepare, item, lanes)))
                if not under_way:
                    return
                item, future = under_way.popleft()
                future.result()
                yield item
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            torch.set_num_threads(num_threads)  # the decoders have also changed what new threads begin with


def _count_decoders(lanes: Sequence[Lane]) -> int:
    devices = {lane.model.device.type for lane in lanes}
    return (
        NUM_DECODERS
        if devices == {"cpu"}
        else min(
            MOST_DECODERS, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        )
    )


def _prepare(item: Item, lanes: Sequence[Lane]) -> None:
    data, item.image = item.image, b""
    try:
        image = decode_image(data)
    except ImageRefused as refused:
        item.fail(lanes[0].stage, refused.reason, refused.detail)
        return
    done: dict[Any, Any] = {}
    for lane in lanes:
        if lane.prepare is not None:
            same = lane.prepared_as or lane.stage
            if same not in done:
                done[same] = lane.prepare(image)
            item.prepared[lane.stage] = done[same]
