"""`capfilt stats --watch` on a real pseudo-terminal: it follows a run to its end, and leaves the screen as it was."""

from __future__ import annotations

import os
import pty
import re
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from capfilt.curation.annotate import annotate
from tests.cli.conftest import capfilt
from tests.curation.small_runs import make_run, save_models

OTHER_SCREEN, BACK, HOME = b"\x1b[?1049h", b"\x1b[?1049l", b"\x1b[H"


@contextmanager
def watching(run: Path, lines: int = 50) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    master, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (lines, 90))
    process = subprocess.Popen(
        [sys.executable, "-m", "capfilt", "stats", str(run), "--watch", "0.2"], stdin=terminal, stdout=terminal,
        stderr=terminal, env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "90", "NO_COLOR": "1"},
    )  # fmt: skip
    os.close(terminal)
    try:
        yield process, master
    finally:
        process.kill()
        process.wait()
        os.close(master)


def read_until(master: int, wanted: bytes, seconds: float = 60) -> bytes:
    """What comes, without bold and dim, until `wanted` has come."""
    found, deadline = b"", time.monotonic() + seconds
    while wanted not in found and time.monotonic() < deadline:
        try:
            found = re.sub(rb"\x1b\[[0-9;]*m", b"", found + os.read(master, 65536))
        except OSError:
            break
    return found


def test_it_follows_a_run_to_its_end(tmp_path: Path) -> None:
    models, run = save_models(tmp_path / "models"), make_run(tmp_path / "run", num_shards=2, num_samples=3)
    with watching(run.path) as (process, master):
        first = read_until(master, b"manifest 0/2")
        assert first.startswith(OTHER_SCREEN)
        assert b"manifest 0/2" in first
        stages = ["captions", "clip", "itm", "manifest"]
        annotate(run, stages, caption=models.caption(), rank=models.rank(), filter=models.filter())
        rest = read_until(master, BACK) + read_until(master, b"Next: ")
        assert process.wait(30) == 0
    after = rest.partition(BACK)[2]
    assert b"manifest 2/2" in after, "the last look stays"
    assert b"Traceback" not in rest


def test_what_is_higher_than_the_terminal_is_cut_and_does_not_scroll(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", num_shards=1, num_samples=3)
    with watching(run.path, lines=6) as (_, master):
        seen, deadline = b"", time.monotonic() + 60
        while seen.count(HOME) < 4 and time.monotonic() < deadline:
            seen += read_until(master, HOME)
    lines = seen.split(HOME)[2].decode().splitlines()
    assert len(lines) == 6
    assert lines[0].startswith("Run"), "the top is what is seen"


def test_ctrl_c_gives_the_screen_back(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", num_shards=1, num_samples=2)
    with watching(run.path) as (process, master):
        read_until(master, b"manifest 0/1")
        process.send_signal(signal.SIGINT)
        rest = read_until(master, BACK) + read_until(master, b"Interrupted")
        assert process.wait(30) == 130
    assert BACK in rest
    assert b"Traceback" not in rest


def test_without_a_terminal_it_is_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", num_shards=1, num_samples=2)
    refused = capfilt("stats", run.path, "--watch", "1")
    assert refused.code == 2
    assert "--json" in refused.err
