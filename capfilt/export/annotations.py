"""A folder of pictures and one JSON file of their captions, as LLaVA's training and COCO's tools read them.

In: images. Out: images/SHARD/KEY.jpg (the stored bytes) and llava.json or annotations.json, written as they come, so
that no more than one image is held.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from capfilt import __version__
from capfilt.export.images import CuratedImage, ExportSample, WrittenFile, written_file
from capfilt.settings.export import ExportSettings

PICTURES = "images"
LLAVA, COCO = "llava.json", "annotations.json"
PROMPT = "Describe this picture in one sentence."
"""What stands for the person in LLaVA's conversations. Its first stage of training passes it over."""


def write_llava(folder: Path, samples: Iterable[ExportSample], settings: ExportSettings) -> list[WrittenFile]:
    """llava.json: a conversation for every sample; its `image` is a path below images/."""
    num_samples = 0
    with _json_file(folder / LLAVA) as file:
        file.write("[")
        for sample, path in _with_pictures(folder, samples):
            turns = [
                {"from": "human", "value": f"<image>\n{PROMPT}"},
                {"from": "gpt", "value": sample.captions[0].text},
            ]
            _write(file, {"id": sample.key, "image": path, "conversations": turns}, first=num_samples == 0)
            num_samples += 1
        file.write("\n]\n")
    return [written_file(folder, LLAVA, num_samples)]


def write_coco(folder: Path, samples: Iterable[ExportSample], settings: ExportSettings) -> list[WrittenFile]:
    """annotations.json: `images` numbered from 1, and `annotations`, one for every sample."""
    captions, images = folder / ".annotations", 0
    num_samples = 0
    with _json_file(folder / COCO) as file, _json_file(captions) as later:
        info = {"description": "Image-text pairs curated by capfilt", "version": __version__}
        file.write(f'{{"info": {_dumped(info)}, "licenses": [], "images": [')
        last: CuratedImage | None = None
        for sample, path in _with_pictures(folder, samples):
            image = sample.image
            if image is not last:
                images, last = images + 1, image
                facts = {"width": image.sample.width, "height": image.sample.height, "url": image.sample.url}
                entry = {"id": images, "file_name": path, **facts, "key": image.sample.key}
                _write(file, entry, first=images == 1)
            caption, num_samples = sample.captions[0], num_samples + 1
            scores = {"clip_score": caption.clip_score, "itm_score": caption.itm_score}
            entry = {"id": num_samples, "image_id": images, "caption": caption.text, "source": caption.source, **scores}
            _write(later, entry, first=num_samples == 1)
        file.write('\n], "annotations": [')
        later.flush()
        with open(captions, encoding="utf-8", newline="") as written:
            shutil.copyfileobj(written, file, 1 << 20)
        file.write("\n]}\n")
    captions.unlink()
    return [written_file(folder, COCO, num_samples)]


def _with_pictures(folder: Path, samples: Iterable[ExportSample]) -> Iterator[tuple[ExportSample, str]]:
    """Each sample with its picture's path below images/, where it was written; once, however many samples it has."""
    (folder / PICTURES).mkdir()
    last: CuratedImage | None = None
    for sample in samples:
        image = sample.image
        if image is not last:
            path, last = folder / PICTURES / image.file_name, image
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "xb") as file:
                file.write(image.sample.image)
        yield sample, image.file_name


@contextmanager
def _json_file(path: Path) -> Iterator[Any]:
    with open(path, "x", encoding="utf-8", newline="") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def _write(file: Any, entry: dict[str, Any], *, first: bool) -> None:
    file.write(f"{'' if first else ','}\n{_dumped(entry)}")


def _dumped(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)
