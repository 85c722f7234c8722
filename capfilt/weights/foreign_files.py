"""What a file is that was given for weights and holds none that are read: told from its first bytes, for messages.

In: a path. Out: a few words. Nothing of the file is run: of a pickle the operations are listed, not followed.
"""

from __future__ import annotations

import io
import pickletools
import re
import zipfile
from pathlib import Path

_MOST_BYTES = 16 << 20
"""Of a file, or of a pickle in an archive, that are looked at."""
_PLAIN = re.compile(r"collections\.OrderedDict|torch\._utils\._rebuild_\w+|torch\.\w+Storage")
"""What a pickle of plain tensors names."""
_MOST_NAMES = 3
_STARTS = {
    b"version https://git-lfs": "a Git LFS pointer that stands for the file (`git lfs pull` fetches it)",
    b"\x93NUMPY": "a NumPy array",
    b"\x1f\x8b": "a gzip file",
    b"PAR1": "a Parquet file",
    b"GGUF": "a GGUF model",
    b"\x7fELF": "a program",
}


def describe_file(path: Path) -> str:
    """What the file at `path` is, such as "a pickle that calls posix.system"."""
    try:
        with open(path, "rb") as file:
            head = file.read(_MOST_BYTES)
        if zipfile.is_zipfile(path):
            return _describe_archive(path)
    except (OSError, zipfile.BadZipFile, RuntimeError, NotImplementedError):  # the last two: encrypted, odd methods
        return "no readable file"
    if not head:
        return "empty"
    for start, what in _STARTS.items():
        if head.startswith(start):
            return what
    if head.lstrip()[:20].lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return "a page of HTML or XML"
    if len(head) > 8 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 30:
        return "damaged safetensors" if path.suffix == ".safetensors" else "safetensors under another name"
    return _describe_names(_names_of_pickles(head))


def _describe_archive(path: Path) -> str:
    with zipfile.ZipFile(path) as archive:
        members = archive.namelist()
        if any("/code/" in name for name in members) and any(name.endswith("constants.pkl") for name in members):
            return "a TorchScript archive, a program"
        found: list[str] = []
        for name in members:
            if name.endswith(".pkl"):
                with archive.open(name) as file:
                    found += _names_of_pickles(file.read(_MOST_BYTES))
    return _describe_names(found) if found else "an archive without tensors"


def _describe_names(names: list[str]) -> str:
    foreign = list(dict.fromkeys(name for name in names if not _PLAIN.fullmatch(name)))
    if foreign:
        more = f" and {len(foreign) - _MOST_NAMES} more" if len(foreign) > _MOST_NAMES else ""
        return f"a pickle that calls {', '.join(foreign[:_MOST_NAMES])}{more}"
    return "a damaged file of tensors" if names else "no file of tensors"


def _names_of_pickles(data: bytes) -> list[str]:
    """What the pickles that `data` begins with import, as module.name; torch's old form has several in a row."""
    stream, names = io.BytesIO(data), list[str]()
    while stream.tell() < len(data):
        try:
            _list_names(stream, names)
        except Exception:  # what follows is no pickle: pickletools raises a dozen kinds of errors then
            break
    return names


def _list_names(stream: io.BytesIO, names: list[str]) -> None:
    """Adds what one pickle imports. A name on the stack is taken to be made of the last two texts put there."""
    texts: list[str] = []
    memo: dict[int, str] = {}
    for opcode, argument, _ in pickletools.genops(stream):
        if opcode.name in ("GLOBAL", "INST"):
            names.append(str(argument).replace(" ", ".", 1))
        elif opcode.name == "STACK_GLOBAL" and len(texts) > 1:
            names.append(".".join(texts[-2:]))
        elif opcode.name == "MEMOIZE":
            memo[len(memo)] = texts[-1] if texts else ""
        elif opcode.name in ("PUT", "BINPUT", "LONG_BINPUT"):
            memo[int(argument or 0)] = texts[-1] if texts else ""
        elif opcode.name in ("GET", "BINGET", "LONG_BINGET"):
            texts.append(memo.get(int(argument or 0), ""))
        elif isinstance(argument, str):
            texts.append(argument)
