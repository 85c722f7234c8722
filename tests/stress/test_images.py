"""Row 11: pictures of every kind, odd and hostile: right pixels or a reason code, within 512 MB and 5 s each.

Every picture is decoded in a process of its own, of which processor time (what else the machine does is no fault of the
picture's) and peak of memory are taken. The pixels are compared
with those of OpenCV, which decodes JPEG, PNG, WebP, TIFF and AVIF without Pillow.
"""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from capfilt.data.images import ImageRefused, decode_image
from capfilt.data.reasons import REASONS
from tests.data.test_images import DATA_DIR, ORIENTATION, REFUSED, encoded, quadrants, ramp, translucent
from tests.stress.conftest import FULL, Figure

pytestmark = [
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of memory is read from Linux's /proc"),
    pytest.mark.filterwarnings("ignore:::PIL"),
]

LONGEST_SECONDS, MOST_MB = 5.0, 512

DECODE_EACH = """
import json, os, signal, sys, time
from capfilt.data.images import ImageRefused, decode_image
for path in sys.stdin.read().splitlines():
    reader, writer = os.pipe()
    if (pid := os.fork()) == 0:
        signal.setitimer(signal.ITIMER_PROF, 20)  # of processor time
        signal.alarm(120)
        data = open(path, "rb").read()
        start = time.process_time()
        try:
            decode_image(data)
            outcome = "decoded"
        except ImageRefused as refused:
            outcome = refused.reason
        except BaseException as error:
            outcome = f"ESCAPED {type(error).__name__}: {error}"
        seconds = time.process_time() - start
        peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
        os.write(writer, json.dumps([outcome, seconds, int(peak.split()[1]) / 1024]).encode())
        os._exit(0)
    os.close(writer)
    said = os.read(reader, 65536)
    os.close(reader)
    status = os.waitpid(pid, 0)[1]
    print(json.dumps([path, *(json.loads(said) if said else [f"DIED with status {status}", 0, 0])]), flush=True)
"""


@dataclass(frozen=True)
class Outcome:
    """What became of one picture."""

    outcome: str
    seconds: float
    """Of processor time."""
    peak_mb: float


def decode_each(paths: list[Path]) -> dict[Path, Outcome]:
    done = subprocess.run(
        [sys.executable, "-c", DECODE_EACH],
        input="\n".join(map(str, paths)),
        capture_output=True,
        text=True,
        check=True,
    )
    found = [json.loads(line) for line in done.stdout.splitlines()]
    return {Path(path): Outcome(*rest) for path, *rest in found}


# --- pictures -----------------------------------------------------------------------------------------------


def oriented() -> Iterator[tuple[str, bytes]]:
    for kind in ("jpeg", "png", "webp", "tiff"):
        for orientation in range(1, 9):
            exif = Image.Exif()
            exif[ORIENTATION] = orientation
            options = {"quality": 95} if kind == "jpeg" else {"lossless": True} if kind == "webp" else {}
            yield f"{kind} of orientation {orientation}", encoded(quadrants(), kind, exif=exif, **options)


def odd() -> Iterator[tuple[str, bytes]]:
    square = quadrants()
    frames = [Image.new("RGB", (16, 16), color) for color in ("red", "blue", "lime")]
    yield "16-bit PNG", encoded(Image.fromarray(ramp(np.uint16, 65535)), "png")
    yield "16-bit TIFF", encoded(Image.fromarray(ramp(np.uint16, 65535)), "tiff")
    yield "32-bit TIFF", encoded(Image.fromarray(ramp(np.int32, 2**30)), "tiff")
    yield "float TIFF", encoded(Image.fromarray(ramp(np.float32, 1)), "tiff")
    yield "CMYK JPEG", encoded(square.convert("CMYK"), "jpeg", quality=95)
    yield "CMYK TIFF", encoded(square.convert("CMYK"), "tiff")
    yield "palette with alpha", encoded(translucent("P"), "png")
    yield "grey with alpha", encoded(translucent("LA"), "png")
    yield "RGBA", encoded(translucent("RGBA"), "png")
    yield "RGBA WebP", encoded(translucent("RGBA"), "webp", lossless=True)
    yield "one bit", encoded(square.convert("1"), "png")
    yield "progressive", encoded(square, "jpeg", progressive=True, quality=95)
    for kind in ("gif", "png", "webp", "tiff"):
        yield f"animated {kind}", encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    for kind in ("bmp", "avif", "webp", "tiff"):
        yield f"plain {kind}", encoded(square, kind)
    for compression in ("tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg"):
        yield f"TIFF by {compression}", encoded(square, "tiff", compression=compression)


def largest() -> Iterator[tuple[str, bytes]]:
    """As many pixels as are let through, in every format."""
    for kind, edge in (("jpeg", 7071), ("png", 7071), ("gif", 7071), ("bmp", 2580), ("tiff", 7071)):
        options = {"compression": "jpeg"} if kind == "tiff" else {}
        yield f"largest {kind}", encoded(noise(edge), kind, **options)
    yield "largest webp", encoded(noise(5000), "webp", method=0)
    yield "largest avif", encoded(noise(5000), "avif", speed=10)
    yield "largest progressive", encoded(noise(7071), "jpeg", progressive=True)
    yield "largest CMYK", encoded(noise(7071).convert("CMYK"), "jpeg")


def noise(edge: int) -> Image.Image:
    """Coarse noise: not so smooth that a decoder has nothing to do."""
    coarse = np.random.default_rng(0).integers(0, 256, (edge // 64 + 1, edge // 64 + 1, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((edge, edge), Image.Resampling.BILINEAR)


def slow_to_decode() -> Iterator[tuple[str, bytes]]:
    """Small files that keep a decoder busy."""
    yield "JPEG of 50,000 scans", many_scans(7000, 50_000)
    yield "JPEG of 30 scans", many_scans(7000, 20)
    yield "BMP by runs of one pixel", run_length_bmp(7000)
    yield "TIFF of a million tiles", tiny_tiles(1000)
    yield "TIFF of two million tiles", tiny_tiles(1500)
    yield "TIFF of 198,000 tiles", tiny_tiles(445)
    yield "BigTIFF of two million tiles", big_tiny_tiles(1500, "<")
    yield "BigTIFF of two million tiles, the other way round", big_tiny_tiles(1500, ">")
    yield "PNG of a million chunks", many_chunks(1_000_000)
    yield "PNG of 199,000 chunks", many_chunks(199_000)
    yield "PNG that unpacks to gigabytes", png_bomb()
    yield (
        "GIF that says nothing",
        b"GIF89a" + struct.pack("<HHBBB", 7000, 7000, 0, 0, 0) + b"\x21\xfe\x01a\x00" * 500_000,
    )


def many_scans(edge: int, number: int) -> bytes:
    """A progressive JPEG whose last scan is repeated."""
    data = encoded(Image.new("L", (edge, edge), 128), "jpeg", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * number + b"\xff\xd9"


def run_length_bmp(edge: int) -> bytes:
    """8-bit BMP by run lengths, every run one pixel long."""
    palette = b"".join(bytes([n, n, n, 0]) for n in range(256))
    rows = min(edge, 9_000_000 // (2 * edge))
    body = (b"\x01\x40" * edge + b"\x00\x00") * rows + b"\x00\x01"
    header = struct.pack("<IiiHHIIiiII", 40, edge, edge, 1, 8, 1, len(body), 0, 0, 256, 0)
    offset = 14 + len(header) + len(palette)
    return b"BM" + struct.pack("<IHHI", offset + len(body), 0, 0, offset) + header + palette + body


def tiny_tiles(edge: int) -> bytes:
    """A grey TIFF in tiles of one pixel."""
    num = edge * edge
    entries = [
        (256, 3, 1, edge), (257, 3, 1, edge), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (277, 3, 1, 1),
        (322, 3, 1, 1), (323, 3, 1, 1), (324, 4, num, 200), (325, 4, num, 200 + 4 * num),
    ]  # fmt: skip
    directory = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", *entry) for entry in entries) + bytes(4)
    head = b"II*\0" + struct.pack("<I", 8) + directory
    offsets = np.full(num, 8, "<u4").tobytes()
    return head.ljust(200, b"\0") + offsets + np.ones(num, "<u4").tobytes()


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def big_tiny_tiles(edge: int, order: str) -> bytes:
    """The head of a BigTIFF in tiles of one pixel."""
    entries = [(256, 3, 1, edge), (257, 3, 1, edge), (324, 16, edge * edge, 200), (325, 16, edge * edge, 200)]
    directory = struct.pack(f"{order}Q", len(entries)) + b"".join(
        struct.pack(f"{order}HHQQ", *entry) for entry in entries
    )
    return (b"II+\0" if order == "<" else b"MM\0+") + struct.pack(f"{order}HHQ", 8, 0, 16) + directory + bytes(8)


def many_chunks(number: int) -> bytes:
    """A PNG with a million chunks that nobody knows before its pixels."""
    data = encoded(quadrants(), "png")
    return data[:33] + chunk(b"teSt", b"x") * number + data[33:]


def png_bomb() -> bytes:
    """A PNG of few pixels whose data unpack to far more than these."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 100, 100, 8, 2, 0, 0, 0))
    squeezer = zlib.compressobj(9)
    body = b"".join(squeezer.compress(bytes(1 << 24)) for _ in range(256 if FULL else 16)) + squeezer.flush()
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def hostile() -> Iterator[tuple[str, bytes]]:
    for name, (data, _) in REFUSED.items():
        yield name, data
    png = encoded(quadrants(), "png")
    jpeg = encoded(quadrants(), "jpeg")
    wide = struct.pack(">HH", 65500, 65500)
    sof = jpeg.index(b"\xff\xc0") + 5
    yield "JPEG of 65,500 x 65,500", jpeg[:sof] + wide + jpeg[sof + 4 :]
    yield "long text in a PNG", png[:33] + chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(200_000_000), 9)) + png[33:]
    yield "long profile in a PNG", png[:33] + chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(200_000_000), 9)) + png[33:]
    yield "GIF of 65,535 x 65,535", b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0, 0, 0) + b";"
    yield "TIFF that points at itself", b"II*\0" + struct.pack("<IH", 8, 0) + struct.pack("<I", 8)
    yield "BMP of negative sizes", b"BM" + struct.pack("<IHHI", 0, 0, 0, 54) + struct.pack("<IiiHH", 40, -5, -9, 1, 24)
    yield "script and picture at once", png + b"<script>alert(1)</script>"


def pictures() -> Iterator[tuple[str, bytes]]:
    for group in (oriented, odd, hostile, *((slow_to_decode, largest) if FULL else ())):
        yield from group()


def check_bounds(outcomes: dict[Path, Outcome], names: Callable[[Path], str] = lambda path: path.name) -> None:
    escaped = {names(path): one.outcome for path, one in outcomes.items() if one.outcome not in {*REASONS, "decoded"}}
    assert escaped == {}
    slow = {names(path): one.seconds for path, one in outcomes.items() if one.seconds > LONGEST_SECONDS}
    large = {names(path): one.peak_mb for path, one in outcomes.items() if one.peak_mb > MOST_MB}
    assert (slow, large) == ({}, {})


def test_pictures_of_every_kind(tmp_path: Path, figure: Figure) -> None:
    paths: dict[Path, str] = {}
    for number, (name, data) in enumerate(pictures()):
        path = tmp_path / f"{number:03d}"
        path.write_bytes(data)
        paths[path] = name
    outcomes = decode_each(list(paths))
    assert outcomes.keys() == paths.keys()
    for path, one in outcomes.items():
        if paths[path] in REFUSED:
            assert one.outcome == REFUSED[paths[path]][1] or REFUSED[paths[path]][1] is None
    decoded = sum(one.outcome == "decoded" for one in outcomes.values())
    slowest, largest_ = max(one.seconds for one in outcomes.values()), max(one.peak_mb for one in outcomes.values())
    figure(11, f"{len(paths)} pictures made for it: {decoded} decoded, the others with a reason; at most "
               f"{slowest:.1f} s and {largest_:.0f} MB")  # fmt: skip
    check_bounds(outcomes, lambda path: paths[path])


# --- beside OpenCV ------------------------------------------------------------------------------------------


def decode_by_opencv(data: bytes) -> np.ndarray | None:
    """RGB (H, W, 3) of 8 bits, upright, transparent parts over white; None where OpenCV does not read it."""
    buffer = np.frombuffer(data, np.uint8)
    try:
        plain = cv2.imdecode(buffer, cv2.IMREAD_COLOR)
        whole = cv2.imdecode(buffer, cv2.IMREAD_UNCHANGED)
    except cv2.error:
        return None
    if plain is None or whole is None:
        return None
    if whole.ndim == 3 and whole.shape[2] == 4 and whole.shape[:2] == plain.shape[:2]:
        most = np.iinfo(whole.dtype).max
        alpha = whole[..., 3:] / most
        plain = np.rint(255 * (whole[..., :3] / most * alpha + 1 - alpha)).astype(np.uint8)
    return plain[..., ::-1]


def difference(data: bytes) -> float | None:
    """Mean difference of the values of both decoders; None where one of them refuses."""
    try:
        ours = np.asarray(decode_image(data), dtype=int)
    except ImageRefused:
        return None
    theirs = decode_by_opencv(data)
    if theirs is None:
        return None
    return float(np.abs(ours - theirs).mean()) if ours.shape == theirs.shape else float("inf")


cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
OTHERWISE_IN_OPENCV = ("32-bit TIFF", "float TIFF", "CMYK")
"""Of these there is no one right picture in 8 bits, or OpenCV has another rule."""


def test_the_pixels_are_those_of_another_decoder(figure: Figure) -> None:
    compared = {}
    for group in (oriented, odd):
        for name, data in group():
            if not name.startswith(OTHERWISE_IN_OPENCV) and (found := difference(data)) is not None:
                compared[name] = found
    assert {name: found for name, found in compared.items() if found > 3} == {}
    assert len(compared) >= 40
    figure(
        11,
        f"{len(compared)} of them as OpenCV decodes them, within {max(compared.values()):.1f} levels of 255 in "
        "the mean",
    )


NO_ORIENTATION_IN_OPENCV = ("avif/rot", "_orientation_", "xmp_tags_orientation", "exif_imagemagick")
OTHER_PICTURE_IN_OPENCV = ("/apng/", "Lab.tif", "lab.tif", "RGBa", "dispose_bgnd")
"""Animations whose first frame is not taken, colours outside RGB, alpha that is multiplied in or left out."""


@pytest.mark.skipif(
    not (DATA_DIR / "malformed_images.tar.xz").exists(),
    reason="malformed_images.tar.xz is not here; name its folder in CAPFILT_SHARED_DATA",
)
def test_the_malformed_archive(tmp_path: Path, figure: Figure) -> None:
    names: dict[Path, str] = {}
    with tarfile.open(DATA_DIR / "malformed_images.tar.xz") as archive:
        members = [member for member in archive if member.isfile()][:: 1 if FULL else 20]
        for number, member in enumerate(members):
            path = tmp_path / f"{number:05d}"
            path.write_bytes(archive.extractfile(member).read())  # type: ignore[union-attr]
            names[path] = member.name
    outcomes = decode_each(list(names))
    counts = Counter("decoded" if one.outcome == "decoded" else "refused" for one in outcomes.values())
    slowest, largest_ = max(one.seconds for one in outcomes.values()), max(one.peak_mb for one in outcomes.values())
    figure(11, f"{len(names):,} odd and malformed files: {counts['decoded']:,} decoded, {counts['refused']:,} with a "
               f"reason, 0 exceptions; at most {slowest:.1f} s and {largest_:.0f} MB")  # fmt: skip
    check_bounds(outcomes, lambda path: names[path])
    compared = {
        names[path]: found
        for path, one in outcomes.items()
        if one.outcome == "decoded" and (found := difference(path.read_bytes())) is not None
    }
    known = (*NO_ORIENTATION_IN_OPENCV, *OTHER_PICTURE_IN_OPENCV)
    comparable = {name: found for name, found in compared.items() if not any(part in name for part in known)}
    other = {name: round(found, 1) for name, found in comparable.items() if found > 8}
    figure(
        11, f"{len(comparable) - len(other):,} of the {len(comparable):,} that OpenCV reads alike are the same picture"
    )
    assert len(other) <= 3, other
