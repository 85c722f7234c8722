"""Parquet files of an export: a row a sample, with the picture's bytes or without.

In: samples. Out: files as img2dataset writes them (their rows beside its tars, and its output format `parquet`), and a
folder that Hugging Face's `datasets` loads and streams, with the picture as its `Image`. Rows stand in small groups, so
that a reader of a stream holds few pictures.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from capfilt import __version__
from capfilt.export.images import ExportSample, WrittenFile, cut, written_file
from capfilt.settings.export import ExportSettings

_GROUP_ROWS, _GROUP_BYTES = 100, 32 << 20
"""Rows and bytes of pictures in a group; a hundred rows are what `datasets` writes for pictures."""

ROWS = pa.schema(
    {
        "url": pa.string(), "caption": pa.string(), "key": pa.string(), "status": pa.string(),
        "error_message": pa.string(), "width": pa.int32(), "height": pa.int32(), "original_width": pa.int32(),
        "original_height": pa.int32(), "sha256": pa.string(), "source": pa.string(), "clip_score": pa.float32(),
        "itm_score": pa.float32(), "captions": pa.list_(pa.string()), "sources": pa.list_(pa.string()),
        "clip_scores": pa.list_(pa.float32()), "itm_scores": pa.list_(pa.float32()),
    }
)  # fmt: skip
"""Columns of `ExportSample.row`."""
_WITH_BYTES = ROWS.append(pa.field("jpg", pa.binary()))
_LEFT_OUT = ("caption", "captions", "status", "error_message")  # the first two have other names there
_WITH_IMAGE = pa.schema(
    [
        pa.field("image", pa.struct({"bytes": pa.binary(), "path": pa.string()})),
        pa.field("text", pa.string()),
        pa.field("texts", pa.list_(pa.string())),
        *(field for field in ROWS if field.name not in _LEFT_OUT),
    ]
)


def write_rows(path: Path, rows: Iterable[dict[str, Any]], schema: pa.Schema = ROWS) -> int:
    """Write a new file, durably, and give the number of its rows."""
    texts: Any = [field.name for field in schema if field.name not in ("image", "jpg")]  # the stubs know no list
    num_rows = 0
    with open(path, "xb") as file:
        with pq.ParquetWriter(
            file, schema, compression="zstd", use_dictionary=texts, write_page_checksum=True
        ) as writer:
            for group in _groups(rows):
                writer.write_batch(pa.RecordBatch.from_pylist(group, schema=schema))
                num_rows += len(group)
        file.flush()
        os.fsync(file.fileno())
    return num_rows


def write_img2dataset(folder: Path, samples: Iterable[ExportSample], settings: ExportSettings) -> list[WrittenFile]:
    """00000.parquet, …, with img2dataset's columns and the pictures' bytes, as they are stored, in `jpg`."""
    rows = ((sample, sample.row() | {"jpg": sample.image.sample.image}) for sample in samples)
    return _write_files(folder, "{:05d}.parquet", rows, _WITH_BYTES, settings)


def write_datasets(folder: Path, samples: Iterable[ExportSample], settings: ExportSettings) -> list[WrittenFile]:
    """data/train-00000.parquet, …, with `image` and `text`, and the card that tells `datasets` so.

    Parquet rather than a folder of pictures or tars: features are typed, a stream reads a group of rows at a time, and
    the Hub's viewer and SQL read it as it is.
    """
    (folder / "data").mkdir()
    rows = ((sample, _dataset_row(sample)) for sample in samples)
    schema = _WITH_IMAGE.with_metadata({"huggingface": json.dumps({"info": {"features": _features(_WITH_IMAGE)}})})
    files = _write_files(folder, "data/train-{:05d}.parquet", rows, schema, settings)
    (folder / "README.md").write_text(_card(sum(file.num_samples for file in files)), encoding="utf-8")
    return files


def _write_files(
    folder: Path,
    name: str,
    rows: Iterator[tuple[ExportSample, dict[str, Any]]],
    schema: pa.Schema,
    settings: ExportSettings,
) -> list[WrittenFile]:
    files = list[WrittenFile]()
    for part in cut(rows, lambda entry: len(entry[0].image.sample.image), settings):
        file = name.format(len(files))
        num_rows = write_rows(folder / file, (row for _, row in part), schema)
        files.append(written_file(folder, file, num_rows))
    return files


def _groups(rows: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    group: list[dict[str, Any]] = []
    size = 0
    for row in rows:
        group.append(row)
        size += len(row.get("jpg") or row.get("image", {}).get("bytes") or b"")
        if len(group) >= _GROUP_ROWS or size >= _GROUP_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


def _dataset_row(sample: ExportSample) -> dict[str, Any]:
    row = sample.row()
    image = {"bytes": sample.image.sample.image, "path": f"{sample.key}.{sample.image.extension}"}
    kept = {name: value for name, value in row.items() if name not in _LEFT_OUT}
    return {"image": image, "text": row["caption"], "texts": row["captions"], **kept}


def _features(schema: pa.Schema) -> dict[str, Any]:
    """The columns as `datasets` writes them into its files."""

    def one(kind: pa.DataType) -> dict[str, Any]:
        if pa.types.is_struct(kind):
            return {"_type": "Image"}
        if pa.types.is_list(kind):
            return {"feature": one(kind.value_type), "_type": "Sequence"}
        return {"dtype": {pa.float32(): "float32"}.get(kind, str(kind)), "_type": "Value"}

    return {field.name: one(field.type) for field in schema}


def _card(num_samples: int) -> str:
    columns = "\n".join(f"| `{name}` | {what} |" for name, what in _COLUMNS.items())
    return f"""---
configs:
- config_name: default
  data_files:
  - split: train
    path: data/train-*.parquet
task_categories:
- image-to-text
tags:
- capfilt
---

# Curated image-text pairs

{num_samples:,} samples, curated by capfilt {__version__}: captions from the web and synthetic ones, kept where an
image-text filter took them for a match (BLIP's CapFilt).

| column | what |
|---|---|
{columns}

Pictures and texts from the web are their authors'.
"""


_COLUMNS = {
    "image": "the picture as it was stored",
    "text": "its kept caption with the highest ITM score",
    "texts": "all kept captions in that order; `sources`, `clip_scores` and `itm_scores` are of these",
    "key": "the sample's name in the run",
    "url": "where the picture came from",
    "width, height": "of the stored picture in pixels; `original_…` of the one that was found",
    "sha256": "of the picture's bytes",
    "source": "of `text`: web, synthetic or human",
    "clip_score": "of `text`: cosine similarity, -1 to 1",
    "itm_score": "of `text`: probability of a match, 0 to 1",
}
