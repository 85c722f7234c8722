"""Samples of a foreign tar: its members joined by key, their texts and image checked.

In: the members of a tar, in order. Out: a `FoundSample` for every sample that was there, with what is stored
of it or the reason why it is refused. Nothing in it is trusted: captions must be text, metadata a JSON object
of moderate size, the image decodable within the limits.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from capfilt.data.foreign_tars import ForeignMember
from capfilt.data.images import ImageRefused, decode_image, probe_image
from capfilt.data.tars import MAX_MEMBER_BYTES
from capfilt.data.texts import clean_for_terminal
from capfilt.settings import DownloadSettings

IMAGE_ENDINGS = frozenset({"jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif"})
MAX_METADATA_BYTES = 256 * 1024
"""Longest KEY.json that is read and kept."""

_STORED_FORMATS = {"jpeg": "jpg", "png": "png", "webp": "webp"}


@dataclass(slots=True)
class FoundSample:
    """A sample as it stands in the tar, then what became of it."""

    original_key: str
    """Its key in the tar; empty where that has none."""
    members: dict[str, bytes] = field(default_factory=dict)
    """Ending → content."""
    key: str = ""
    """Its key in the run."""
    caption: str = ""
    reason: str | None = None
    """Why it is refused; None while it is not."""
    detail: str = ""
    values: dict[str, Any] = field(default_factory=dict)
    """Further columns of the sample's row."""
    image: bytes = b""
    """What is stored."""
    refused: bytes = b""
    """What was refused."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """The object in KEY.json."""

    def refuse(self, reason: str, detail: str, refused: bytes = b"") -> None:
        """Mark it as refused; the first reason stands."""
        if self.reason is None:
            self.reason, self.detail, self.refused = reason, clean_for_terminal(detail), refused


def check_sample(sample: FoundSample, settings: DownloadSettings) -> FoundSample:
    """Read texts and image of `sample`, filling in what is stored or the reason of its refusal."""
    if sample.reason is None:
        _read_texts(sample, settings.max_caption_bytes)
    if sample.reason is None:
        _read_image(sample, settings)
    return sample


def look_at_sample(sample: FoundSample) -> FoundSample:
    """Read the texts of `sample` and the header of its image: `caption`, and url, width, height, image_ext in `values`.

    Or the reason why an import would refuse it, as far as that shows without decoding.
    """
    _read_texts(sample, DownloadSettings.max_caption_bytes)
    if sample.reason is None and (found := _only_image(sample)):
        try:
            kind, width, height = probe_image(found)
        except ImageRefused as refused:
            sample.refuse(refused.reason, refused.detail)
        else:
            ending = _STORED_FORMATS.get(kind, kind)
            sample.values = {"url": _url_of(sample), "width": width, "height": height, "image_ext": ending}
    return sample


def group_members(members: Iterable[ForeignMember]) -> Iterator[FoundSample]:
    """Join neighbouring members of one key to samples; a damaged end becomes a sample of its own."""
    current: FoundSample | None = None
    for member in members:
        folder, slash, base = member.name.rpartition("/")
        stem, _, ending = base.partition(".")
        if member.reason is None and (not stem or not ending):
            continue  # .DS_Store, README: webdataset takes no sample from it either
        key = folder + slash + stem
        if current is None or current.original_key != key or not key:
            if current is not None:
                yield current
            current = FoundSample(original_key=key)
        if member.reason is not None:
            current.refuse(member.reason, member.detail)
        elif (ending := ending.lower()) in current.members:
            current.refuse("duplicate_key", f"{member.name} stands twice")
        elif ending in IMAGE_ENDINGS or ending in ("txt", "json"):
            current.members[ending] = member.content
    if current is not None:
        yield current


def _read_texts(sample: FoundSample, max_caption_bytes: int) -> None:
    """Find the web caption and the metadata, or refuse the sample."""
    encoded = sample.members.get("json", b"")
    problem = None
    try:
        if len(encoded) > MAX_METADATA_BYTES:
            raise ValueError(f"{len(encoded):,} bytes; at most {MAX_METADATA_BYTES:,} are read")
        metadata = json.loads(encoded) if encoded else {}
        if not isinstance(metadata, dict):
            raise ValueError("it is not an object")
        json.dumps(metadata, allow_nan=False).encode("ascii")
        sample.metadata = metadata
    except (ValueError, RecursionError) as error:
        problem = f"{sample.original_key}.json: {error}"
    try:
        if "txt" in sample.members:
            caption = sample.members["txt"].decode("utf-8-sig")
        else:
            if problem:
                raise ValueError(problem)
            caption = _caption_of(sample.metadata)
        num_bytes = len(caption.encode("utf-8"))  # a lone surrogate out of the JSON fails here
    except ValueError as error:
        sample.refuse("bad_caption", str(error))
        return
    sample.caption = re.sub(r"\r?\n\Z", "", caption)  # a text file ends its last line
    if num_bytes > max_caption_bytes:
        sample.refuse("caption_too_long", f"{num_bytes:,} bytes; at most {max_caption_bytes:,}")


def _caption_of(metadata: dict[str, Any]) -> str:
    caption = metadata.get("caption")
    if caption is None and metadata.get("captions"):
        captions = metadata["captions"]
        caption = captions[0] if isinstance(captions, list) else captions
    if caption is None:
        return ""
    if not isinstance(caption, str):
        raise ValueError(f"the caption in the JSON is a {type(caption).__name__}; expected a text")
    return caption


def _read_image(sample: FoundSample, settings: DownloadSettings) -> None:
    """Decode the image; stored are its own bytes, or a PNG where our shards do not have its format."""
    found = _only_image(sample)
    if found is None:
        return
    try:
        kind, width, height = probe_image(found)
        picture = decode_image(found, max_pixels=settings.max_pixels, max_aspect_ratio=settings.max_aspect_ratio)
    except ImageRefused as refused:
        sample.refuse(refused.reason, refused.detail, found)
        return
    stored = found
    if kind not in _STORED_FORMATS:
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")
        stored = buffer.getvalue()
        if len(stored) > MAX_MEMBER_BYTES:
            sample.refuse("member_too_large", f"{len(stored):,} bytes as PNG", found)
            return
    sizes = [sample.metadata.get(f"original_{edge}") for edge in ("width", "height")]
    if not all(type(size) is int and 0 < size < 2**31 for size in sizes):
        sizes = [width, height]
    sample.image = stored
    sample.values = {
        "url": _url_of(sample),
        "width": picture.width,
        "height": picture.height,
        "original_width": sizes[0],
        "original_height": sizes[1],
        "sha256": hashlib.sha256(stored).hexdigest(),
        "image_length": len(stored),
        "image_ext": _STORED_FORMATS.get(kind, "png"),
    }


def _only_image(sample: FoundSample) -> bytes | None:
    """The sample's image; where it has not exactly one it is refused."""
    images = [content for ending, content in sample.members.items() if ending in IMAGE_ENDINGS]
    if len(images) == 1:
        return images[0]
    sample.refuse("several_images" if images else "missing_image", f"members: {', '.join(sample.members)}")
    return None


def _url_of(sample: FoundSample) -> str | None:
    url = sample.metadata.get("url")
    return url.encode("utf-8", "replace").decode() if isinstance(url, str) else None
