"""Columns of every stage's Parquet file. Readers and writers of the contract use these and nothing else."""

from __future__ import annotations

import pyarrow as pa

WEB_CAPTION_INDEX = -1
"""`caption_index` of the web caption; synthetic captions count from 0."""

HUMAN = "human"
"""`source` of captions that people wrote and that are kept without being judged; they count from 0."""

SUCCESS = "success"
STATUSES = (SUCCESS, "failed_to_download", "failed_to_resize")
"""Values of the shards' column `status`, as img2dataset names them."""

IMAGE_EXTENSIONS = ("jpg", "png", "webp")
"""Endings of the image members of our shards."""


def _schema(**types: pa.DataType) -> pa.Schema:
    return pa.schema([pa.field(name, kind) for name, kind in types.items()])


SCHEMAS: dict[str, pa.Schema] = {
    "shards": _schema(
        key=pa.string(),
        url=pa.string(),
        caption=pa.string(),
        status=pa.string(),  # one of STATUSES
        error_message=pa.string(),
        width=pa.int32(),  # of the upright stored picture, in pixels
        height=pa.int32(),
        original_width=pa.int32(),  # of the picture as it was found
        original_height=pa.int32(),
        sha256=pa.string(),  # of the image bytes stored in the tar; null without success
        reason=pa.string(),  # one of REASONS; null on success
        image_offset=pa.int64(),  # of the image's first byte in the tar; null without success
        image_length=pa.int64(),
        image_ext=pa.string(),  # one of IMAGE_EXTENSIONS
    ),
    "captions": _schema(key=pa.string(), caption_index=pa.int32(), text=pa.string()),
    "clip": _schema(
        key=pa.string(),
        caption_index=pa.int32(),
        source=pa.string(),  # web | synthetic
        text=pa.string(),
        clip_score=pa.float32(),  # cosine similarity, -1…1; null for an empty text
        rank=pa.int32(),  # 1 = best of the ranked distinct captions of the image; null when not ranked
        duplicate_of=pa.int32(),  # caption_index of the caption that reads the same; null when none
    ),
    "itm": _schema(key=pa.string(), caption_index=pa.int32(), itm_score=pa.float32()),  # score 0…1
    "manifest": _schema(
        shard=pa.string(),
        key=pa.string(),
        url=pa.string(),
        caption_index=pa.int32(),
        source=pa.string(),  # web | synthetic | human
        text=pa.string(),
        clip_score=pa.float32(),
        rank=pa.int32(),
        itm_score=pa.float32(),
        kept=pa.bool_(),
        drop_reason=pa.string(),  # one of DROP_REASONS; null when kept
        width=pa.int32(),
        height=pa.int32(),
        sha256=pa.string(),
    ),
}
"""Stage → columns. The shards may have further columns behind these: what the URL table carried along."""

QUARANTINE_SCHEMA = _schema(
    key=pa.string(),
    shard=pa.string(),
    stage=pa.string(),
    reason=pa.string(),  # one of REASONS
    detail=pa.string(),
    sha256=pa.string(),  # of the bytes refused, where there were any
    bytes=pa.int64(),
)
"""Columns of the quarantine files."""
