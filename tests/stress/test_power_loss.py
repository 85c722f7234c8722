"""Row 3: the power fails. What was not synced is gone, at every moment of a run's life; nothing committed is bad.

The calls through which the protocol makes things durable are watched. What is on the disk for sure is told from them:
a file's content is that at its last sync, a directory's names are those at its own. From every such moment a run is
built as it would be found, in three ways: only what is sure; names that got there early, contents that did not; all.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from capfilt.data.rundir import RunDir
from capfilt.data.verify import verify_run
from capfilt.errors import UsageError
from tests.stress.conftest import FULL, Figure
from tests.stress.lives import committed_files, live

WATCHED = ("fsync", "rename", "replace", "unlink", "mkdir", "rmdir")
WAYS = {"what is sure": (False, False), "names came early": (True, False), "all of it": (True, True)}


class Disk:
    """What of a directory would survive, as the watched calls say."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.contents: dict[int, bytes] = {}
        """Of files, as last synced, by inode."""
        self.names: dict[int, dict[str, int]] = {}
        """Of directories, as last synced, by inode."""
        self._pins: dict[int, int] = {}
        """Open files: their inodes are given to no other file."""
        self._sync_directory(root)

    def note_sync(self, descriptor: int) -> None:
        """A call of fsync that came back."""
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if path.is_dir():
            self._sync_directory(path)
        elif path.exists():
            self.contents[self._pin(path)] = path.read_bytes()

    def _sync_directory(self, path: Path) -> None:
        self.names[self._pin(path)] = {entry.name: self._pin(entry) for entry in path.iterdir()}

    def _pin(self, path: Path) -> int:
        descriptor = os.open(path, os.O_RDONLY)
        inode = os.fstat(descriptor).st_ino
        if inode in self._pins:
            os.close(descriptor)
        else:
            self._pins[inode] = descriptor
        return inode

    def close(self) -> None:
        """Let the inodes go."""
        for descriptor in self._pins.values():
            os.close(descriptor)

    def image(self, *, early_names: bool, all_contents: bool) -> dict[str, bytes | None]:
        """Relative path → content as it would be found; None for a directory."""
        found: dict[str, bytes | None] = {}
        self._gather(self.root.stat().st_ino, "", found, early_names, all_contents)
        return found

    def _gather(self, inode: int, prefix: str, found: dict[str, bytes | None], early: bool, whole: bool) -> None:
        folder = Path(os.readlink(f"/proc/self/fd/{self._pins[inode]}"))
        names = self.names.get(inode, {})
        if early and folder.is_dir():
            names = {entry.name: self._pin(entry) for entry in folder.iterdir()}
        for name, child in names.items():
            descriptor = self._pins[child]
            if os.path.isdir(f"/proc/self/fd/{descriptor}"):
                found[prefix + name] = None
                self._gather(child, f"{prefix}{name}/", found, early, whole)
            elif whole:
                found[prefix + name] = os.pread(descriptor, os.fstat(descriptor).st_size, 0)
            else:
                found[prefix + name] = self.contents.get(child, b"")


@contextmanager
def watched(disk: Disk, at_moment: Callable[[], None]) -> Iterator[None]:
    """Call `at_moment` before and after every watched call."""

    def watch(name: str) -> Callable[..., Any]:
        real = getattr(os, name)

        def call(*args: Any, **options: Any) -> Any:
            at_moment()
            result = real(*args, **options)
            if name == "fsync":
                disk.note_sync(args[0])
            at_moment()
            return result

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in WATCHED:
            patch.setattr(os, name, watch(name))
        yield


def write_image(image: dict[str, bytes | None], path: Path) -> None:
    path.mkdir()
    for name, content in image.items():
        if content is None:
            (path / name).mkdir()
        else:
            (path / name).write_bytes(content)


def test_a_loss_of_power_leaves_nothing_bad(tmp_path: Path, figure: Figure) -> None:
    live(tmp_path / "whole")
    expected = committed_files(tmp_path / "whole")
    root = tmp_path / "run"
    root.mkdir()
    disk = Disk(root)
    images: dict[tuple[tuple[str, bytes | None], ...], str] = {}
    moments = 0

    def look() -> None:
        nonlocal moments
        moments += 1
        for way, (early, whole) in WAYS.items():
            image = disk.image(early_names=early, all_contents=whole)
            images.setdefault(tuple(sorted(image.items())), way)

    with watched(disk, look):
        live(root)
    disk.close()
    assert committed_files(root) == expected
    chosen = list(images)[:: 1 if FULL else 7]
    for number, image in enumerate(chosen):
        found = tmp_path / f"found{number}"
        write_image(dict(image), found)
        if (found / "run.json").exists():
            report = verify_run(RunDir.open(found), deep=True)
            assert report.findings == [], images[image]
        else:
            with pytest.raises(UsageError, match="is not a run"):
                RunDir.open(found)
        live(found)
        assert committed_files(found) == expected, images[image]
        assert verify_run(RunDir.open(found), deep=True).exit_code == 0
    assert moments > 100
    figure(3, f"power lost at {moments} moments: {len(chosen)} different disks, 0 with bad commits, all went on")


def test_the_disk_model_loses_what_is_not_synced(tmp_path: Path) -> None:
    """The watch itself: without the sync a content is lost, without its directory's a name."""
    disk = Disk(tmp_path)
    (tmp_path / "named").write_bytes(b"x")
    with watched(disk, lambda: None):
        descriptor = os.open(tmp_path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
        os.rename(tmp_path / "named", tmp_path / "renamed")
        with open(tmp_path / "renamed", "rb") as file:
            assert disk.image(early_names=False, all_contents=False) == {"named": b""}
            os.fsync(file.fileno())
    assert disk.image(early_names=False, all_contents=False) == {"named": b"x"}
    assert disk.image(early_names=True, all_contents=False) == {"renamed": b"x"}
    disk.close()
