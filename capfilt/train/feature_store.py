"""Features of a frozen image encoder on disk: written once, mapped into memory, used by every training that wants them.

In: an encoder, a dataset, a directory. Out: a tensor (N, 1 + P, D) over a file of the directory. The files:

    DIGEST.features   the features as the machine has them in memory, row after row
    DIGEST.json       what they are of, shape and dtype; written last: its presence says the file is whole
    DIGEST.part       features under way, and DIGEST.part.json, how many rows of them are on disk: a fill that was cut
                      off goes on from there
    DIGEST.lock       held while they are written, so that the processes of one training wait for one of them

The digest is one of what the encoder computes (weights, sizes, layer, preparation, precision), of the images and their
order, and of the dtype stored. What is stored is in the machine's byte order; a file is as long as its shape says, and
is not read again to see whether it still holds what was written.
"""

from __future__ import annotations

import fcntl
import json
import mmap
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from capfilt.errors import CapfiltError, CorruptionError, UsageError
from capfilt.progress import Progress

FORMAT_VERSION = 1
SYNC_ROWS = 1024
"""Rows between two notes of how far a file is."""

Encode = Callable[[np.ndarray], Tensor]
"""Rows of the dataset → their features (B, 1 + P, D), on the CPU, in the dtype stored."""


@dataclass(frozen=True)
class FeatureFile:
    """Where the features are, or will be, and what they are."""

    directory: Path
    digest: str
    shape: tuple[int, int, int]
    """Images, 1 + P, D."""
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return self.shape[0] * self.row_bytes

    @property
    def row_bytes(self) -> int:
        return self.shape[1] * self.shape[2] * self.dtype.itemsize

    @property
    def path(self) -> Path:
        return self.directory / f"{self.digest}.features"

    @property
    def record_path(self) -> Path:
        return self.directory / f"{self.digest}.json"

    @property
    def part_path(self) -> Path:
        return self.directory / f"{self.digest}.part"

    def record(self) -> dict[str, Any]:
        """What DIGEST.json holds."""
        return {"format_version": FORMAT_VERSION, "shape": list(self.shape), "dtype": str(self.dtype)}


def open_features(file: FeatureFile, encode: Encode, batch_size: int, progress: Progress) -> Tensor:
    """The features as a tensor over the file, to be read alone; the file is made first where it is not there.

    Raises UsageError where the directory cannot be written or lacks the space, CorruptionError where a finished file is
    not what its record says, CapfiltError where features are not finite in the dtype stored.
    """
    with _locked(file):
        if not _is_whole(file):
            _fill(file, encode, batch_size, progress)
    return _mapped(file)


def _mapped(file: FeatureFile) -> Tensor:
    """The file as a tensor that may be read alone, so that it may be larger than the memory."""
    with open(file.path, "rb") as handle:
        memory = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given buffer is not writable")
        return torch.frombuffer(memory, dtype=file.dtype).view(file.shape)


@contextmanager
def _locked(file: FeatureFile) -> Iterator[None]:
    """One process at a time; the others wait."""
    try:
        file.directory.mkdir(parents=True, exist_ok=True)
        handle = open(file.directory / f"{file.digest}.lock", "a+")  # noqa: SIM115
    except OSError as error:
        raise UsageError(
            f"feature_cache_dir {file.directory} cannot be written ({error.strerror}). Give another directory."
        ) from error
    with handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _is_whole(file: FeatureFile) -> bool:
    if not file.record_path.exists():
        return False
    try:
        record = json.loads(file.record_path.read_text())
        is_as_said = record == file.record() and file.path.stat().st_size == file.num_bytes
    except (OSError, ValueError):
        is_as_said = False
    if not is_as_said:
        raise CorruptionError(
            f"{file.path} is not what {file.record_path.name} says. Remove both: they are computed again then."
        )
    return True


def _fill(file: FeatureFile, encode: Encode, batch_size: int, progress: Progress) -> None:
    num_images, done = file.shape[0], _rows_on_disk(file)
    _refuse_full_disk(file, done)
    progress.start(_announcement(file), num_images, "image")
    progress.advance(done, already=True)
    with open(file.part_path, "r+b" if done else "wb") as handle:
        handle.truncate(done * file.row_bytes)
        handle.seek(0, os.SEEK_END)
        noted = done
        for first in range(done, num_images, batch_size):
            rows = np.arange(first, min(first + batch_size, num_images))
            _append(handle, _bytes_of(encode(rows), file), file)
            last = int(rows[-1]) + 1
            if last - noted >= SYNC_ROWS or last == num_images:
                _sync(handle)
                _write_record(_part_record_path(file), {**file.record(), "rows": last})
                noted = last
            progress.advance(len(rows))
    progress.finish()
    os.replace(file.part_path, file.path)
    _write_record(file.record_path, file.record())
    _part_record_path(file).unlink(missing_ok=True)


def _append(handle: Any, content: bytes, file: FeatureFile) -> None:
    try:
        handle.write(content)
    except OSError as error:  # the disk is full after all, or gone
        raise UsageError(
            f"{file.part_path} cannot be written ({error.strerror}). Make room and run the command again: it goes on "
            "from what is written."
        ) from error


def _announcement(file: FeatureFile) -> str:
    free = shutil.disk_usage(file.directory).free
    return f"features ({_size_text(file.num_bytes)} into {file.directory}, {_size_text(free)} free)"


def _rows_on_disk(file: FeatureFile) -> int:
    """Rows that an earlier fill wrote and noted."""
    try:
        record = json.loads(_part_record_path(file).read_text())
        rows = int(record.pop("rows"))
        is_there = record == file.record() and file.part_path.stat().st_size >= rows * file.row_bytes
        return rows if is_there else 0
    except (OSError, ValueError, KeyError):
        return 0


def _refuse_full_disk(file: FeatureFile, done: int) -> None:
    free, needed = shutil.disk_usage(file.directory).free, file.num_bytes - done * file.row_bytes
    if needed > free:
        raise UsageError(
            f"The features of {file.shape[0]:,} images take {_size_text(needed)} more in {file.directory}; "
            f"{_size_text(free)} are free. Give another feature_cache_dir, feature_cache_dtype=bfloat16, or none."
        )


def _bytes_of(features: Tensor, file: FeatureFile) -> bytes:
    if not bool(torch.isfinite(features).all()):
        raise CapfiltError(
            f"Features are not finite in {file.dtype}. Give feature_cache_dtype=float32, whose range is wider."
        )
    return features.contiguous().view(torch.uint8).numpy().tobytes()


def _part_record_path(file: FeatureFile) -> Path:
    return file.directory / f"{file.digest}.part.json"


def _write_record(path: Path, record: dict[str, Any]) -> None:
    staged = path.with_suffix(".tmp")
    with open(staged, "w") as handle:
        json.dump(record, handle)
        _sync(handle)
    os.replace(staged, path)


def _sync(handle: Any) -> None:
    handle.flush()
    os.fsync(handle.fileno())


def _size_text(num_bytes: int) -> str:
    """For people: 3.2 GB."""
    for limit, unit in ((1e9, "GB"), (1e6, "MB")):
        if num_bytes >= limit:
            return f"{num_bytes / limit:,.1f} {unit}"
    return f"{num_bytes / 1e3:,.1f} kB"
