"""Safe decoding of images that nobody vouches for.

In: encoded bytes. Out: the upright first picture as 8-bit RGB, or ImageRefused with a reason code; nothing else is ever
raised, but MemoryError where the process has none left, which is not the picture's fault. The format is told from the
first bytes and only that format's decoder sees the data; the size is checked as the header states it, before any pixel
is allocated.
"""

from __future__ import annotations

import io
import logging
import re
import struct
import warnings
from collections.abc import Iterator

import numpy as np
from PIL import Image, ImageCms, UnidentifiedImageError
from PIL.Image import Transpose

from capfilt.data.memory import require_memory
from capfilt.data.reasons import REASON_SENTENCES
from capfilt.data.texts import clean_for_terminal

MAX_PIXELS = 50_000_000
"""Largest picture decoded by default; for WebP and AVIF half of it. Keeps a decode within 512 MB."""
MAX_ASPECT_RATIO = 20.0
"""Longest edge over shortest edge at most, by default."""

FORMATS = ("jpeg", "png", "webp", "gif", "bmp", "tiff", "avif")
"""Formats that are read."""

_MAGIC: tuple[tuple[bytes, str], ...] = (
    (b"\xff\xd8\xff", "jpeg"),
    (b"\x89PNG\r\n\x1a\n", "png"),
    (b"GIF87a", "gif"),
    (b"GIF89a", "gif"),
    (b"BM", "bmp"),
    (b"II*\0", "tiff"),
    (b"MM\0*", "tiff"),
    (b"II+\0", "tiff"),
    (b"MM\0+", "tiff"),
)
_OTHER_FORMATS = (
    b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51", b"8BPS", b"\0\0\1\0", b"\0\0\2\0", b"%PDF", b"%!PS", b"<svg",
    b"DDS ", b"icns", b"\xff\x0a", b"\0\0\0\x0cJXL ", b"P1", b"P2", b"P3", b"P4", b"P5", b"P6", b"P7",
    b"SIMPLE", b"\x01\xda", b"\x76\x2f\x31\x01", b"#?RADIANCE", b"\xd7\xcd\xc6\x9a", b"FORM", b"qoif",
)  # fmt: skip
# A JPEG's marker, but for those that stand alone, in a scan's data too. Its length follows, but for the end, D9.
_SEGMENT = re.compile(rb"\xff+([^\x00\x01\xd0-\xd8\xff])")
_ORIENTATION_TAG = 0x0112
_BITS_PER_SAMPLE_TAG = 0x0102
_TURNS = {
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}
# Pillow holds a WebP in four canvases while it decodes it and an AVIF in three; half the pixels need the same
# memory as a whole JPEG or PNG (measured at 50 megapixels: 800 and 520 MB against 420).
_PIXEL_SHARE = {"webp": 0.5, "avif": 0.5}
# A JPEG may have any number of scans, each of which costs a pass over all pixels (0.7 ns a pixel): cameras and encoders
# write at most a dozen or two. A TIFF may cut its pixels into any number of tiles, each of which costs 6 us, a PNG its
# file into any number of chunks, 3 us each.
_MAX_SCANNED_PIXELS = 2_000_000_000
_MAX_TILES = 200_000
_MAX_CHUNKS = 200_000
_TILE_TAGS = frozenset({0x0111, 0x0117, 0x0144, 0x0145})  # offsets and sizes of strips, of tiles
_MAX_ENTRIES = 4096
# Pictures of odd modes are converted in bands of rows, so that memory stays near the result's.
_BAND_PIXELS = 1 << 20

# Pillow warns and logs about odd metadata of pictures that it decodes all the same; what it refuses, it
# raises.
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("PIL").addHandler(logging.NullHandler())


class ImageRefused(Exception):  # noqa: N818 - a verdict on the image, not a failure of the program
    """The bytes are no picture that capfilt works on."""

    def __init__(self, reason: str, detail: str) -> None:
        if reason not in REASON_SENTENCES:
            raise ValueError(f"{reason!r} is not a reason code")
        self.reason = reason
        self.detail = clean_for_terminal(detail)
        super().__init__(f"{reason}: {self.detail}")


def probe_image(data: bytes) -> tuple[str, int, int]:
    """Give (format, width, height) as the header states them, in pixels, orientation not applied.

    Decodes no pixel. Raises ImageRefused.
    """
    image, kind = _open(data, max_pixels=None, max_aspect_ratio=None)
    return kind, image.width, image.height


def decode_image(
    data: bytes, *, max_pixels: int = MAX_PIXELS, max_aspect_ratio: float = MAX_ASPECT_RATIO
) -> Image.Image:
    """Decode the first picture in `data` to RGB, upright, 8 bits a channel.

    EXIF orientation is applied; transparent parts are laid over white; a palette is looked up; an animation
    gives its first frame. 16-bit greys are divided by 257 (or by their stated depth); floating-point greys
    within [0, 1] are taken as such, within [0, 255] as they are, and stretched from least to greatest
    otherwise, as 32-bit integers are. CMYK and YCbCr are converted without their colour profile.

    WebP and AVIF may have half of `max_pixels`. Raises ImageRefused, and nothing else, for whatever the
    bytes are; MemoryError where the process has no memory left.
    """
    image, kind = _open(data, max_pixels=max_pixels, max_aspect_ratio=max_aspect_ratio)
    try:
        image.load()
        return upright_rgb(image)
    except Exception as error:  # Pillow's decoders fail with about twenty kinds of errors
        raise _refusal(error, kind, data) from None


def upright_rgb(image: Image.Image) -> Image.Image:
    """A picture that Pillow has opened as `decode_image` gives it; the errors are Pillow's."""
    turn = _TURNS.get(_orientation(image))
    rgb = _to_rgb(image)
    del image
    if turn is not None:
        rgb = rgb.transpose(turn)
    rgb.info = {}
    return rgb


def _open(data: bytes, max_pixels: int | None, max_aspect_ratio: float | None) -> tuple[Image.Image, str]:
    kind = _sniff(data)
    if max_pixels is not None:
        max_pixels = int(max_pixels * _PIXEL_SHARE.get(kind, 1))
    if kind == "webp" and (size := _webp_size(data)):
        # Pillow allocates a WebP's canvas when it opens it
        _check_size(*size, max_pixels, max_aspect_ratio)
    if kind == "tiff":
        _check_tiles(data)
    if kind == "png":
        _check_chunks(data)
    try:
        image = Image.open(io.BytesIO(data), formats=[kind.upper()])
        width, height = image.size
    except Exception as error:
        raise _refusal(error, kind, data) from None
    _check_size(width, height, max_pixels, max_aspect_ratio)
    if kind == "jpeg":
        _check_scans(image, data)
    return image, kind


def _sniff(data: bytes) -> str:
    for magic, kind in _MAGIC:
        if data.startswith(magic):
            return kind
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    if data[4:8] == b"ftyp":
        if b"avif" in data[8:64] or b"avis" in data[8:64]:
            return "avif"
        raise ImageRefused("unsupported_format", f"ISO media file of the brand {data[8:12]!r}")
    if data.startswith(_OTHER_FORMATS) or b"<svg" in data[:1024]:
        raise ImageRefused("unsupported_format", f"begins with {data[:8]!r}; read are {', '.join(FORMATS)}")
    raise ImageRefused("not_an_image", f"begins with {data[:16]!r}" if data else "no bytes")


def _webp_size(data: bytes) -> tuple[int, int] | None:
    """Size of a WebP's canvas from its first chunk; None when there is none that says."""
    chunk, body = data[12:16], data[20:30]
    if len(body) < 10:
        return None
    if chunk == b"VP8X":
        return 1 + int.from_bytes(body[4:7], "little"), 1 + int.from_bytes(body[7:10], "little")
    if chunk == b"VP8 ":
        width, height = struct.unpack("<HH", body[6:10])
        return width & 0x3FFF, height & 0x3FFF
    if chunk == b"VP8L":
        bits = int.from_bytes(body[1:5], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    return None


def _check_size(width: int, height: int, max_pixels: int | None, max_aspect_ratio: float | None) -> None:
    if min(width, height) < 1:
        raise ImageRefused("bad_aspect_ratio", f"{width} x {height} pixels")
    if max_pixels is not None and width * height > max_pixels:
        raise ImageRefused("too_many_pixels", f"{width} x {height} pixels; at most {max_pixels:,} in all")
    if max_aspect_ratio is not None and max(width, height) > max_aspect_ratio * min(width, height):
        raise ImageRefused("bad_aspect_ratio", f"{width} x {height} pixels; at most {max_aspect_ratio:g} to 1")


def _check_scans(image: Image.Image, data: bytes) -> None:
    """Refuse a JPEG in so many scans that decoding it would take long."""
    num_scans = _count_scans(data)
    if num_scans * image.width * image.height > _MAX_SCANNED_PIXELS:
        raise ImageRefused("bad_image", f"jpeg: {num_scans:,} scans of {image.width} x {image.height} pixels")


def _count_scans(data: bytes) -> int:
    """Scans up to the end of the picture; other files may stand behind it, such as a phone's film."""
    num_scans, place = 0, 2
    for _ in range(_MAX_CHUNKS):
        found = _SEGMENT.search(data, place)
        if found is None or found[1] == b"\xd9":
            return num_scans
        num_scans += found[1] == b"\xda"
        place = found.end() + int.from_bytes(data[found.end() : found.end() + 2], "big")
    raise ImageRefused("bad_image", f"jpeg: more than {_MAX_CHUNKS:,} segments")


def _check_tiles(data: bytes) -> None:
    """Refuse a TIFF that its first directory cuts into very many strips or tiles; Pillow lists them on opening."""
    order = "<" if data[:1] == b"I" else ">"
    is_big = data[2:4] in (b"+\0", b"\0+")
    start, offset, counter, entry, entry_bytes = (8, "Q", "Q", "HHQ", 20) if is_big else (4, "I", "H", "HHI", 12)
    try:
        (place,) = struct.unpack_from(order + offset, data, start)
        (num_entries,) = struct.unpack_from(order + counter, data, place)
        place += struct.calcsize(order + counter)
        for number in range(min(num_entries, _MAX_ENTRIES)):
            tag, _, count = struct.unpack_from(order + entry, data, place + number * entry_bytes)
            if tag in _TILE_TAGS and count > _MAX_TILES:
                raise ImageRefused("bad_image", f"tiff: {count:,} strips or tiles; at most {_MAX_TILES:,}")
    except (struct.error, OverflowError):
        return  # the directory is not whole, which Pillow will say


def _check_chunks(data: bytes) -> None:
    """Refuse a PNG in very many chunks; Pillow looks at each of them."""
    place = 8  # behind the signature
    for _ in range(_MAX_CHUNKS):
        if place + 12 > len(data):
            return
        place += 12 + int.from_bytes(data[place : place + 4], "big")
    raise ImageRefused("bad_image", f"png: more than {_MAX_CHUNKS:,} chunks")


def _refusal(error: Exception, kind: str, data: bytes) -> ImageRefused:
    """What an error of a decoder means. Raises MemoryError where it may come of a lack of memory."""
    require_memory()
    detail = f"{kind}: {type(error).__name__}: {error}"
    if isinstance(error, Image.DecompressionBombError | MemoryError):
        return ImageRefused("too_many_pixels", detail)
    if isinstance(error, UnidentifiedImageError):
        detail = f"{kind}: the header is not valid"
    is_short_riff = kind == "webp" and int.from_bytes(data[4:8], "little") + 8 > len(data)
    if is_short_riff or isinstance(error, EOFError) or "truncated" in str(error).lower():
        return ImageRefused("truncated_image", detail)
    return ImageRefused("bad_image", detail)


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 when it is absent or the EXIF block is broken: the picture is still good."""
    try:
        value = image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:
        return 1
    return value if isinstance(value, int) else 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image.copy()  # a plain Image: no file, no decoder behind it
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        return _deep_grey_to_rgb(image)
    if image.mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        converted = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
        if converted is None:
            raise ValueError("LAB picture was not converted")
        return converted
    if not image.has_transparency_data:
        return image.convert("RGB")
    canvas = Image.new("RGB", image.size, (255, 255, 255))
    for top, bottom in _bands(image):
        band = image.crop((0, top, image.width, bottom))
        band = band.convert("LA") if band.mode == "La" else band
        band = band.convert("RGBA")
        canvas.paste(band, (0, top), mask=band.getchannel("A"))
    return canvas


def _deep_grey_to_rgb(image: Image.Image) -> Image.Image:
    """Scale greys of more than 8 bits to 8; values that are not finite become black."""
    low, high = _grey_range(image)
    scale = 255.0 / (high - low) if high > low else 0.0
    canvas = Image.new("RGB", image.size)
    for top, bottom in _bands(image):
        values = np.asarray(image.crop((0, top, image.width, bottom)), dtype=np.float64)
        values = np.where(np.isfinite(values), (values - low) * scale, 0.0)
        grey = np.clip(np.rint(values), 0, 255).astype(np.uint8)
        canvas.paste(Image.fromarray(grey).convert("RGB"), (0, top))
    return canvas


def _grey_range(image: Image.Image) -> tuple[float, float]:
    """The values that become black and white."""
    if image.mode.startswith("I;"):
        bits = 16
        if image.format == "TIFF":
            bits = image.tag_v2.get(_BITS_PER_SAMPLE_TAG, (16,))[0]  # type: ignore[attr-defined]
        return 0.0, float(2 ** min(max(int(bits), 1), 16) - 1)
    lows, highs = [0.0], [0.0]
    for top, bottom in _bands(image):
        values = np.asarray(image.crop((0, top, image.width, bottom)), dtype=np.float64)
        finite = values[np.isfinite(values)]
        if finite.size:
            lows.append(float(finite.min()))
            highs.append(float(finite.max()))
    low, high = min(lows), max(highs)
    if low < 0 or high > 65535 or (image.mode == "F" and high > 255):
        return min(lows[1:]), max(highs[1:])
    if image.mode == "F":
        return 0.0, 1.0 if high <= 1 else 255.0
    return 0.0, 255.0 if high <= 255 else 65535.0


def _bands(image: Image.Image) -> Iterator[tuple[int, int]]:
    rows = max(1, _BAND_PIXELS // image.width)
    for top in range(0, image.height, rows):
        yield top, min(top + rows, image.height)
