"""Where a run lies: in a folder of this machine, or under a prefix of an object store.

In: a path or an address (`s3://BUCKET/RUN`, `gs://BUCKET/RUN`). Out: a `Path`, or fsspec's counterpart of it, and the
few questions that both are asked. Nothing that an object store said is remembered: other machines write there too. What
cannot be asked is an error, never "it is not there".
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from capfilt.errors import CapfiltError, MissingPackageError, UsageError

if TYPE_CHECKING:
    from upath import UPath

    AnyPath = Path | UPath
else:
    AnyPath = object  # for the command line; the other class is loaded where an address asks for it

MAX_FILE_BYTES = 2**31
"""Largest file with rows that is read; one shard's are far below it."""

_PACKAGES = {"s3": ("s3fs", "s3"), "gs": ("gcsfs", "gs")}
"""Protocol → the package that speaks it, and our extra that installs it. Others lack puts that replace nothing."""


def path_of(named: str | AnyPath) -> AnyPath:
    """The path that a user named. UsageError for an address of a kind that no run can lie at."""
    if not isinstance(named, str):
        return named
    protocol, is_address, place = named.partition("://")
    if not is_address:
        return Path(named)
    if protocol not in _PACKAGES or not place.strip("/"):
        raise UsageError(f"{named} is no place for a run; expected a folder, s3://BUCKET/RUN or gs://BUCKET/RUN.")
    package, extra = _PACKAGES[protocol]
    if importlib.util.find_spec(package) is None:
        raise MissingPackageError(package, extra, f"{protocol}://")
    from upath import UPath

    return UPath(named.rstrip("/"), use_listings_cache=False)


def is_local(path: AnyPath) -> bool:
    """Whether a path is one of this machine's file system."""
    return isinstance(path, Path)


def local_path(path: AnyPath, what: str) -> Path:
    """The path, which must be one of this machine's file system. `what` begins the UsageError for another."""
    if isinstance(path, Path):
        return path
    raise UsageError(f"{what} {path}; a folder of this machine is needed there.")


def exists(path: AnyPath) -> bool:
    """Whether a file is there. CapfiltError where the store does not answer."""
    return path.exists() if isinstance(path, Path) else size_of(path) is not None


def size_of(path: AnyPath) -> int | None:
    """Bytes of a file; None where there is none. CapfiltError where the store does not answer."""
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
    size = size_of(path)
    if size is None:
        raise FileNotFoundError(f"there is no file {path}")
    if size > max_bytes:
        raise ValueError(f"it has {size:,} bytes, at most {max_bytes:,} are expected")
    if isinstance(path, Path):
        return path.read_bytes()
    with answered(path):
        return _bytes(path.fs.cat_file(path.path))


def read_end(path: UPath, num_bytes: int) -> bytes:
    """The last bytes of an object, all where it has fewer. FileNotFoundError where there is none."""
    with answered(path):
        return _bytes(path.fs.cat_file(path.path, start=-num_bytes))


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
            yield from ((entry.name, not entry.is_dir()) for entry in folder.iterdir())
        return
    try:
        with answered(folder):
            found: list[dict[str, Any]] = folder.fs.ls(folder.path, detail=True, refresh=True)
    except FileNotFoundError:
        return
    for entry in found:
        name = entry["name"].rstrip("/").rpartition("/")[2]
        if name and entry["name"].rstrip("/") != folder.path.rstrip("/"):
            yield name, entry["type"] == "file"


def _bytes(content: str | bytes) -> bytes:
    """What fsspec says is either."""
    return content if isinstance(content, bytes) else content.encode()


@contextmanager
def answered(path: AnyPath) -> Iterator[None]:
    """CapfiltError where an object store does not do what is asked; what is there or not is said as of a file."""
    try:
        yield
    except (FileNotFoundError, FileExistsError, CapfiltError):
        raise
    except Exception as error:  # of botocore, aiohttp, google: each has a tree of its own
        raise CapfiltError(
            f"{path} cannot be reached ({type(error).__name__}: {error}). What is committed there stays; mend the "
            "connection or the credentials and repeat the command, it goes on from there."
        ) from error
