"""Pictures by number, decoded one batch ahead of the model.

In: where their bytes are, or pictures in memory. Out: batches of prepared pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

from PIL import Image
from torch import Tensor

from capfilt.data.image_sources import ImageSource
from capfilt.data.images import ImageRefused, decode_image
from capfilt.data.texts import clean_for_terminal
from capfilt.errors import UsageError

_NUM_DECODERS = 4


class Pictures(Protocol):
    """Pictures by number, each decoded when it is asked for; a list of RGB pictures will do."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int, /) -> Image.Image: ...


class SourcePictures:
    """The pictures of image sources. Raises UsageError, when one is asked for, where it is not there or no picture."""

    def __init__(self, sources: Sequence[ImageSource]) -> None:
        self._sources = sources

    def __len__(self) -> int:
        return len(self._sources)

    def __getitem__(self, number: int, /) -> Image.Image:
        source = self._sources[number]
        try:
            return decode_image(source.read())
        except (ImageRefused, OSError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            raise UsageError(
                f"The image {clean_for_terminal(source.name)} cannot be used ({reason}). An evaluation takes every "
                "image of its file: mend it, or take it out of the file."
            ) from None


def prepare_ahead(
    pictures: Pictures, prepare: Callable[[Image.Image], Tensor], batch_size: int
) -> Iterator[tuple[int, list[Tensor]]]:
    """The first picture's number and the prepared pictures of each batch."""
    with ThreadPoolExecutor(_NUM_DECODERS, thread_name_prefix="decode") as pool:

        def submit(start: int) -> list[Future[Tensor]]:
            numbers = range(start, min(start + batch_size, len(pictures)))
            return [pool.submit(lambda number: prepare(pictures[number]), number) for number in numbers]

        following = submit(0)
        try:
            for start in range(0, len(pictures), batch_size):
                current, following = following, submit(start + batch_size)
                yield start, [future.result() for future in current]
        finally:
            for future in following:
                future.cancel()
