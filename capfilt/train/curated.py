"""The kept pairs of runs for other people's training loops: a torch dataset to iterate.

In: runs that have a manifest. Out: a dictionary for each image: key, picture, a kept text, and where it came from.
Shards are read one after another; order and text are functions of seed, epoch and key.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from capfilt.data.rundir import RunDir
from capfilt.errors import UsageError
from capfilt.train.batches import draw
from capfilt.train.pairs import read_pairs

Transform = Callable[[dict[str, Any]], Any]


class CuratedDataset(IterableDataset[Any]):
    """The images of runs that have a kept caption, one dictionary each, in another order every epoch.

    A sample has `key`, `image` (an upright RGB picture of PIL's), `text` (one of the image's kept captions, drawn anew
    every epoch), `texts` (all of them) and `run`. An epoch shows every image once. Of several processes each reads a
    stretch of the order, and so shards of its own; what divides by their number unevenly is left out, other images in
    every epoch.

    Workers of a `DataLoader` read stretches of their own too. Told the loader's `batch_size`, they share an epoch so
    that it has as many batches as `len(loader)` says, and `skip` passes over what was taken of it. A loader with
    `persistent_workers` keeps the epoch that it began with, whatever is set later.

    Example:
        data = CuratedDataset("runs/mine", transform=lambda sample: (to_tensor(sample["image"]), sample["text"]))
        loader = DataLoader(data, batch_size=64, num_workers=4)
        for epoch in range(10):
            data.set_epoch(epoch)
            for images, texts in loader: ...
    """

    def __init__(
        self,
        runs: str | Path | RunDir | Sequence[str | Path | RunDir],
        *,
        transform: Transform | None = None,
        shuffle: bool = True,
        seed: int = 0,
        clean: bool = False,
        batch_size: int = 1,
        rank: int | None = None,
        num_ranks: int | None = None,
    ) -> None:
        """Read the manifests of `runs`; no picture yet.

        Args:
            runs: a run, or several: folders, addresses of an object store, or opened ones with their generation.
            transform: what is made of a sample in the worker that reads it.
            shuffle: without, the order of the manifests, and the first text of an image.
            clean: the texts as the trainings here take them (`capfilt.data.captions.clean_caption`); else as they are.
            batch_size: the loader's.
            rank: this process among `num_ranks`; unset, as torch.distributed or torchrun's environment say. Where the
                loop itself gives each process its part (transformers' Trainer, accelerate), say 0 of 1.

        Raises UsageError for a run without a manifest or with nothing kept, CorruptionError for damage.
        """
        named = [runs] if isinstance(runs, str | Path | RunDir) else list(runs)
        self._pairs = read_pairs(named, image_size_px=1, memory_limit_bytes=0)  # pictures are read one by one
        self._transform, self._shuffle, self._seed, self._clean = transform, shuffle, seed, clean
        self._rank, self._num_ranks = _ranks(rank, num_ranks)
        if batch_size < 1:
            raise UsageError(f"batch_size is {batch_size}; expected at least 1.")
        self._batch_size, self._epoch, self._skipped, self._taken, self._resume = batch_size, 0, 0, 0, 0
        if len(self) == 0:
            raise UsageError(
                f"{len(self._pairs.keys)} images with kept captions are fewer than {self._num_ranks} ranks."
            )

    def __len__(self) -> int:
        """Samples of this process in an epoch."""
        return len(self._pairs.keys) // self._num_ranks

    def set_epoch(self, epoch: int) -> None:
        """Another order and other texts, from the beginning."""
        self._epoch, self._skipped, self._resume = epoch, 0, 0

    def skip(self, num_samples: int) -> None:
        """Leave out the first samples of this process in this epoch: so many batches of `batch_size`, or all of it.

        With as many workers as then, a new loader gives what the one before would have given next.
        """
        if not 0 <= num_samples <= len(self) or (num_samples % self._batch_size and num_samples != len(self)):
            raise UsageError(
                f"{num_samples} samples are to be skipped; expected a multiple of the batch size {self._batch_size}, "
                f"at most {len(self)}."
            )
        self._skipped, self._resume = num_samples, 0

    def state_dict(self) -> dict[str, int]:
        """Where this worker is; loaders that save their workers' state (torchdata's) ask for it."""
        return {"epoch": self._epoch, "skipped": self._skipped, "taken": self._taken}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on there, in the same worker of as many."""
        self._epoch, self._skipped, self._resume = (int(state[name]) for name in ("epoch", "skipped", "taken"))

    def __iter__(self) -> Iterator[Any]:
        self._taken, self._resume = self._resume, 0
        for row in self._rows_of_worker()[self._taken :].tolist():
            self._taken += 1
            yield self._sample(row)

    def _rows_of_worker(self) -> np.ndarray:
        """What this worker is to read of this epoch: a stretch of the order, so that its shards are its own."""
        info = get_worker_info()
        worker, num_workers = (info.id, info.num_workers) if info is not None else (0, 1)
        own = self._rows_of_rank()
        num_batches = -(-len(own) // self._batch_size)
        # The loader takes a batch of each worker in turn, and begins with the first one again when it is made anew.
        num_done = -(-self._skipped // self._batch_size)
        part = (worker + num_done) % num_workers
        sizes = [len(range(number, num_batches, num_workers)) * self._batch_size for number in range(num_workers)]
        if num_batches:  # the last batch may be smaller
            sizes[(num_batches - 1) % num_workers] -= num_batches * self._batch_size - len(own)
        start = list(accumulate(sizes, initial=0))[part]
        done = len(range(part, num_done, num_workers)) * self._batch_size
        return own[start + min(done, sizes[part]) : start + sizes[part]]

    def _rows_of_rank(self) -> np.ndarray:
        num = len(self)
        if not self._shuffle:
            return np.arange(self._rank * num, (self._rank + 1) * num)
        return self._pairs.order(self._seed, self._epoch, self._num_ranks, 1)[self._rank :: self._num_ranks]

    def _sample(self, row: int) -> Any:
        key, texts = self._pairs.keys[row], self._pairs.captions_of(row, clean=self._clean)
        chosen = draw(self._seed, self._epoch, key, "caption") % len(texts) if self._shuffle else 0
        sample = {
            "key": key, "image": self._pairs.read_image(row), "text": texts[chosen], "texts": texts,
            "run": self._pairs.run_of(row),
        }  # fmt: skip
        return sample if self._transform is None else self._transform(sample)


def _ranks(rank: int | None, num_ranks: int | None) -> tuple[int, int]:
    if rank is None and num_ranks is None:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return torch.distributed.get_rank(), torch.distributed.get_world_size()
        return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if rank is None or num_ranks is None or not 0 <= rank < num_ranks:
        raise UsageError(f"rank is {rank} of {num_ranks}; expected both, the rank from 0 to one less than num_ranks.")
    return rank, num_ranks
