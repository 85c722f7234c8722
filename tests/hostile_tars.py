"""Tars that others might give: members that are no plain files, headers that lie, ends that are none."""

from __future__ import annotations

import io
import tarfile
import tempfile


def packed(*members: tuple[tarfile.TarInfo, bytes], kind: int = tarfile.GNU_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=kind) as tar:
        for info, content in members:
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def info(name: str, size: int = 0, kind: bytes = tarfile.REGTYPE, **fields: object) -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    made.size, made.type = size, kind
    for field, value in fields.items():
        setattr(made, field, value)
    return made


GOOD = info("good.jpg", 3), b"abc"
ABSOLUTE = f"{tempfile.gettempdir()}/capfilt-hostile-tars/a.jpg"
"""Where a reader that believes absolute names could write."""
BAD_MEMBERS = {
    "parent folder": (info("../a.jpg", 1), b"x"),
    "parent folder within": (info("a/../../b.jpg", 1), b"x"),
    "absolute": (info(ABSOLUTE, 1), b"x"),
    "doubled slash": (info("a//b.jpg", 1), b"x"),
    "symbolic link": (info("a.jpg", 0, tarfile.SYMTYPE, linkname="/etc/passwd"), b""),
    "hard link": (info("a.jpg", 0, tarfile.LNKTYPE, linkname="good.jpg"), b""),
    "character device": (info("a.jpg", 0, tarfile.CHRTYPE), b""),
    "block device": (info("a.jpg", 0, tarfile.BLKTYPE), b""),
    "pipe": (info("a.jpg", 0, tarfile.FIFOTYPE), b""),
    "contiguous": (info("a.jpg", 1, tarfile.CONTTYPE), b"x"),
    "GNU sparse": (info("a.jpg", 0, tarfile.GNUTYPE_SPARSE), b""),
    "escape in the name": (info("a\x1b]0;x\x07.jpg", 1), b"x"),
    "line break in the name": (info("a\nb.jpg", 1), b"x"),
    "not UTF-8": (info("a\udcff.jpg", 1), b"x"),
    "PAX sparse": (info("a.jpg", 1, pax_headers={"GNU.sparse.major": "1", "GNU.sparse.name": "b"}), b"x"),
    "absolute by PAX": (info("a.jpg", 1, pax_headers={"path": ABSOLUTE}), b"x"),
}


WHOLE = packed((info("a.jpg", 700), b"x" * 700), (info("b.jpg", 600), b"y" * 600), kind=tarfile.USTAR_FORMAT)
END = 512 * 6
"""First zero block of WHOLE."""
TERABYTE = info("a.jpg", 1 << 40).tobuf(tarfile.GNU_FORMAT)
DAMAGED = {
    "nothing": b"",
    "text": b"<html>404</html>" * 200,
    "gzip": b"\x1f\x8b\x08" + bytes(2000),
    "a member of 1 TiB": TERABYTE + bytes(4096),
    "a negative size": TERABYTE[:124] + b"\xff" * 12 + TERABYTE[136:] + bytes(1024),
    "data behind the end": WHOLE[: END + 1024] + WHOLE,
    "one byte behind the end": WHOLE + b"x",
    "a broken second header": WHOLE[: 512 * 3 + 5] + b"\x80" + WHOLE[512 * 3 + 6 :],
    "a huge PAX header": info("p", 70_000, tarfile.XHDTYPE).tobuf(tarfile.USTAR_FORMAT) + bytes(80_000),
    "a PAX header that is none": info("p", 5, tarfile.XHDTYPE).tobuf(tarfile.USTAR_FORMAT) + b"abcde" + bytes(507),
    "a PAX size that is none": packed((info("a.jpg", 1, pax_headers={"size": "-5"}), b"x"), kind=tarfile.PAX_FORMAT),
}
