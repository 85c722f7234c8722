"""Training pairs of one or several runs: kept captions from the manifest, images from the shards.

In: run directories that have a manifest. Out: a dataset for `iterate_batches`: in memory (decoded once) where
the pictures fit as uint8, else streamed from a few shards at a time.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from capfilt.data.captions import clean_caption, has_words
from capfilt.data.images import ImageRefused, decode_image
from capfilt.data.manifest import iterate_manifest
from capfilt.data.rundir import RunDir
from capfilt.data.shards import read_samples
from capfilt.errors import CorruptionError, UsageError
from capfilt.progress import Progress
from capfilt.train.batches import View
from capfilt.train.pictures import MEMORY_LIMIT_BYTES, Decode, Pictures

SHUFFLED_SAMPLES = 4000
"""When streaming, samples are shuffled within as many shards as hold about this many; their encoded bytes are
held in memory (0.4 GB at 100 kB a picture)."""


def read_pairs(
    runs: Sequence[RunDir | str | Path],
    *,
    image_size_px: int,
    smallest_crop: float = 1.0,
    run_weights: Sequence[float] = (),
    memory_limit_bytes: int = MEMORY_LIMIT_BYTES,
    progress: Progress | None = None,
    known_false: bool = False,
) -> RunPairs:
    """The images of `runs` that have a kept caption; an image without one is left out.

    An epoch shows the images of a run as often as its weight says (once without weights). With `known_false` the
    captions that were dropped as such are read too. Size, crop and limit are those of `Pictures`: none is read before
    it is asked for.

    Raises UsageError for a run without a manifest or with nothing kept, and for another number of weights than runs;
    CorruptionError for damaged shards.
    """
    if run_weights and len(run_weights) != len(runs):
        raise UsageError(
            f"{len(run_weights)} weights for {len(runs)} runs; give one for each: --set run_weights=1,0.5."
        )
    index = _read_index(runs, known_false)
    files = _EncodedPictures(index)
    pictures = Pictures(
        len(index.keys), files.find, image_size_px=image_size_px, smallest_crop=smallest_crop,
        memory_limit_bytes=memory_limit_bytes, progress=progress,
    )  # fmt: skip
    return RunPairs(index, files, pictures, run_weights)


def runs_digest(runs: Sequence[RunDir | str | Path]) -> str:
    """sha256 over the content of the runs' manifests: a training goes on only with the same pairs."""
    digest = hashlib.sha256()
    columns = ["key", "text", "sha256"]
    for _run, shard, table in iterate_manifest(runs, [*columns, "kept", "drop_reason"]):
        _add_to_digest(digest, shard, table.filter(table["kept"]).select(columns))
        if (known_false := table.filter(_is_known_false(table))).num_rows:
            _add_to_digest(digest, f"{shard} known_false", known_false.select(columns))
    return digest.hexdigest()


def kept_images_digest(runs: Sequence[RunDir | str | Path]) -> str:
    """sha256 over shard, key and content of the images that have a kept caption, in order; captions do not count."""
    digest = hashlib.sha256()
    for _run, shard, table in iterate_manifest(runs, ["key", "sha256", "kept"]):
        kept = table.filter(table["kept"])
        ends = pc.run_end_encode(kept["key"].combine_chunks()).run_ends  # the captions of a key stand side by side
        _add_to_digest(digest, shard, kept.select(["key", "sha256"]).take(pc.subtract(ends, 1)))
    return digest.hexdigest()


def _add_to_digest(digest: Any, shard: str, table: pa.Table) -> None:
    """Adds a shard's columns of strings to a hash: their lengths and their bytes, as Arrow holds them."""
    digest.update(f"{shard}\0{table.num_rows}\0".encode())
    for column in table.columns:
        strings = pc.fill_null(column, "").combine_chunks().cast(pa.large_binary())
        if len(strings):
            offsets = np.frombuffer(strings.buffers()[1], np.int64)[strings.offset : strings.offset + len(strings) + 1]
            digest.update(np.diff(offsets).tobytes())
            digest.update(memoryview(strings.buffers()[2])[offsets[0] : offsets[-1]])


@dataclass(frozen=True)
class _ShardRows:
    """The rows of one shard: `first` is the row of its first kept sample, `number` that of its run."""

    run: RunDir
    number: int
    shard: str
    first: int
    num_rows: int


class _Texts(Sequence[str]):
    """Strings that stay in Arrow's memory: a hundred million of Python's would take gigabytes."""

    def __init__(self, array: pa.LargeStringArray) -> None:
        self._array = array

    def __len__(self) -> int:
        return len(self._array)

    @overload
    def __getitem__(self, place: int) -> str: ...
    @overload
    def __getitem__(self, place: slice) -> list[str]: ...
    def __getitem__(self, place: int | slice) -> str | list[str]:
        found = self._array[place]
        return found.to_pylist() if isinstance(place, slice) else found.as_py()


@dataclass(frozen=True)
class _Index:
    shards: list[_ShardRows]
    first_rows: np.ndarray
    """int64 (shards,): of each shard."""
    keys: Sequence[str]
    texts: pa.LargeStringArray
    """As the manifest has them: they are cleaned when they are drawn."""
    first_text: np.ndarray
    """int64 (rows + 1): captions of row r are texts[first_text[r] : first_text[r + 1]]."""
    image_ids: np.ndarray
    """int64 (rows,): of the pictures' content, so that copies under other keys or in other runs are known."""
    false_texts: dict[tuple[int, str], list[str]]
    """Captions that are known to be false, by number of the shard and key."""

    def shard_of(self, row: int) -> int:
        """The number of the shard that a row is in."""
        return int(np.searchsorted(self.first_rows, row, side="right")) - 1


class _EncodedPictures:
    """The files of the pictures, as the shards have them; a few shards at a time are held."""

    def __init__(self, index: _Index) -> None:
        self.groups = list(_group_shards(index.shards))
        self._index = index
        self._held: OrderedDict[int, dict[str, bytes]] = OrderedDict()

    def find(self, row: int) -> Decode:
        """What decodes the picture of a row; its shard is read whole when first needed, and given up for later ones."""
        number, keys = self._index.shard_of(row), self._index.keys
        if number not in self._held:
            while len(self._held) >= max(len(group) for group in self.groups):
                self._held.popitem(last=False)
            self._held[number] = _read_shard(self._index.shards[number], keys)
        self._held.move_to_end(number)
        return partial(_decode, keys[row], self._held[number][keys[row]])

    def clear(self) -> None:
        self._held.clear()


class RunPairs:
    """A dataset over shards; see `PairDataset`."""

    def __init__(
        self, index: _Index, files: _EncodedPictures, pictures: Pictures, run_weights: Sequence[float] = ()
    ) -> None:
        self._index, self._files = index, files
        self._run_weights = run_weights
        self._is_one_run = index.shards[0].number == index.shards[-1].number
        self.keys: Sequence[str] = index.keys
        self.image_ids = index.image_ids
        self.pictures = pictures

    @property
    def num_shown(self) -> int:
        """Images of an epoch: each as often as the weight of its run says."""
        if not self._run_weights:
            return len(self.keys)
        rows_and_weights = ((len(self._rows_of(number)), weight) for number, weight in enumerate(self._run_weights))
        return sum(int(weight) * num + _num_more(weight, num) for num, weight in rows_and_weights)

    def captions_of(self, row: int, *, clean: bool = True) -> list[str]:
        """The kept captions of an image; without `clean` as the manifest has them."""
        first, end = self._index.first_text[row : row + 2]
        texts = self._index.texts[first:end].to_pylist()
        return [clean_caption(text) for text in texts] if clean else texts

    def read_image(self, row: int) -> Image.Image:
        """The picture of a row in its own size, upright and RGB."""
        return self._files.find(row)()

    def run_of(self, row: int) -> str:
        """The run that a row is in, as it was named."""
        return str(self._index.shards[self._index.shard_of(row)].run.path)

    def false_captions_of(self, row: int) -> list[str]:
        """Captions of an image that are known to be false; none where they were not read."""
        return self._index.false_texts.get((self._index.shard_of(row), self.keys[row]), [])

    def order(self, seed: int, epoch: int, num_ranks: int = 1, batch_size: int = 1) -> np.ndarray:
        """In memory any order; streamed, groups of shards in random order, shuffled within a group.

        Streamed, each rank reads a stretch of that order of its own, so that ranks read different shards.
        """
        rng = np.random.default_rng((seed, epoch))
        shown = self._shown(rng)
        if self.pictures.in_memory:
            return rng.permutation(shown)
        shards, parts = self._index.shards, []
        for group in rng.permutation(len(self._files.groups)):
            first, last = shards[self._files.groups[group][0]], shards[self._files.groups[group][-1]]
            bounds = np.searchsorted(shown, [first.first, last.first + last.num_rows])
            parts.append(rng.permutation(shown[slice(*bounds)]))
        whole = np.concatenate(parts)
        num_steps = len(whole) // (num_ranks * batch_size)
        stretches = whole[: num_ranks * (len(whole) // num_ranks)].reshape(num_ranks, -1)[:, : num_steps * batch_size]
        return stretches.reshape(num_ranks, num_steps, batch_size).swapaxes(0, 1).reshape(-1)

    def _shown(self, rng: np.random.Generator) -> np.ndarray:
        """The rows of an epoch, ascending, as often as the weight of their run says."""
        if not self._run_weights:
            return np.arange(len(self.keys))
        times = np.zeros(len(self.keys), np.int64)
        for number, weight in enumerate(self._run_weights):
            rows = self._rows_of(number)
            times[rows] = int(weight)
            times[rng.permutation(rows)[: _num_more(weight, len(rows))]] += 1
        return np.repeat(np.arange(len(self.keys)), times)

    def _rows_of(self, number: int) -> np.ndarray:
        """The rows of a run, which follow each other."""
        own = [shard for shard in self._index.shards if shard.number == number]
        return np.arange(own[0].first, own[-1].first + own[-1].num_rows) if own else np.arange(0)

    def place_of(self, row: int) -> str:
        if self._is_one_run:
            return self.keys[row]
        return f"{self.keys[row]} of {self._index.shards[self._index.shard_of(row)].run.path}"

    def open(self) -> None:
        self.pictures.open()
        if self.pictures.in_memory:
            self._files.clear()

    def release(self) -> None:
        self._files.clear()

    def read_pixels(self, rows: np.ndarray, views: Sequence[View] | None) -> np.ndarray:
        return self.pictures.read(rows, views)


def _num_more(weight: float, num_rows: int) -> int:
    """Images that a fraction of a run's weight shows once more."""
    return round((weight - int(weight)) * num_rows)


def _is_known_false(table: pa.Table) -> pa.ChunkedArray:
    return pc.fill_null(pc.equal(table["drop_reason"], "known_false"), False)


def _read_index(runs: Sequence[RunDir | str | Path], known_false: bool) -> _Index:
    shards: list[_ShardRows] = []
    keys: list[pa.Array] = []
    texts: list[pa.Array] = []
    counts: list[np.ndarray] = []
    image_ids: list[np.ndarray] = []
    num_rows = 0
    false_texts: dict[tuple[int, str], list[str]] = {}
    columns = ["key", "text", "sha256", "kept", "drop_reason"]
    numbered = ((n, *found) for n, run in enumerate(runs) for found in iterate_manifest([run], columns))
    for number, run, shard, rows in numbered:
        table = rows.filter(pc.and_(rows["kept"], has_words(rows["text"])))  # "...", as some people write
        if not table.num_rows:
            continue
        for row in rows.filter(_is_known_false(rows)).to_pylist() if known_false else []:
            false_texts.setdefault((len(shards), row["key"]), []).append(clean_caption(row["text"]))
        runs_of_keys = pc.run_end_encode(table["key"].combine_chunks())  # the captions of a key stand side by side
        shards.append(_ShardRows(run, number, shard, num_rows, len(runs_of_keys.values)))
        num_rows += len(runs_of_keys.values)
        keys.append(runs_of_keys.values.cast(pa.large_string()))
        counts.append(np.diff(runs_of_keys.run_ends.to_numpy(), prepend=0))
        image_ids.append(_numbers_of(table["sha256"].take(runs_of_keys.run_ends.to_numpy() - 1)))
        texts.append(table["text"].combine_chunks().cast(pa.large_string()))
    if not keys:
        names = ", ".join(str(run.path if isinstance(run, RunDir) else run) for run in runs)
        raise UsageError(f"No kept pair in {names}. Lower the threshold: `capfilt select RUN --threshold 0.3`.")
    first_text = np.concatenate([[0], np.cumsum(np.concatenate(counts))])
    first_rows = np.array([shard.first for shard in shards])
    return _Index(
        shards, first_rows, _Texts(pa.concat_arrays(keys)), pa.concat_arrays(texts), first_text,
        np.concatenate(image_ids), false_texts,
    )  # fmt: skip


def _numbers_of(digests: pa.ChunkedArray) -> np.ndarray:
    """int64, 0 or more: the first 63 bits of sha256s in hexadecimal."""
    beginnings = "".join(pc.utf8_slice_codeunits(digests, 0, 16).to_pylist())
    return (np.frombuffer(bytes.fromhex(beginnings), ">u8") >> np.uint64(1)).astype(np.int64)


def _group_shards(shards: Sequence[_ShardRows]) -> Iterator[list[int]]:
    group: list[int] = []
    for number, shard in enumerate(shards):
        if group and sum(shards[n].num_rows for n in group) + shard.num_rows > SHUFFLED_SAMPLES:
            yield group
            group = []
        group.append(number)
    yield group


def _read_shard(rows: _ShardRows, keys: Sequence[str]) -> dict[str, bytes]:
    wanted = set(keys[rows.first : rows.first + rows.num_rows])
    found = {sample.key: sample.image for sample in read_samples(rows.run, rows.shard, wanted)}
    if missing := wanted - found.keys():
        raise CorruptionError(
            f"Shard {rows.shard} of {rows.run.path} lacks {len(missing)} samples of its manifest, the first "
            f"{min(missing)!r}. Look further: `capfilt verify {rows.run.path} --deep`."
        )
    return found


def _decode(key: str, encoded: bytes) -> Image.Image:
    try:
        return decode_image(encoded)
    except ImageRefused as refused:
        raise CorruptionError(f"The picture of {key!r} was committed but cannot be decoded: {refused}.") from refused
