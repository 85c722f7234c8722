"""Row 6: the disk is full, fails, or takes only part of a write, at every moment there is: nothing bad is committed.

Errors are put in the way of every call of the protocol, in every stage; and real file systems that are too small, by
one page more each time, or full for a moment only. What goes on when there is room again gives the same files.
"""

from __future__ import annotations

import errno
import itertools
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from capfilt.data.rundir import RunDir
from capfilt.data.verify import verify_run
from capfilt.errors import CapfiltError
from capfilt.world.site import SiteSettings, WorldSite
from tests.curate.downloads import rows_of, wait_for
from tests.data.test_commit import CALLS
from tests.stress.conftest import FULL, Figure
from tests.stress.lives import committed_files, live
from tests.stress.namespaces import CLONE_NEWNS, in_namespaces, mount_small_disk, unmount

PAGE_BYTES, ROOM_BYTES = 4096, 256 << 20
NO_ROOM = os.strerror(errno.ENOSPC)


def refuse(number: int, code: int, patch: pytest.MonkeyPatch) -> None:
    """Make the n-th call that touches the disk fail."""
    counter = itertools.count()

    def failing(name: str) -> Callable[..., Any]:
        real = getattr(os, name)

        def call(*args: Any, **options: Any) -> Any:
            if next(counter) == number:
                raise OSError(code, os.strerror(code))
            return real(*args, **options)

        return call

    for name in CALLS:
        patch.setattr(os, name, failing(name))


def check_and_go_on(path: Path, expected: dict[str, str]) -> None:
    """Nothing that was committed is bad, and with room again the run becomes what it would have been."""
    if (path / "run.json").exists():
        assert verify_run(RunDir.open(path), deep=True).findings == []
    live(path)
    assert committed_files(path) == expected
    assert verify_run(RunDir.open(path), deep=True).exit_code == 0
    assert not any((path / ".staging").iterdir())


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT] if FULL else [errno.ENOSPC])
def test_every_call_refused(tmp_path: Path, code: int, figure: Figure) -> None:
    live(tmp_path / "whole")
    expected, num_refused = committed_files(tmp_path / "whole"), 0
    for number in itertools.count(step=1 if FULL else 13):
        path = tmp_path / str(number)
        with pytest.MonkeyPatch.context() as patch:
            refuse(number, code, patch)
            said: str | None = None
            try:
                live(path)
            except (CapfiltError, OSError) as error:
                said = str(error)
        assert said is None or os.strerror(code) in said
        check_and_go_on(path, expected)
        shutil.rmtree(path)
        if said is None:
            break
        num_refused += 1
    assert num_refused > 5
    figure(6, f"{os.strerror(code)}, at {num_refused} calls of a run's life: 0 bad commits, then the same files")


@pytest.mark.parametrize("share", [1, 2, 1000])
def test_short_writes(tmp_path: Path, share: int, figure: Figure, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every write takes one byte, the half, or the 1,000th part of what it is given."""
    live(tmp_path / "whole")
    real, num_writes = os.write, 0

    def write_part(descriptor: int, data: Any) -> int:
        nonlocal num_writes
        num_writes += 1
        content = bytes(data)
        return real(descriptor, content[: 1 if share == 1 else max(1, len(content) // share)])

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", write_part)
        live(tmp_path / "run")
    assert committed_files(tmp_path / "run") == committed_files(tmp_path / "whole")
    assert num_writes > 100
    figure(6, f"{num_writes:,} short writes: the same files")


def test_file_systems_too_small_by_every_page(tmp_path: Path, figure: Figure) -> None:
    def sweep() -> tuple[int, int]:
        live(tmp_path / "whole")
        expected = committed_files(tmp_path / "whole")
        for num_failed, num_pages in enumerate(itertools.count(1, step=1 if FULL else 8)):
            disk = tmp_path / f"disk{num_pages}"
            mount_small_disk(disk, num_pages * PAGE_BYTES)
            said: str | None = None
            try:
                live(disk / "run")
            except (CapfiltError, OSError) as error:
                said = str(error)
            assert said is None or NO_ROOM in said
            mount_small_disk(disk, ROOM_BYTES, again=True)
            check_and_go_on(disk / "run", expected)
            unmount(disk)
            if said is None:
                return num_failed, num_pages
        raise AssertionError

    num_failed, num_pages = in_namespaces(CLONE_NEWNS, sweep)
    assert num_failed >= (10 if FULL else 2)
    figure(
        6, f"{num_failed} file systems too small by every page up to {num_pages}: 0 bad commits, then the same files"
    )


def download(table: Path, path: Path) -> subprocess.CompletedProcess[str]:
    options = ("--samples-per-shard", "20", "--timeout", "5", "--allow-private-addresses")
    command = [sys.executable, "-m", "capfilt", "download", str(table), str(path), *options]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def check_download(path: Path, reasons: list[str | None]) -> None:
    run = RunDir.open(path)
    assert [row["reason"] for row in rows_of(run)] == reasons
    assert verify_run(run, deep=True).exit_code == 0


def test_a_download_onto_a_disk_that_fills(tmp_path: Path, figure: Figure) -> None:
    """For good, at several moments; and for a moment only, by a file of somebody else that comes and goes."""
    sizes_mb = [0.1, 0.3, 0.6, 0.9, 1.2, 1.5] if FULL else [0.6]

    def work() -> tuple[int, int]:
        codes = []
        for size_mb in sizes_mb:
            disk = tmp_path / f"disk-{size_mb}"
            mount_small_disk(disk, int(size_mb * 1e6))
            done = download(table, disk / "run")
            codes.append(done.returncode)
            assert done.returncode in (0, 1), done.stderr
            assert done.returncode == 0 or NO_ROOM in done.stderr, done.stderr
            assert "defect" not in done.stderr
            if (disk / "run" / "run.json").exists():
                assert verify_run(RunDir.open(disk / "run"), deep=True).findings == []
            mount_small_disk(disk, ROOM_BYTES, again=True)
            assert download(table, disk / "run").returncode == 0
            check_download(disk / "run", reasons)
            unmount(disk)
        return len(codes), sum(codes)

    def be_full_for_a_moment() -> int:
        disk = tmp_path / "filling"
        mount_small_disk(disk, 8_000_000)
        options = ("--samples-per-shard", "20", "--timeout", "5", "--allow-private-addresses")
        command = [sys.executable, "-m", "capfilt", "download", str(table), str(disk / "run"), *options]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        wait_for(lambda: list(disk.glob("run/.staging/*/*/current")))
        with open(disk / "filler", "wb", buffering=0) as filler:
            try:
                while True:
                    filler.write(bytes(PAGE_BYTES))
            except OSError:
                time.sleep(0.3)
        (disk / "filler").unlink()
        _, said = process.communicate(timeout=120)
        assert process.returncode in (0, 1), said
        assert process.returncode == 0 or NO_ROOM in said, said
        assert verify_run(RunDir.open(disk / "run"), deep=True).findings == []
        assert download(table, disk / "run").returncode == 0
        check_download(disk / "run", reasons)
        return process.returncode

    with WorldSite(SiteSettings(num_urls=120, behaviour_shares={"not_found": 0.1})) as site:
        table, reasons = site.write_table(tmp_path / "urls.parquet"), [row.reason for row in site.rows()]
        num_disks, num_failed = in_namespaces(CLONE_NEWNS, work)
        codes = [in_namespaces(CLONE_NEWNS, be_full_for_a_moment) for _ in range(3 if FULL else 1)]
    assert num_failed
    figure(6, f"a download onto {num_disks} small disks ({num_failed} failed), {len(codes)} filled for a moment (exit "
              f"codes {codes}): 0 bad commits, the same command went on")  # fmt: skip
