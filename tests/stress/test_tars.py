"""Rows 8 and 9: our own tars, cut and with flipped bits; tars of others, as hostile as they come."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import random
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from capfilt.curation.import_shards import import_shards
from capfilt.data.reasons import REASONS
from capfilt.data.rundir import RunDir
from capfilt.data.shards import read_samples
from capfilt.data.tars import BLOCK, index_tar
from capfilt.data.texts import clean_for_terminal
from capfilt.data.verify import verify_run
from capfilt.errors import CorruptionError
from tests import factories
from tests.data.conftest import commit_shard
from tests.hostile_tars import ABSOLUTE, BAD_MEMBERS, DAMAGED, info, packed
from tests.stress.conftest import FULL, Figure

NUM_SAMPLES = 18
NUM_FLIPS = 24 if FULL else 2
"""Of every header and payload, at places drawn anew."""


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir.create(tmp_path / "run")
    commit_shard(run, num_samples=NUM_SAMPLES)
    return run


def is_detected(run: RunDir) -> bool:
    try:
        list(read_samples(run, "00000"))
    except CorruptionError:
        return True
    return False


def test_every_cut_at_a_block_is_detected(run: RunDir, figure: Figure) -> None:
    path = run.tar_path("00000")
    data = path.read_bytes()
    cuts = range(0, len(data), BLOCK)
    silent = 0
    for end in cuts:
        path.write_bytes(data[:end])
        assert is_detected(run), end
        silent += _opens_with_tarfile(path)
    path.write_bytes(data)
    assert len(list(read_samples(run, "00000"))) == NUM_SAMPLES
    assert silent > 10, "the standard reader notices too: this test shows nothing"
    figure(8, f"cuts: {len(cuts)} of {len(cuts)} detected (Python's tarfile takes {silent} for whole tars)")


def _opens_with_tarfile(path: Path) -> bool:
    try:
        with tarfile.open(path) as tar:
            return all(tar.extractfile(member) is not None for member in tar)
    except (tarfile.TarError, EOFError):
        return False


def test_a_flip_in_every_header_and_payload_is_detected(run: RunDir, figure: Figure) -> None:
    path = run.tar_path("00000")
    members, data, rng = list(index_tar(path)), path.read_bytes(), random.Random(0)
    places = [
        rng.randrange(start, start + length)
        for member in members
        for start, length in ((member.offset - BLOCK, BLOCK), (member.offset, member.length))
        for _ in range(NUM_FLIPS)
        if length
    ]
    for place in places:
        flipped = bytearray(data)
        flipped[place] ^= 1 << rng.randrange(8)
        path.write_bytes(flipped)
        assert is_detected(run), place
    figure(8, f"flips: {len(places)} of {len(places)} in {len(members)} headers and their payloads detected")


# --- row 9 ---------------------------------------------------------------------------------------------------


def png(seed: int = 0) -> bytes:
    buffer = io.BytesIO()
    factories.draw_picture(seed).save(buffer, "PNG")
    return buffer.getvalue()


def files(*named: tuple[str, bytes], kind: int = tarfile.PAX_FORMAT) -> bytes:
    return packed(*((info(name, len(content)), content) for name, content in named), kind=kind)


GOOD = ("good.png", png()), ("good.txt", b"a good one")


def with_global_header(**records: str) -> bytes:
    """The good sample behind a header that speaks of every member."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT, pax_headers=records) as tar:
        for name, content in GOOD:
            tar.addfile(info(name, len(content)), io.BytesIO(content))
    return buffer.getvalue()


def a_zip() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in GOOD:
            archive.writestr(name, content)
    return buffer.getvalue()


MANY = json.dumps({"caption": "x", "deep": json.loads("[" * 400 + "]" * 400)}).encode()
TARS: dict[str, bytes] = {
    **{f"a member: {name}": packed(member, *[(info(n, len(c)), c) for n, c in GOOD], kind=tarfile.PAX_FORMAT)
       for name, member in BAD_MEMBERS.items()},
    **{f"damage: {name}": data for name, data in DAMAGED.items()},
    "bzip2": bz2.compress(files(*GOOD)),
    "xz": lzma.compress(files(*GOOD)),
    "gzip of a bomb": gzip.compress(bytes(50_000_000)),
    "a zip": a_zip(),
    "a tar in a tar": files(("a.tar", files(*GOOD)), *GOOD),
    "a key twice": files(("a.png", png()), ("a.txt", b"x"), ("a.png", png(1)), ("a.txt", b"y"), *GOOD),
    "keys that differ in case": files(("A.png", png(1)), ("a.png", png(2)), ("a.PNG", png(3)), *GOOD),
    "interleaved keys": files(("a.png", png(1)), ("b.png", png(2)), ("a.txt", b"a"), ("b.txt", b"b"), *GOOD),
    "two pictures of a key": files(("a.png", png(1)), ("a.jpg", png(2)), *GOOD),
    "a caption that is not UTF-8": files(("a.png", png()), ("a.txt", b"\xff\xfe\x80"), *GOOD),
    "a caption with escapes": files(("a.png", png()), ("a.txt", b"\x1b]0;owned\x07\x00"), *GOOD),
    "a long caption": files(("a.png", png()), ("a.txt", b"x" * 100_000), *GOOD),
    "metadata that is no JSON": files(("a.png", png()), ("a.json", b"{"), *GOOD),
    "deep metadata": files(("a.png", png()), ("a.json", b"[" * 200_000), *GOOD),
    "nested metadata": files(("a.png", png()), ("a.json", MANY), *GOOD),
    "numbers without end": files(("a.png", png()), ("a.json", b'{"a": ' + b"9" * 100_000 + b"}"), *GOOD),
    "NaN and lone surrogates": files(("a.png", png()), ("a.json", b'{"caption": "\\ud800", "x": NaN}'), *GOOD),
    "a name of 1 MB": files(("a" * 1_000_000 + ".png", png()), kind=tarfile.GNU_FORMAT),
    "a name of many dots": files(("a" + "." * 5000 + "png", png()), *GOOD),
    "a thousand folders deep": files(("d/" * 1000 + "a.png", png()), *GOOD),
    "a folder as a member": packed((info("a.png", 0, tarfile.DIRTYPE), b""), *((info(n, len(c)), c) for n, c in GOOD)),
    "volumes": packed((info("a.png", 3, b"M"), b"abc"), *((info(n, len(c)), c) for n, c in GOOD)),
    "a label": packed((info("label", 0, b"V"), b""), *((info(n, len(c)), c) for n, c in GOOD)),
    "an unknown kind": packed((info("a.png", 3, b"Z"), b"abc"), *((info(n, len(c)), c) for n, c in GOOD)),
    "a global header with a path": with_global_header(path="/etc/passwd", comment="x"),
    "empty members": files(("a.png", b""), ("a.txt", b""), ("a.json", b""), *GOOD),
    "a picture that is HTML": files(("a.png", b"<html><script>x</script>"), *GOOD),
    "names of devices": files(("con.png", png()), ("nul.txt", b"x"), *GOOD),
    "Windows paths": files(("C:\\a.png", png()), ("..\\b.png", png(1)), *GOOD),
    "names that are options": files(("-rf.png", png()), ("--.txt", b"x"), *GOOD),
}  # fmt: skip


def everything_under(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], set[str]]]:
    """What lies beside the run and the tar, in the working folder, and where absolute names lead.

    Nothing may come there.
    """
    absolute, here = Path(ABSOLUTE).parent, tmp_path / "here"
    shutil.rmtree(absolute, ignore_errors=True)
    absolute.mkdir()
    here.mkdir()
    monkeypatch.chdir(here)

    def find() -> set[str]:
        beside = {name for name in everything_under(tmp_path) if not name.startswith(("run", "a.tar"))}
        return (beside - {"here"}) | everything_under(absolute)

    yield find
    shutil.rmtree(absolute, ignore_errors=True)


def test_hostile_tars_are_refused_or_set_aside(tmp_path: Path, outside: Callable[[], set[str]], figure: Figure) -> None:
    num_good = 0
    for number, (case, data) in enumerate(TARS.items()):
        (tmp_path / "a.tar").write_bytes(data)
        run = RunDir.create(tmp_path / f"run{number}")
        summary = import_shards([str(tmp_path / "a.tar")], run)
        report = verify_run(run, deep=True)
        assert report.exit_code == 0, (case, report.line())
        assert summary.failures or summary.num_samples, case
        assert set(summary.failures) <= set(REASONS), case
        samples = list(read_samples(run, "00000")) if run.shard_names() else []
        if any(name == "good.png" for name in _names(data)):
            num_good += 1
            kept = {sample.key: sample.image for sample in samples}
            assert GOOD[0][1] in kept.values() or "damage" in case, case
        line = summary.line()
        assert clean_for_terminal(line, 2000) == line, case
        assert outside() == set(), case
    assert num_good > 30
    figure(
        9,
        f"{len(TARS)} of {len(TARS)} hostile tars read or set aside, nothing written outside the run; {num_good} held "
        "a good sample too, which was kept",
    )


def _names(data: bytes) -> list[str]:
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
            return [member.name for member in tar]
    except (tarfile.TarError, EOFError, ValueError):
        return []


SCRIPT = """
import re, sys
from pathlib import Path
from capfilt.curation.import_shards import import_shards
from capfilt.data.rundir import RunDir
import_shards([sys.argv[1]], RunDir.create(sys.argv[2]))
print(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of memory is read from Linux's /proc")
def test_hostile_tars_that_claim_to_be_large_take_little_memory(tmp_path: Path, figure: Figure) -> None:
    """In a process of its own each."""
    most = 0
    for case in ("gzip of a bomb", "damage: a member of 1 TiB", "damage: a huge PAX header", "deep metadata"):
        (tmp_path / "a.tar").write_bytes(TARS[case])
        arguments = [sys.executable, "-c", SCRIPT, tmp_path / "a.tar", tmp_path / case.replace(" ", "_")]
        done = subprocess.run(arguments, capture_output=True, text=True, check=True)
        most = max(most, int(done.stdout) // 1024)
    assert most < 512
    figure(9, f"those that claim to be large: {most} MiB at most, the program's own included")
