"""Curated shards: WebDataset tars of the kept pairs alone, which webdataset, wids and open_clip_train read.

In: samples. Out: a folder with
    00000.tar         KEY.jpg|png|webp (the stored bytes), KEY.txt (the caption), KEY.json (all captions, scores, facts)
    00000.parquet     the rows of that tar, with img2dataset's columns
    shardindex.json   how many samples each tar has: wids' index
    sizes.json        the same for open_clip_train, which then needs no --train-num-samples
`capfilt import` takes them; with --human all captions of KEY.json are kept as they are.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from capfilt.data.tars import BLOCK, write_tar
from capfilt.data.whole_folders import write_json
from capfilt.export.images import ExportSample, WrittenFile, cut, written_file
from capfilt.export.tables import write_rows
from capfilt.settings.export import ExportSettings

_TEXT_BLOCKS = 6
"""Of a sample's three headers, its caption and its metadata, about."""


def write_tars(folder: Path, samples: Iterable[ExportSample], settings: ExportSettings) -> list[WrittenFile]:
    """Write the tars and what lies beside them; gives the tars."""
    tars = list[WrittenFile]()
    for part in cut(samples, _num_bytes, settings):
        path, rows = folder / f"{len(tars):05d}.tar", list[dict[str, Any]]()
        write_tar(path, _members(part, rows))
        write_rows(path.with_suffix(".parquet"), rows)
        tars.append(written_file(folder, path.name, len(rows)))
    shards = [{"url": tar.name, "nsamples": tar.num_samples, "filesize": tar.num_bytes} for tar in tars]
    index = {"__kind__": "wids-shard-index-v1", "wids_version": 1, "shardlist": shards}
    write_json(folder / "shardindex.json", index)
    write_json(folder / "sizes.json", {tar.name: tar.num_samples for tar in tars})
    return tars


def _num_bytes(sample: ExportSample) -> int:
    return len(sample.image.sample.image) + _TEXT_BLOCKS * BLOCK


def _members(samples: Iterator[ExportSample], rows: list[dict[str, Any]]) -> Iterator[tuple[str, bytes]]:
    """The members of a tar; the row of every sample is noted on the way."""
    for sample in samples:
        row = sample.row()
        rows.append(row)
        yield f"{sample.key}.{sample.image.extension}", sample.image.sample.image
        yield f"{sample.key}.txt", row["caption"].encode()
        yield f"{sample.key}.json", json.dumps(row, ensure_ascii=False, allow_nan=False).encode()
