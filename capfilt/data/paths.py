"""Where a run lies: in a folder of this machine, or under a prefix of an object store.

In: a path or an address (`s3://BUCKET/RUN`, `gs://BUCKET/RUN`). Out: a `Path`, or fsspec's counterpart of it, and the
few questions that both are asked. Nothing that an object store said is remembered: other machines write there too. What
cannot be asked is an error, never "it is not there".
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from capfilt.errors import CapfiltError, MissingPackageError, StoreError, UsageError

if TYPE_CHECKING:
    from upath import UPath

    AnyPath = Path | UPath
else:
    AnyPath = object  # for the command line; the other class is loaded where an address asks for it

_PIECE_BYTES = 16 << 20
_CANCEL_SECONDS = 0.05
"""In which a request that was cancelled lets go of its connection."""
MAX_FILE_BYTES = 2**31
"""Largest file with rows that is read; one shard's are far below it."""

_PACKAGES = {"s3": ("s3fs", "s3"), "gs": ("gcsfs", "gs")}
"""Protocol → the package that speaks it, and our extra that installs it. Others lack puts that replace nothing."""


def path_of(named: str | AnyPath) -> AnyPath:
    """The path that a user named. UsageError for an address of a kind that no run can lie at."""
    if not isinstance(named, str):
        return named
    protocol, is_address, place = named.partition("://")
    if not is_address and not named.startswith(tuple(f"{known}:" for known in _PACKAGES)):
        return Path(named)
    parts = [part for part in place.split("/") if part]
    if protocol not in _PACKAGES or len(parts) < 2 or {".", ".."} & {*parts}:
        raise UsageError(f"{named} is no place for a run; expected a folder, s3://BUCKET/RUN or gs://BUCKET/RUN.")
    package, extra = _PACKAGES[protocol]
    if importlib.util.find_spec(package) is None:
        raise MissingPackageError(package, extra, f"{protocol}://")
    from upath import UPath

    return UPath(f"{protocol}://{'/'.join(parts)}", use_listings_cache=False)


def refuse_address(path: Path, what: str) -> None:
    """UsageError where a user named an address for what is written to this machine's disk; `what` begins it."""
    if path.parts and path.parts[0].endswith(":"):
        raise UsageError(f"{what} is written to a disk of this machine, and {path} is an address. Name a path there.")


def is_local(path: AnyPath) -> bool:
    """Whether a path is one of this machine's file system."""
    return isinstance(path, Path)


def local_path(path: AnyPath, what: str) -> Path:
    """The path, which must be one of this machine's file system. `what` begins the UsageError for another."""
    if isinstance(path, Path):
        return path
    raise UsageError(f"{what} {path}; a folder of this machine is needed there.")


def exists(path: AnyPath) -> bool:
    """Whether a file is there. StoreError where the store does not answer."""
    return path.exists() if isinstance(path, Path) else size_of(path) is not None


def size_of(path: AnyPath) -> int | None:
    """Bytes of a file; None where there is none. StoreError where the store does not answer."""
    try:
        if isinstance(path, Path):
            return path.stat().st_size
        with answered(path):
            facts = path.fs.info(path.path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return facts["size"] if facts["type"] == "file" else None


def read_bytes(path: AnyPath, max_bytes: int) -> bytes:
    """All of a file. ValueError for one with more bytes, FileNotFoundError, OSError where a disk fails."""
    if isinstance(path, Path):
        if (size := path.stat().st_size) > max_bytes:
            raise ValueError(f"it has {size:,} bytes, at most {max_bytes:,} are expected")
        return path.read_bytes()
    content = _read_part(path, start=0, end=max_bytes + 1)
    if len(content) > max_bytes:
        raise ValueError(f"it has more than {max_bytes:,} bytes, which are the most expected")
    return content


def read_end(path: UPath, num_bytes: int) -> bytes:
    """The last bytes of an object, all where it has fewer. FileNotFoundError where there is none."""
    return _read_part(path, start=-num_bytes)


def read_pieces(path: UPath) -> Iterator[bytes]:
    """An object from its beginning to its end. FileNotFoundError where there is none."""
    start = 0
    while piece := _read_part(path, start=start, end=start + _PIECE_BYTES):
        yield piece
        if len(piece) < _PIECE_BYTES:
            return
        start += len(piece)


def _read_part(path: UPath, **part: int) -> bytes:
    try:
        with answered(path):
            content = path.fs.cat_file(path.path, **part)
    except StoreError as error:
        if http_status(error) == 416:  # there is nothing in that part: the object is empty, or ends before
            return b""
        raise
    return content if isinstance(content, bytes) else content.encode()  # fsspec says that it is either


def copy_to(path: AnyPath, to: Path) -> None:
    """Copy a file to a new one of this machine. FileNotFoundError where there is none."""
    if isinstance(path, Path):
        shutil.copyfile(path, to)
        return
    with open(to, "xb") as file:
        for piece in read_pieces(path):
            file.write(piece)


def tag_of(path: UPath) -> str | None:
    """What tells this state of an object from others (S3's ETag; empty for other stores); None where there is none."""
    try:
        with answered(path):
            return str(path.fs.info(path.path).get("ETag", ""))
    except FileNotFoundError:
        return None


def put(path: UPath, content: Path | bytes, *, mode: str, seconds: float | None = None, in_place_of: str = "") -> None:
    """Put an object whole. With `mode` "create" FileExistsError where it is there; "overwrite" replaces it.

    FileExistsError too where what is there is not `in_place_of`, a tag. What takes longer than `seconds`, or is
    interrupted, is cancelled before this ends: nothing arrives later.
    """
    store: Any = path.fs
    condition = {"IfMatch": in_place_of} if in_place_of else {}
    if isinstance(content, bytes):
        call = store._pipe_file(path.path, content, mode=mode, **condition)
    else:
        call = store._put_file(str(content), path.path, mode=mode)
    with answered(path):
        future = asyncio.run_coroutine_threadsafe(call, store.loop)
        try:
            future.result(seconds)
        except BaseException:
            future.cancel()
            asyncio.run_coroutine_threadsafe(asyncio.sleep(_CANCEL_SECONDS), store.loop).result()
            raise


def remove(path: AnyPath) -> None:
    """Remove a file, where it is there."""
    if isinstance(path, Path):
        path.unlink(missing_ok=True)
        return
    try:
        with answered(path):
            path.fs.rm_file(path.path)
    except FileNotFoundError:
        pass


def names_in(folder: AnyPath) -> set[str]:
    """Names of the files in a folder; none where there is no such folder."""
    return {name for name, is_file in _entries(folder) if is_file}


def folders_in(folder: AnyPath) -> set[str]:
    """Names of the folders in a folder."""
    return {name for name, is_file in _entries(folder) if not is_file}


def _entries(folder: AnyPath) -> Iterator[tuple[str, bool]]:
    """(name, whether it is a file)."""
    if isinstance(folder, Path):
        if folder.is_dir():
            with os.scandir(folder) as found:
                yield from ((entry.name, not entry.is_dir()) for entry in found)
        return
    try:
        with answered(folder):
            listed: list[dict[str, Any]] = folder.fs.ls(folder.path, detail=True, refresh=True)
    except FileNotFoundError:
        return
    for entry in listed:
        name = entry["name"].rstrip("/").rpartition("/")[2]
        if name and entry["name"].rstrip("/") != folder.path.rstrip("/"):
            yield name, entry["type"] == "file"


@contextmanager
def answered(path: AnyPath) -> Iterator[None]:
    """StoreError where an object store does not do what is asked; what is there or not is said as of a file."""
    try:
        yield
    except FileNotFoundError as error:
        if _code(error) == "NoSuchBucket":
            raise StoreError(f"{path} lies in a bucket that is not there. Make it, or mend the name.") from error
        raise
    except (FileExistsError, CapfiltError):
        raise
    except Exception as error:  # of botocore, aiohttp, google: each has a tree of its own
        if http_status(error) == 412:  # not every server says which condition did not hold
            raise FileExistsError(str(path)) from error
        raise StoreError(
            f"{path} cannot be reached ({type(error).__name__}: {error}). What is committed there stays; mend the "
            "connection or the credentials and repeat the command, it goes on from there."
        ) from error


def http_status(error: BaseException) -> int | None:
    """What a server answered, where that was the cause of an error."""
    found = _response(error).get("ResponseMetadata", {}).get("HTTPStatusCode")
    return found if isinstance(found, int) else None


def _code(error: BaseException) -> str:
    return str(_response(error).get("Error", {}).get("Code", ""))


def _response(error: BaseException | None) -> dict[str, Any]:
    """botocore's record of it."""
    while error is not None:
        if isinstance(found := getattr(error, "response", None), dict):
            return found
        error = error.__cause__
    return {}
