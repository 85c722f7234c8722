"""What is timed of the whole of curation, JPEG in a tar to manifest, on one shard of photograph-sized pictures.

Sides: `capfilt run`'s pass over a shard; its models alone, on the same batches held in memory; and a plain script with
transformers and open_clip in three passes over the tar, batched or one picture at a time. Models are loaded before the
clock starts. The script is what a careful user writes: it encodes an image once for its texts.
"""

from __future__ import annotations

import atexit
import io
import itertools
import shutil
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, cast

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from torch import Tensor

from benchmarks.models import draw_pictures
from benchmarks.sides import (
    NUM_CAPTIONS,
    TEXTS,
    Case,
    Pass,
    match_texts,
    open_clip_model,
    transformers_captioner,
    transformers_filter,
)  # fmt: skip
from capfilt.curation.annotate import annotate
from capfilt.curation.import_shards import import_shards
from capfilt.curation.selection import captions_to_filter, rank_captions
from capfilt.curation.stage_models import StageModels
from capfilt.data.commit import read_table
from capfilt.data.images import decode_image
from capfilt.data.rundir import RunDir
from capfilt.data.shards import read_samples
from capfilt.weights.host_memory import keep_freed_memory

KEEP = 2
_ALL = ("captions", "clip", "itm", "manifest")


def write_shard(case: Case, folder: Path) -> Path:
    """A tar of `case.num_images` JPEGs with web captions."""
    path = folder / "shard.tar"
    pictures = draw_pictures(case.num_images)
    with tarfile.open(path, "w") as tar:
        for number, picture in enumerate(pictures):
            buffer = io.BytesIO()
            picture.save(buffer, "JPEG", quality=95)
            for suffix, data in (("jpg", buffer.getvalue()), ("txt", TEXTS[number % len(TEXTS)].encode())):
                member = tarfile.TarInfo(f"{number:06d}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return path


def _temporary_folder() -> Path:
    """Removed when the process ends."""
    folder = Path(tempfile.mkdtemp(prefix="capfilt-bench-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _stage_models(case: Case) -> StageModels:
    return StageModels(case.caption_settings(), case.rank_settings(), case.filter_settings())


class OurRun:
    """The pass over the shard that `capfilt run` makes, committed to a new generation each time."""

    def __init__(self, case: Case) -> None:
        folder = _temporary_folder()
        self._models, self._num_passes = _stage_models(case), 0
        self._num_pairs = case.num_images * (NUM_CAPTIONS + 1)
        self._path = RunDir.create(folder / "run").path
        import_shards([str(write_shard(case, folder))], RunDir.open(self._path))

    def __call__(self) -> object:
        """One pass."""
        self._num_passes += 1
        summary = annotate(self._open(), _ALL, models=self._models)
        assert summary.num_pairs == self._num_pairs
        return summary

    def read_manifest(self) -> list[dict[str, Any]]:
        """Rows of the last pass."""
        run = self._open()
        return [row for shard in run.shard_names() for row in read_table(run.read_file("manifest", shard)).to_pylist()]

    def _open(self) -> RunDir:
        return RunDir.open(self._path, f"pass-{self._num_passes}")


def our_models_alone(case: Case) -> Pass:
    """The same models on the same batches, prepared in memory; nothing is read or written."""
    folder, models = _temporary_folder(), _stage_models(case)
    run = RunDir.create(folder / "run")
    import_shards([str(write_shard(case, folder))], run)
    samples = [sample for shard in run.shard_names() for sample in read_samples(run, shard)]
    pictures = [decode_image(sample.image) for sample in samples]
    captioner, clip, itm = models.captioner, models.clip_scorer, models.itm_scorer
    keep_freed_memory()
    prepared = [[model.prepare(picture) for picture in pictures] for model in (captioner, clip, itm)]
    web = [sample.web_caption for sample in samples]

    def work() -> object:
        for start in range(0, len(samples), case.batch_size):
            part = slice(start, start + case.batch_size)
            features = captioner.encode(prepared[0][part])
            texts = captioner.caption_features(features, [sample.key for sample in samples[part]])
            texts = [[first, *own] for first, own in zip(web[part], texts, strict=True)]
            scores = clip.score(prepared[1][part], texts)
            itm.score(prepared[2][part], [_top(own, found) for own, found in zip(texts, scores, strict=True)])
        return None

    return work


def _top(texts: Sequence[str], scores: Sequence[float]) -> list[str]:
    captions = [(index, text, score) for index, (text, score) in enumerate(zip(texts, scores, strict=True), start=-1)]
    ranked = rank_captions(captions, include_web=False)
    return [caption.text for caption in captions_to_filter(ranked, keep=KEEP, include_web=False)]


def plain_script(case: Case) -> Pass:
    """Three passes over the tar, in batches: captions, CLIP scores of all texts, ITM of the web and the top texts."""
    folder = _temporary_folder()
    tar = write_shard(case, folder)
    write_captions, clip_scores, itm_scores = transformers_captioner(case), open_clip_model(case), _matcher(case)

    def work() -> object:
        rows: dict[str, dict[str, Any]] = {}
        for keys, pictures, web in _read_batches(tar, case.batch_size):
            texts = write_captions(pictures)
            for key, first, own in zip(keys, web, _by_image(texts), strict=True):
                rows[key] = {"key": key, "texts": [first, *own]}
        for keys, pictures, _ in _read_batches(tar, case.batch_size):
            found = clip_scores(pictures, [rows[key]["texts"] for key in keys])
            for key, scores in zip(keys, found.tolist(), strict=True):
                order = sorted(range(1, len(scores)), key=lambda index, own=scores: -own[index])
                rows[key] |= {"clip_scores": scores, "chosen": [0, *order[:KEEP]]}
        for keys, pictures, _ in _read_batches(tar, case.batch_size):
            texts = [rows[key]["texts"][index] for key in keys for index in rows[key]["chosen"]]
            for key, scores in zip(keys, itm_scores(pictures, texts).view(len(keys), -1).tolist(), strict=True):
                rows[key]["itm_scores"] = scores
        pq.write_table(pa.Table.from_pylist(list(rows.values())), folder / "manifest.parquet")
        return rows

    return work


def plain_script_one_by_one(case: Case) -> Pass:
    """The same, one picture at a time."""
    return plain_script(replace(case, batch_size=1))


def _by_image(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    return (texts[start : start + NUM_CAPTIONS] for start in range(0, len(texts), NUM_CAPTIONS))


def _matcher(case: Case) -> Callable[[Sequence[Image.Image], list[str]], Tensor]:
    model, processor = transformers_filter(case)
    return lambda pictures, texts: match_texts(model, processor, pictures, texts, case.torch_dtype)


def _read_batches(path: Path, batch_size: int) -> Iterator[tuple[list[str], list[Image.Image], list[str]]]:
    """Keys, pictures and web captions."""
    with tarfile.open(path) as tar:
        members = iter(tar)
        while batch := list(itertools.islice(members, 2 * batch_size)):
            data = [cast(IO[bytes], tar.extractfile(member)).read() for member in batch]
            pictures = [Image.open(io.BytesIO(jpeg)).convert("RGB") for jpeg in data[::2]]
            yield [Path(member.name).stem for member in batch[::2]], pictures, [text.decode() for text in data[1::2]]
