"""Namespaces of Linux for tests: a network with nothing but loopback, a small file system that others do not see.

Both work without being root where the system permits namespaces of a user's own; what does not permit them makes
`in_namespaces` skip the test.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import pickle
import socket
import struct
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

CLONE_NEWNS, CLONE_NEWUSER, CLONE_NEWNET = 0x00020000, 0x10000000, 0x40000000
MS_REMOUNT, MS_REC, MS_PRIVATE, MNT_DETACH = 0x20, 0x4000, 0x40000, 2
SIOCSIFFLAGS, IFF_UP = 0x8914, 1


def enter_namespaces(flags: int) -> None:
    """Give this process, which must have one thread only, a user namespace and others of its own. Raises OSError."""
    user, group = os.getuid(), os.getgid()
    library = ctypes.CDLL(None, use_errno=True)
    if not hasattr(library, "unshare") or library.unshare(CLONE_NEWUSER | flags):
        raise PermissionError(ctypes.get_errno(), "the system does not permit namespaces of one's own")
    for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
        Path(f"/proc/self/{name}").write_text(text)
    if flags & CLONE_NEWNET:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as loopback:
            fcntl.ioctl(loopback, SIOCSIFFLAGS, struct.pack("16sh", b"lo", IFF_UP))
    if flags & CLONE_NEWNS:
        _mount(None, Path("/"), MS_REC | MS_PRIVATE)


def mount_small_disk(path: Path, num_bytes: int, *, again: bool = False) -> None:
    """A file system in memory at `path`, with room for `num_bytes`; `again` changes its size."""
    path.mkdir(exist_ok=True)
    _mount("tmpfs", path, MS_REMOUNT if again else 0, f"size={num_bytes}")


def unmount(path: Path) -> None:
    """Take it away with all that is on it."""
    if ctypes.CDLL(None, use_errno=True).umount2(os.fsencode(path), MNT_DETACH):
        raise OSError(ctypes.get_errno(), f"{path} cannot be unmounted")


def in_namespaces(flags: int, work: Callable[[], Any]) -> Any:
    """What `work` gives in a child process with namespaces of its own; its failures are failures of the test."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            try:
                enter_namespaces(flags)
            except OSError as error:
                answer: tuple[str, Any] = ("skip", str(error))
            else:
                answer = ("result", work())
        except BaseException:
            answer = ("failure", traceback.format_exc())
        with os.fdopen(writer, "wb") as pipe:
            pickle.dump(answer, pipe)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        kind, value = pickle.load(pipe)
    os.waitpid(pid, 0)
    if kind == "skip":
        pytest.skip(value)
    assert kind == "result", value
    return value


def _mount(kind: str | None, path: Path, flags: int, options: str = "") -> None:
    library = ctypes.CDLL(None, use_errno=True)
    name = kind.encode() if kind else None
    library.mount.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_char_p]
    if library.mount(name or b"none", os.fsencode(path), name, flags, options.encode()):
        raise OSError(ctypes.get_errno(), f"{path} cannot be mounted: {os.strerror(ctypes.get_errno())}")
