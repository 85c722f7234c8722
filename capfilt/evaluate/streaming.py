"""Any number of images through a writer, batch by batch: the next batch is decoded while the model works.

In: requests, each an image and a prompt. Out: what was written of each, in their order, as soon as its batch is done.
Two batches of pictures, as small as the model wants them, are in memory at most. An image that cannot be used takes
nothing but its own place: it comes out with its reason.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

from PIL.Image import Image

from capfilt.data.image_sources import ImageSource
from capfilt.data.images import ImageRefused, decode_image
from capfilt.data.json_lists import Id
from capfilt.data.texts import clean_for_terminal

NUM_DECODERS = 4
NOT_FINITE = "scoring_failed: the model gives no finite numbers"


class TextWriter(Protocol):
    """A model that writes texts of pictures."""

    batch_size: int
    """Pictures at a time."""
    fields: dict[str, Any]
    """What changes the texts: model, prompt, decoding."""

    def prepare(self, image: Image) -> Any:
        """An RGB picture as `write` wants it: small, so that many may wait."""
        ...

    def write(self, pictures: Sequence[Any], keys: Sequence[str], prompts: Sequence[str]) -> list[str | None]:
        """A text for each picture and prompt; None where the model gives no finite numbers.

        An empty prompt stands for the writer's own. A picture that occurs several times is encoded once.
        """
        ...


@dataclass(frozen=True, slots=True)
class Request:
    """One text to be written."""

    id: Id
    """Of the image or question; with the seed it fixes a captioner's draws."""
    image: ImageSource
    prompt: str = ""
    """Text to continue, or a question; empty for the writer's own."""


@dataclass(frozen=True, slots=True)
class Written:
    """What became of a request: a text, or the reason why there is none."""

    request: Request
    text: str | None
    problem: str | None = None


def write_texts(writer: TextWriter, requests: Iterable[Request], batch_size: int | None = None) -> Iterator[Written]:
    """Yield what the writer writes, in the order of the requests.

    Requests in a row that are about the same image decode and encode it once. Where a GPU has not the memory for a
    batch, it is halved. Raises CorruptionError for a damaged shard.
    """
    waiting = iter(requests)
    with ThreadPoolExecutor(NUM_DECODERS, thread_name_prefix="decode") as pool:
        ready: deque[_Batch] = deque()
        while True:
            if part := list(islice(waiting, batch_size or writer.batch_size)):
                ready.append(_start(pool, writer, part))
            if not ready:
                return
            if len(ready) < 2 and part:
                continue
            yield from _finish(writer, ready.popleft())


@dataclass(frozen=True)
class _Batch:
    requests: list[Request]
    prepared: dict[ImageSource, Future[tuple[Any, str | None]]]


def _start(pool: ThreadPoolExecutor, writer: TextWriter, requests: list[Request]) -> _Batch:
    sources = dict.fromkeys(request.image for request in requests)
    return _Batch(requests, {source: pool.submit(_prepare, writer, source) for source in sources})


def _finish(writer: TextWriter, batch: _Batch) -> Iterator[Written]:
    prepared = {source: future.result() for source, future in batch.prepared.items()}
    usable = [request for request in batch.requests if prepared[request.image][1] is None]
    pictures = [prepared[request.image][0] for request in usable]
    texts = iter(_write(writer, pictures, usable))
    for request in batch.requests:
        problem = prepared[request.image][1]
        text = None if problem else next(texts)
        yield Written(request, text, problem or (NOT_FINITE if text is None else None))


def _write(writer: TextWriter, pictures: Sequence[Any], requests: Sequence[Request]) -> list[str | None]:
    if not requests:
        return []
    try:
        return writer.write(pictures, [str(r.id) for r in requests], [r.prompt for r in requests])
    except RuntimeError as error:
        from capfilt.weights.devices import is_out_of_memory  # scoring files of results loads no torch

        if len(requests) == 1 or not is_out_of_memory(error):
            raise
    half = len(requests) // 2
    return _write(writer, pictures[:half], requests[:half]) + _write(writer, pictures[half:], requests[half:])


def _prepare(writer: TextWriter, source: ImageSource) -> tuple[Any, str | None]:
    """A picture as the writer wants it, or the reason why it cannot be used."""
    try:
        return writer.prepare(decode_image(source.read())), None
    except ImageRefused as refused:
        return None, str(refused)
    except OSError as error:
        return None, clean_for_terminal(f"not readable: {error.strerror or error}")
