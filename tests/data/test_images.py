"""Right pixels or a reason code, for every kind of picture and for bytes that only look like one."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from capfilt.data.images import FORMATS, ImageRefused, decode_image, probe_image
from capfilt.data.reasons import REASONS

DATA_DIR = Path(os.environ.get("CAPFILT_SHARED_DATA", Path(__file__).parents[3] / "shared" / "data"))
ORIENTATION = 0x0112

# images.py silences Pillow's warnings about odd metadata; pytest's own filters would undo that.
pytestmark = pytest.mark.filterwarnings("ignore:::PIL")


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def quadrants(width: int = 48, height: int = 32) -> Image.Image:
    """Red, green / blue, white: tells every orientation from the others."""
    pixels = np.zeros((height, width, 3), np.uint8)
    middle_y, middle_x = height // 2, width // 2
    pixels[:middle_y, :middle_x] = (255, 0, 0)
    pixels[:middle_y, middle_x:] = (0, 255, 0)
    pixels[middle_y:, :middle_x] = (0, 0, 255)
    pixels[middle_y:, middle_x:] = (255, 255, 255)
    return Image.fromarray(pixels)


def difference(found: Image.Image, expected: Image.Image) -> float:
    assert found.mode == "RGB"
    assert found.size == expected.size
    return float(np.abs(np.asarray(found, int) - np.asarray(expected.convert("RGB"), int)).mean())


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_that_is_read(kind: str) -> None:
    data = encoded(quadrants(), kind)
    assert probe_image(data) == (kind, 48, 32)
    assert difference(decode_image(data), quadrants()) < 8


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "tiff"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int, kind: str) -> None:
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = quadrants().transpose(undo[orientation]) if orientation in undo else quadrants()
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    options = {"quality": 95, "subsampling": 0} if kind == "jpeg" else {"lossless": True} if kind == "webp" else {}
    data = encoded(stored, kind, exif=exif, **options)
    assert difference(decode_image(data), quadrants()) < 8


def test_a_broken_exif_block_does_not_cost_the_picture() -> None:
    data = encoded(quadrants(), "jpeg", exif=b"Exif\0\0II*\0\xff\xff\xff\xff" + b"\xff" * 20)
    assert difference(decode_image(data), quadrants()) < 8


def ramp(dtype: type, high: float) -> np.ndarray:
    return np.tile(np.linspace(0, high, 64), (16, 1)).astype(dtype)


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        ("png", ramp(np.uint16, 65535)),
        ("tiff", ramp(np.uint16, 65535)),
        ("tiff", ramp(np.int32, 65535)),
        ("tiff", ramp(np.int32, 2**30)),
        ("tiff", ramp(np.float32, 1)),
        ("tiff", ramp(np.float32, 255)),
        ("tiff", ramp(np.float32, 1e6)),
    ],
)
def test_deep_greys_keep_their_shades(kind: str, values: np.ndarray) -> None:
    found = decode_image(encoded(Image.fromarray(values), kind))
    expected = Image.fromarray(ramp(np.uint8, 255))
    assert difference(found, expected) < 1


def test_values_that_are_not_finite_become_black() -> None:
    values = ramp(np.float32, 1)
    values[0, :3] = (np.nan, np.inf, -np.inf)
    pixels = np.asarray(decode_image(encoded(Image.fromarray(values), "tiff")))
    assert pixels[0, :3].max() == 0
    assert pixels[1, -1].min() == 255


def translucent(mode: str) -> Image.Image:
    image = Image.new("RGBA", (20, 10), (255, 0, 0, 255))
    image.paste((0, 0, 0, 0), (10, 0, 20, 10))
    return image.convert(mode)


@pytest.mark.parametrize(
    ("mode", "kind"), [("RGBA", "png"), ("LA", "png"), ("P", "png"), ("RGBA", "webp"), ("RGBA", "gif")]
)
def test_transparent_parts_are_white(mode: str, kind: str) -> None:
    pixels = np.asarray(decode_image(encoded(translucent(mode), kind)))
    assert pixels[:, 10:].min() > 250
    assert pixels[:, :9, 1].max() < 90


def test_palette_bilevel_grey_cmyk_and_lab() -> None:
    square = quadrants()
    assert difference(decode_image(encoded(square.quantize(8), "png")), square) < 2
    assert difference(decode_image(encoded(square.convert("L"), "png")), square.convert("L")) < 1
    bilevel = square.convert("L").point(lambda value: 255 * (value > 100)).convert("1")
    assert difference(decode_image(encoded(bilevel, "png")), bilevel) == 0
    assert difference(decode_image(encoded(square.convert("CMYK"), "jpeg", quality=95)), square) < 12
    assert difference(decode_image(encoded(square.convert("CMYK"), "tiff")), square) < 2
    lab = Image.new("LAB", (8, 8), (128, 128, 128))  # a middle grey; a and b are centred at 128
    pixels = np.asarray(decode_image(encoded(lab, "tiff")), int)
    assert np.abs(pixels - 119).max() < 6


@pytest.mark.parametrize("kind", ["gif", "png", "webp", "tiff"])
def test_of_an_animation_the_first_frame_counts(kind: str) -> None:
    frames = [Image.new("RGB", (16, 16), color) for color in ("red", "blue", "lime")]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    assert difference(decode_image(data), frames[0]) < 3


def test_what_stands_behind_a_picture_counts_for_nothing() -> None:
    """A phone's film behind its JPEG may hold any bytes; a second scan within it is one of the picture's."""
    picture = encoded(Image.new("RGB", (4000, 3000), (200, 30, 40)), "jpeg", progressive=True)
    decoded = decode_image(picture + b"\xff\xda\x00\x08" * 1000)
    assert decoded.size == (4000, 3000)
    last = picture.rindex(b"\xff\xda")
    with pytest.raises(ImageRefused, match="1,00. scans"):
        decode_image(picture[:last] + picture[last:-2] * 1000 + b"\xff\xd9")


def png_header(width: int, height: int) -> bytes:
    def chunk(name: bytes, content: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(name + content))
        return struct.pack(">I", len(content)) + name + content + checksum

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(100_000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def webp_header(width: int, height: int) -> bytes:
    extent = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    body = b"WEBPVP8X" + struct.pack("<I", 10) + b"\0\0\0\0" + extent
    return b"RIFF" + struct.pack("<I", len(body)) + body


REFUSED = {
    "a bomb": (png_header(60_000, 60_000), "too_many_pixels"),
    "just too large": (png_header(10_001, 5_000), "too_many_pixels"),
    "a WebP bomb": (webp_header(16_000, 16_000), "too_many_pixels"),
    "very long": (png_header(1, 60_000), "bad_aspect_ratio"),
    "no pixels": (b"GIF89a" + struct.pack("<HHBBB", 0, 10, 0, 0, 0) + b";", "bad_image"),
    "nothing": (b"", "not_an_image"),
    "a page": (b"<!DOCTYPE html><title>404</title>", "not_an_image"),
    "a drawing": (b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>', "unsupported_format"),
    "a document": (b"%PDF-1.7", "unsupported_format"),
    "PostScript": (b"%!PS-Adobe-3.0 EPSF-3.0", "unsupported_format"),
    "HEIC": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "unsupported_format"),
    "half a JPEG": (encoded(quadrants(400, 300), "jpeg")[:2000], "truncated_image"),
    "half a PNG": (encoded(quadrants(), "png")[:90], "truncated_image"),
    "half a WebP": (encoded(quadrants(400, 300), "webp")[:200], "truncated_image"),
    "a JPEG's first bytes": (b"\xff\xd8\xff\xe0", None),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_says_why(case: str) -> None:
    data, reason = REFUSED[case]
    with pytest.raises(ImageRefused) as refused:
        decode_image(data)
    assert refused.value.reason in REASONS
    assert reason is None or refused.value.reason == reason, refused.value.detail


def test_limits_are_the_callers() -> None:
    data = encoded(quadrants(100, 20), "png")
    with pytest.raises(ImageRefused, match="too_many_pixels"):
        decode_image(data, max_pixels=1999)
    with pytest.raises(ImageRefused, match="bad_aspect_ratio"):
        decode_image(data, max_aspect_ratio=4.9)
    assert decode_image(data, max_pixels=2000, max_aspect_ratio=5).size == (100, 20)
    webp = encoded(quadrants(100, 20), "webp")  # needs twice the memory of others while it is decoded
    assert decode_image(webp, max_pixels=4000).size == (100, 20)
    with pytest.raises(ImageRefused, match="too_many_pixels"):
        decode_image(webp, max_pixels=3999)


MEASURE = """
import sys
from capfilt.data.images import decode_image
decode_image(open(sys.argv[1], "rb").read())
# Not getrusage: its peak counts the process that this one was forked from.
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(int(peak.split()[1]) // 1024)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of memory is read from Linux's /proc")
def test_the_largest_picture_is_decoded_within_512_mb(tmp_path: Path) -> None:
    path = tmp_path / "large.jpg"
    Image.new("CMYK", (7071, 7071), (200, 100, 50, 25)).save(path)
    measured = subprocess.run([sys.executable, "-c", MEASURE, str(path)], capture_output=True, check=True)
    assert int(measured.stdout) <= 512


SEEDS = [encoded(quadrants(), kind) for kind in FORMATS] + [
    encoded(Image.fromarray(ramp(np.uint16, 65535)), "tiff"),
    encoded(translucent("P"), "png"),
    encoded(quadrants().convert("CMYK"), "jpeg"),
]


@settings(max_examples=400, deadline=None)
@given(
    st.sampled_from(SEEDS),
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=6),
    st.floats(0.02, 1),
    st.binary(max_size=8),
)
def test_nothing_but_a_refusal_is_raised_for_mutated_images(
    data: bytes, changes: list[tuple[float, int]], share: float, tail: bytes
) -> None:
    mutated = bytearray(data)
    for place, value in changes:
        mutated[int(place * len(mutated))] = value
    mutated = mutated[: max(1, int(len(mutated) * share))] + tail
    for read in (decode_image, probe_image):
        result = outcome(read, bytes(mutated))
        assert result is None or result in REASONS


def outcome(read: Callable[[bytes], object], data: bytes) -> str | None:
    """The reason code, None when `data` was read."""
    try:
        found = read(data)
    except ImageRefused as refused:
        return refused.reason
    assert isinstance(found, tuple) or (isinstance(found, Image.Image) and found.mode == "RGB")
    return None


@pytest.mark.skipif(
    not (DATA_DIR / "malformed_images.tar.xz").exists(),
    reason="malformed_images.tar.xz is not here; name its folder in CAPFILT_SHARED_DATA",
)
def test_a_thousand_odd_and_malformed_files() -> None:
    outcomes: Counter[str | None] = Counter()
    turned: dict[str, Image.Image] = {}
    with tarfile.open(DATA_DIR / "malformed_images.tar.xz") as archive:
        for member in archive:
            if not member.isfile():
                continue
            data = archive.extractfile(member).read()  # type: ignore[union-attr]
            folder, _, name = member.name.rpartition("/")
            if folder == "exif_orientation" and name.endswith(".jpg"):
                turned[name] = decode_image(data).resize((60, 60))
                outcomes[None] += 1
            else:
                outcomes[outcome(decode_image, data)] += 1
    assert set(outcomes) - {None} <= set(REASONS)
    assert outcomes[None] >= 850
    assert outcomes.total() >= 1300
    # The orientation set shows one scene stored in eight ways: upright, all look alike.
    for shape in ("Landscape", "Portrait"):
        upright = turned[f"{shape}_1.jpg"]
        for orientation in range(2, 9):
            assert difference(turned[f"{shape}_{orientation}.jpg"], upright) < 25
