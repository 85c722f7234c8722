"""The dashboard: right at every width, safe, in colour where a terminal has colours, and its figures are the run's."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from rich.cells import cell_len

from capfilt.data.rundir import RunDir
from capfilt.report.dashboard import dashboard_lines
from capfilt.report.histogram import Spread
from capfilt.report.shard_stats import ShardSize
from capfilt.report.sparks import fitted, mark_at, resampled, sparks
from capfilt.report.stats import HostStats, RunStats, compute_stats
from tests.cli.conftest import capfilt
from tests.hostile_texts import TRICKS
from tests.report.test_stats import write_rest, write_shards

FORBIDDEN = {chr(code) for code in (*range(32), *range(127, 160))} - {"\n"} | set("\u202e\u2066\u200b\u200e\ufeff")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    run = RunDir.create(tmp_path_factory.mktemp("stats") / "run")
    write_shards(run)
    write_rest(run)
    return run


@pytest.fixture(scope="module")
def stats(run: RunDir) -> RunStats:
    return compute_stats(run)


@pytest.mark.parametrize("width", [30, 48, 80, 115, 116, 140, 220])
@pytest.mark.parametrize("plain", [False, True])
def test_every_width_holds_and_says_the_same(stats: RunStats, width: int, plain: bool) -> None:
    lines = dashboard_lines(stats, width, plain=plain)
    assert max(map(cell_len, lines)) <= width
    assert not plain or all(line.isascii() for line in lines)
    assert width < 80 or len(lines) <= 40, "one screen"
    if width == 140:
        lines = [line[:70].rstrip() for line in lines] + [line[70:].strip() for line in lines]
    if width in (80, 140):
        text = " ".join(" ".join(lines).split())
        for said in (
            "2 of 5 rows 40.0%", "timeout 2, not_found 1", "2 hosts; most failures: y 3 of 3", "png 100%",
            "2 of 8 kept 25.0%", "self-BLEU", "2 of 2 images (100.0%) have a kept pair", "manifest 1/1",
        ):  # fmt: skip
            assert said in text


def test_a_run_under_way_shows_what_there_is(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path / "run")
    write_shards(run)
    text = "\n".join(dashboard_lines(compute_stats(run), 80))
    assert "manifest 0/1" in text
    assert "Pairs" not in text
    assert "Scores" not in text


def test_hostile_names_are_cleaned(stats: RunStats) -> None:
    for trick in TRICKS.values():
        hosts = [HostStats(trick, 3, 3, {trick: 3})]
        outliers = [ShardSize(trick, 1, 1)]
        hostile = replace(
            stats, run=trick, download=replace(stats.download, worst_hosts=hosts, by_reason={trick: 3}),
            shards=replace(stats.shards, outliers=outliers, num_outliers=1),
        )  # fmt: skip
        text = "\n".join(dashboard_lines(hostile, 100))
        assert not FORBIDDEN & set(text)


def test_shards_far_from_the_median_are_named(stats: RunStats) -> None:
    outliers = [ShardSize("00017", 12, 3_400_000)]
    spread = Spread(20, 12, 1000.0, 950.6, 1000)
    shards = replace(stats.shards, num_shards=20, images=spread, tar_bytes=spread, outliers=outliers, num_outliers=1)
    text = "\n".join(dashboard_lines(replace(stats, shards=shards), 100))
    assert "1 far from the median: 00017 (12, 3.4 MB)" in text


def test_colours_are_for_terminals(run: RunDir) -> None:
    assert "\x1b" not in capfilt("stats", run.path).out
    assert "\x1b[" in on_a_terminal("stats", run.path)
    assert "\x1b[3" not in on_a_terminal("stats", run.path, NO_COLOR="1")
    assert "\x1b" not in on_a_terminal("stats", run.path, TERM="dumb")
    narrow = on_a_terminal("stats", run.path, COLUMNS="44", NO_COLOR="1", TERM="dumb")
    assert max(map(cell_len, narrow.splitlines()[:20])) <= 44


def on_a_terminal(*arguments: object, **environment: str) -> str:
    """What a command writes to a pseudo-terminal."""
    master, terminal = pty.openpty()
    variables = {"TERM": "xterm-256color", "COLUMNS": "100", **environment}
    process = subprocess.Popen(
        [sys.executable, "-m", "capfilt", *map(str, arguments)],
        stdout=terminal, stderr=subprocess.DEVNULL, env={**os.environ, **variables},
    )  # fmt: skip
    os.close(terminal)
    found = b""
    try:
        while piece := os.read(master, 4096):
            found += piece
    except OSError:  # the other side is closed
        pass
    os.close(master)
    assert process.wait() == 0
    return found.decode().replace("\r\n", "\n")


def test_sections(run: RunDir) -> None:
    one = capfilt("stats", run.path, "--section", "hosts").out
    assert one.startswith("Hosts with most failures")
    assert "Download" not in one
    everything = capfilt("stats", run.path, "--section", "all").out
    for heading in ("Run ", "Shards", "Download", "Hosts", "Pairs", "Captions", "CLIP score", "Kept rate", "Top words"):
        assert f"\n{heading}" in f"\n{everything}"
    refused = capfilt("stats", run.path, "--section", "colours")
    assert refused.code == 2
    assert "threshold" in refused.err


def test_sparks() -> None:
    assert sparks([0, 1, 4, 8]) == " ▁▄█"
    assert sparks([0, 1, 1000]) == " ▁█", "what is there is seen"
    assert sparks([0, 1, 4, 8], plain=True).isascii()
    assert sparks([]) == sparks([], 1.0) == ""
    assert fitted([0, 0, 1, 2, 3, 4, 5, 0], 2) == (3, 2, [6, 9])
    assert fitted([0, 0], 5)[2] == []
    assert mark_at(0.5, 11, "0.5") == "     ▲ 0.5"
    assert mark_at(1.0, 11, "1", plain=True) == "          ^ 1"
    assert resampled([0.0, 0.5, 1.0], 2) == [0.0, 1.0]
    assert resampled([0.0, 0.5, 1.0], 9)[::4] == [0.0, 0.5, 1.0]
    assert resampled([], 4) == []


def test_a_picture_of_it_loads_nothing_and_says_the_same(run: RunDir, tmp_path: Path) -> None:
    assert capfilt("stats", run.path, "--svg", tmp_path / "stats.svg").code == 0
    text = (tmp_path / "stats.svg").read_text(encoding="utf-8")
    tree = ElementTree.fromstring(text)
    assert tree.tag == "{http://www.w3.org/2000/svg}svg"
    said = " ".join(" ".join(element.itertext()) for element in tree.iter()).replace("\xa0", " ")
    for figure in ("40.0%", "25.0%", "self-BLEU"):
        assert figure in said
    assert not re.search(
        r"url\((?!#)|href|@import|https?://(?!www\.w3\.org)", text.replace("https://www.textualize.io", "")
    )
    refused = capfilt("stats", run.path, "--svg", tmp_path / "none" / "stats.svg")
    assert refused.code == 2
