"""Row 6: the disk is full, fails, or takes only part of a write, at every moment there is: nothing bad is committed.

Errors are put in the way of every call of the protocol, in every stage; and real file systems that are too small, by
one page more each time, or full for a moment only. What goes on when there is room again gives the same files.
"""

from __future__ import annotations

import builtins
import errno
import io
import itertools
import os
import random
import resource
import shutil
import subprocess
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from capfilt.data.rundir import RunDir
from capfilt.data.verify import verify_run
from capfilt.errors import CapfiltError
from capfilt.world.site import SiteSettings, WorldSite
from tests.curation.downloads import rows_of, wait_for
from tests.data.test_commit import CALLS, in_child
from tests.stress.conftest import FULL, Figure
from tests.stress.lives import committed_files, live
from tests.stress.namespaces import CLONE_NEWNS, in_namespaces, mount_small_disk, unmount

PAGE_BYTES, ROOM_BYTES = 4096, 256 << 20
NO_ROOM = os.strerror(errno.ENOSPC)
NUM_SAMPLED = 8
"""Moments that a sample takes of all."""
TOO_LARGE = 9
"""Exit code of a child process whose file became too large, and which said so."""


@dataclass
class Refusal:
    """The call with this number fails, of those that touch the disk; -1 for none."""

    number: int
    code: int
    num_calls: int = 0
    was_in_cleanup: bool = False
    """Whether it was one of shutil.rmtree's, which goes on after an error and says nothing."""

    def meet(self) -> None:
        """Count a call that is about to be made. Raises OSError where it is the one."""
        self.num_calls += 1
        if self.num_calls - 1 == self.number:
            self.was_in_cleanup = any(frame.f_code.co_name == "rmtree" for frame, _ in traceback.walk_stack(None))
            raise OSError(self.code, os.strerror(self.code))


def refuse(refusal: Refusal, patch: pytest.MonkeyPatch) -> None:
    """Put `refusal` in the way of every call of `os` that the protocol makes, and of what files of `open` write."""

    def met(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            refusal.meet()
            return real(*args, **options)

        return call

    for name in CALLS:
        patch.setattr(os, name, met(getattr(os, name)))
    patch.setattr(builtins, "open", open_through(met, met))


def open_through(
    opening: Callable[[Callable[..., Any]], Callable[..., Any]],
    writing: Callable[[Callable[..., Any]], Callable[..., Any]],
) -> Callable[..., Any]:
    """`open`, where a file to be written is opened, and written below Python's buffers, by what these make of it."""
    real_open = builtins.open

    class Raw(io.FileIO):
        def write(self, data: Any, /) -> int:
            return writing(super().write)(data)

    def call(file: Any, mode: str = "r", buffering: int = -1, *args: Any, **options: Any) -> Any:
        if not set(mode) & set("wxa+"):
            return real_open(file, mode, buffering, *args, **options)
        raw = opening(Raw)(file, mode.replace("b", "").replace("t", ""))
        if buffering == 0:
            return raw
        buffered = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, *args, **options)

    return call


def check_and_go_on(path: Path, expected: dict[str, str]) -> None:
    """Nothing that was committed is bad, and with room again the run becomes what it would have been."""
    if (path / "run.json").exists():
        assert verify_run(RunDir.open(path), deep=True).findings == []
    live(path)
    assert committed_files(path) == expected
    assert verify_run(RunDir.open(path), deep=True).exit_code == 0
    assert not any((path / ".staging").iterdir())


def live_refused(path: Path, refusal: Refusal) -> str | None:
    """A run's life with `refusal` in its way; gives what was said of it."""
    with pytest.MonkeyPatch.context() as patch:
        refuse(refusal, patch)
        try:
            live(path)
        except (CapfiltError, OSError) as error:
            return str(error)
    return None


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT] if FULL else [errno.ENOSPC])
def test_every_call_refused(tmp_path: Path, code: int, figure: Figure) -> None:
    none = Refusal(-1, code)
    assert live_refused(tmp_path / "whole", none) is None
    expected, num_in_cleanup = committed_files(tmp_path / "whole"), 0
    numbers = range(none.num_calls) if FULL else sorted(random.Random(6).sample(range(none.num_calls), NUM_SAMPLED))
    for number in numbers:
        path, refusal = tmp_path / str(number), Refusal(number, code)
        said = live_refused(path, refusal)
        assert refusal.num_calls > number  # it was reached
        if refusal.was_in_cleanup:  # then nothing is lost, and the next command tidies up
            assert said is None
            num_in_cleanup += 1
        else:
            assert said is not None, number
            assert os.strerror(code) in said
        check_and_go_on(path, expected)
        shutil.rmtree(path)
    assert none.num_calls > 150
    figure(6, f"{os.strerror(code)}, at {len(numbers)} of the {none.num_calls} calls of a run's life "
              f"({num_in_cleanup} while it tidied up): 0 bad commits, then the same files")  # fmt: skip


@pytest.mark.parametrize("share", [1, 2, 1000])
def test_short_writes(tmp_path: Path, share: int, figure: Figure) -> None:
    """Every write takes one byte, the half, or the 1,000th part of what it is given."""
    live(tmp_path / "whole")
    num_writes = {"os.write": 0, "open": 0}

    def part(data: Any) -> bytes:
        content = bytes(data)
        return content[: 1 if share == 1 else max(1, len(content) // share)]

    def in_parts(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:  # the data come last, behind the descriptor where there is one
            num_writes[name] += 1
            return real(*args[:-1], part(args[-1]))

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "write", in_parts("os.write", os.write))
        patch.setattr(builtins, "open", open_through(lambda raw: raw, lambda write: in_parts("open", write)))
        live(tmp_path / "run")
    assert committed_files(tmp_path / "run") == committed_files(tmp_path / "whole")
    assert min(num_writes.values()) > (30 if share == 2 else 100), num_writes
    figure(
        6, f"{sum(num_writes.values()):,} short writes, {num_writes['open']:,} of them through `open`: the same files"
    )


def test_files_cut_at_every_size(tmp_path: Path, figure: Figure) -> None:
    """The system lets no file grow beyond a size (RLIMIT_FSIZE): the write that reaches it is short, the next fails."""
    live(tmp_path / "whole")
    expected = committed_files(tmp_path / "whole")
    largest = max((tmp_path / "whole" / name).stat().st_size for name in expected)
    sizes = range(0, largest, 256) if FULL else sorted(random.Random(6).sample(range(largest), NUM_SAMPLED))
    for size in sizes:
        path = tmp_path / str(size)

        def work(path: Path = path) -> None:
            try:
                live(path)
            except (CapfiltError, OSError) as error:
                os._exit(TOO_LARGE if os.strerror(errno.EFBIG) in str(error) else 1)

        def limit(size: int = size) -> None:  # SIGXFSZ is ignored by Python
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

        assert in_child(work, limit) == TOO_LARGE, size
        check_and_go_on(path, expected)
        shutil.rmtree(path)
    figure(6, f"files cut at {len(sizes)} sizes up to {largest:,} bytes: 0 bad commits, then the same files")


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


def download_command(table: Path, path: Path) -> list[str]:
    options = ("--samples-per-shard", "20", "--timeout", "5", "--allow-private-addresses")
    return [sys.executable, "-m", "capfilt", "download", str(table), str(path), *options]


def download(table: Path, path: Path) -> subprocess.CompletedProcess[str]:
    command = download_command(table, path)
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

    def be_full_for_a_moment() -> tuple[int, bool]:
        """Gives the exit code, and whether the moment was met: a shard was begun again, or the command failed."""
        disk = tmp_path / "filling"
        mount_small_disk(disk, 8_000_000)
        process = subprocess.Popen(download_command(table, disk / "run"), stderr=subprocess.PIPE, text=True)
        wait_for(lambda: list(disk.glob("run/.staging/*/*/current")))
        with open(disk / "filler", "wb", buffering=0) as filler:

            def is_met() -> bool:
                try:
                    while True:
                        filler.write(bytes(PAGE_BYTES))
                except OSError:
                    pass
                with suppress(FileNotFoundError):  # what is looked through may be removed meanwhile
                    return process.poll() is not None or any(disk.glob("run/.staging/*/*-[1-9]"))
                return False

            wait_for(is_met, 120)
            was_begun_again = process.poll() is None
        (disk / "filler").unlink()
        _, said = process.communicate(timeout=120)
        assert process.returncode in (0, 1), said
        assert process.returncode == 0 or NO_ROOM in said, said
        assert verify_run(RunDir.open(disk / "run"), deep=True).findings == []
        assert download(table, disk / "run").returncode == 0
        check_download(disk / "run", reasons)
        return process.returncode, was_begun_again or process.returncode != 0

    with WorldSite(SiteSettings(num_urls=120, behaviour_shares={"not_found": 0.1})) as site:
        table, reasons = site.write_table(tmp_path / "urls.parquet"), [row.reason for row in site.rows()]
        num_disks, num_failed = in_namespaces(CLONE_NEWNS, work)
        moments = [in_namespaces(CLONE_NEWNS, be_full_for_a_moment) for _ in range(3 if FULL else 1)]
    assert num_failed
    assert all(was_met for _, was_met in moments), moments
    codes = [code for code, _ in moments]
    figure(6, f"a download onto {num_disks} small disks ({num_failed} failed), {len(codes)} filled for a moment and "
              f"met it (exit codes {codes}): 0 bad commits, the same command went on")  # fmt: skip
