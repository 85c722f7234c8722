"""Pictures as web servers hand them out: encoded in the usual formats, and in the odd ones.

In: pixels and a recipe (format, oddity). Out: the bytes of the file. The oddities show the same picture to a
decoder that does its work; `truncated` does not decode.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[np.uint8]
"""(height, width, 3) RGB."""

_ORIENTATION_TAG = 0x0112
_STORED = {
    # EXIF orientation → how the upright picture is turned before it is stored
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}

MEDIA_TYPES = {"jpg": "image/jpeg", "png": "image/png", "webp": "image/webp"}
"""Ending of a file → what a server calls it."""


def encode_picture(pixels: Pixels, ending: str, quality: int) -> bytes:
    """Encode in the format of `ending` (jpg, png or webp) at a JPEG or WebP quality."""
    image = Image.fromarray(pixels)
    if ending == "png":
        return _saved(image, "PNG", compress_level=1)
    if ending == "webp":
        return _saved(image, "WEBP", quality=quality, method=0)
    return _saved(image, "JPEG", quality=quality)


def _saved(image: Image.Image, format_name: str, **options: object) -> bytes:
    sink = io.BytesIO()
    image.save(sink, format_name, **options)
    return sink.getvalue()


def _cmyk(pixels: Pixels, quality: int) -> bytes:
    return _saved(Image.fromarray(pixels).convert("CMYK"), "JPEG", quality=quality)


def _rotated(pixels: Pixels, quality: int) -> bytes:
    orientation = 2 + int(pixels[0, 0].sum()) % 7
    exif = Image.Exif()
    exif[_ORIENTATION_TAG] = orientation
    stored = Image.fromarray(pixels).transpose(_STORED[orientation])
    return _saved(stored, "JPEG", quality=quality, exif=exif)


def _palette(pixels: Pixels, quality: int) -> bytes:
    return _saved(Image.fromarray(pixels).quantize(255), "PNG")


def _alpha(pixels: Pixels, quality: int) -> bytes:
    image = Image.fromarray(pixels)
    image.putalpha(255)
    return _saved(image, "PNG", compress_level=1)


def _deep(pixels: Pixels, quality: int) -> bytes:
    """A PNG with 16 bits a channel, which Pillow cannot write: signature, header, rows, end (PNG §5, §11)."""
    height, width, _ = pixels.shape
    rows = (pixels.astype(">u2") * 257).reshape(height, -1).view(np.uint8)
    filtered = np.concatenate([np.zeros((height, 1), np.uint8), rows], axis=1).tobytes()
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(filtered, 1)),
        (b"IEND", b""),
    ]
    framed = (
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


def _truncated(pixels: Pixels, quality: int) -> bytes:
    whole = encode_picture(pixels, "jpg", quality)
    return whole[: len(whole) * 6 // 10]


ODD_PICTURES: dict[str, tuple[str, Callable[[Pixels, int], bytes]]] = {
    "cmyk": ("jpg", _cmyk),
    "rotated": ("jpg", _rotated),
    "palette": ("png", _palette),
    "alpha": ("png", _alpha),
    "deep": ("png", _deep),
    "truncated": ("jpg", _truncated),
}
"""Oddity → ending of the file and its encoder."""
