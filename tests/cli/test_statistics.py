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

import pyarrow as pa

from capfilt.curation.annotate import annotate
from capfilt.data.sealed import read_sealed, sealed_bytes
from tests.cli.conftest import capfilt
from tests.curation.small_runs import make_run, save_models
from tests.hostile_texts import TRICKS, UNSAFE, run_with_texts

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


def test_hostile_sources_do_nothing(tmp_path: Path) -> None:
    """A run may have come from somebody else."""
    tricks = [trick.encode("utf-8", "replace").decode() for trick in TRICKS.values()]
    run = run_with_texts(tmp_path / "run", tricks)
    table, record, _ = read_sealed(run.stage_file("manifest", "00000"))
    field = table.schema.field("source")
    sources = pa.array([tricks[row % len(tricks)] for row in range(table.num_rows)]).dictionary_encode()
    assert len(sources.dictionary) == len(set(tricks))
    table = table.set_column(table.schema.get_field_index("source"), field, sources.cast(field.type))
    run.stage_file("manifest", "00000").write_bytes(sealed_bytes(table, record))
    for options in ([], ["--section", "all"], ["--compare", run.path]):
        done = capfilt("stats", run.path, *options)
        assert done.code == 0
        assert not UNSAFE.search(done.out + done.err)


def test_people_s_captions_are_complete_and_trained_on(tmp_path: Path) -> None:
    """No stage between shards and manifest is waited for."""
    made, run = make_run(tmp_path / "made", num_shards=1, num_samples=3), tmp_path / "human"
    assert capfilt("import", made.path / "shards" / "00000.tar", run, "--human").code == 0
    found = capfilt("stats", run, "--json").json()
    assert found["shards_by_stage"] == found["expected_by_stage"] == {"shards": 1, "manifest": 1}
    assert "capfilt train captioner" in capfilt("stats", run).err
    with watching(run) as (process, master):
        read_until(master, BACK)
        assert process.wait(timeout=60) == 0
    written = capfilt("report", run, "-o", tmp_path / "a.html")
    assert "3 pairs of 3 images shown" in written.out


def test_a_picture_replaces_no_other_file(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", num_shards=1, num_samples=2)
    (tmp_path / "mine.txt").write_text("mine")
    refused = capfilt("stats", run.path, "--svg", tmp_path / "mine.txt")
    assert (refused.code, (tmp_path / "mine.txt").read_text()) == (2, "mine")
    for _ in range(2):
        assert capfilt("stats", run.path, "--svg", tmp_path / "a.svg").code == 0
