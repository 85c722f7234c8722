"""Row 20: no command looks a name up or connects to anything but the machine itself, unless it was told an address.

Each command runs in a network namespace of its own, where there is nothing but loopback, and every look-up and
connection of its processes is noted. None of the variables by which packages are told to be silent is set: what has to
be, capfilt sets.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from capfilt.world.scenes import draw_scene, render
from tests.stress.conftest import FULL, Figure

ROOT = Path(__file__).resolve().parents[2]

WATCH = """
import os, sys
NOTES = os.environ["CAPFILT_TEST_NOTES"]
def note(event, arguments):
    if event in ("socket.connect", "socket.sendto"):
        address = arguments[1]
        if not isinstance(address, tuple) or str(address[0]).startswith("127.") or address[0] in ("::1", "localhost"):
            return
    elif event == "socket.getaddrinfo":
        if str(arguments[0]).startswith("127.") or arguments[0] in (None, "", "::1", "localhost"):
            return
    elif event not in ("socket.gethostbyname", "socket.gethostbyaddr"):
        return
    with open(NOTES, "a") as file:
        file.write(f"{event} {arguments!r} {sys.argv[:4]}\\n")
sys.addaudithook(note)
with open(NOTES + "-of", "a") as file:
    file.write(f"{sys.orig_argv}\\n")
"""
"""sitecustomize.py of every Python process of a command; the watched processes are noted too."""

SWITCHES = ("NO_ALBUMENTATIONS_UPDATE", "DO_NOT_TRACK", "WANDB_", "HF_", "HUGGINGFACE_", "TRANSFORMERS_", "RAY_USAGE_")
"""What the names of variables begin with that keep packages from asking; `make` sets some."""

DOWNLOAD = """
import subprocess, sys
from capfilt.world.site import SiteSettings, WorldSite
with WorldSite(SiteSettings(num_urls=20, behaviour_shares={})) as site:
    command = [sys.executable, "-m", "capfilt", "download", str(site.write_table("urls.parquet")), "runs/downloaded"]
    options = ["--num-processes", "1", "--allow-private-addresses"]
    sys.exit(subprocess.run([*command, *options]).returncode)
"""
"""A site, and a download from it, on the same loopback."""

ALONE = """
import os, sys
from tests.stress.namespaces import CLONE_NEWNET, enter_namespaces
try:
    enter_namespaces(CLONE_NEWNET)
except OSError:
    sys.exit(77)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""
"""Runs a command with nothing but loopback; 77 where that is not permitted."""


def run_alone(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(SWITCHES)} | {
        "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)]),
        "CAPFILT_TEST_NOTES": str(folder / "notes"), "HF_HOME": str(folder / "hub"),
    }  # fmt: skip
    command = [sys.executable, "-c", ALONE, *map(str, arguments)]
    return subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "sitecustomize.py").write_text(WATCH)
    if run_alone(tmp_path, "-c", "pass").returncode:
        pytest.skip("the system does not permit a network namespace of one's own")
    return tmp_path


RECIPE = """
description = "a small world"
[source]
world_urls = 60
world_seed = 3
[download]
samples_per_shard = 30
image_size_px = 64
timeout_seconds = 2.0
num_processes = 1
num_threads = 16
[caption]
captioner = "embedded"
[rank]
clip_model = "embedded"
[filter]
filter_model = "embedded"
[train.stage1]
image_encoder = "embedded"
num_queries = 4
max_steps = 2
warmup_steps = 1
batch_size = 4
"""


def test_the_watch_sees_what_it_is_for(folder: Path) -> None:
    tried = "import socket\ntry: socket.create_connection(('example.com', 80), 2)\nexcept OSError: pass"
    assert run_alone(folder, "-c", tried).returncode == 0
    assert "example.com" in (folder / "notes").read_text()


def test_no_command_asks_for_anything(folder: Path, figure: Figure) -> None:
    (folder / "small.toml").write_text(RECIPE)
    render_picture(folder / "scene.png")
    commands: list[tuple[object, ...]] = [
        ("--version",), ("generate", "embedded", folder / "scene.png"),
        ("explain", "embedded", folder / "scene.png", "a red ball"), ("run", "small.toml", "runs/small", "--dry-run"),
    ]  # fmt: skip
    if FULL:
        commands += [
            ("run", "small.toml", "runs/small"), ("stats", "runs/small"), ("verify", "runs/small", "--deep"),
            ("select", "runs/small", "--threshold", 0.4),
            ("evaluate", "filter", "runs/small", "--world"),
            ("evaluate", "retrieval", "embedded", "--references", "runs/small", "--k-test", 4),
            ("export", "runs/small", "--output", "pairs.csv"), ("report", "runs/small", "--output", "report.html"),
            ("import", "runs/downloaded/shards/00000.tar", "runs/imported"),
            # adds a shard, of which there is no manifest yet
            ("retry", "runs/small", "--reason", "not_found", "--allow-private-addresses"),
        ]  # fmt: skip
    lines: list[tuple[object, ...]] = [("-c", DOWNLOAD), *(("-m", "capfilt", *command) for command in commands)]
    for line in lines:
        done = run_alone(folder, *line)
        assert done.returncode == 0, (line, done.stderr[-2000:])
    assert "capfilt.curation.worker" in (folder / "notes-of").read_text()
    notes = (folder / "notes").read_text() if (folder / "notes").exists() else ""
    assert notes == ""
    figure(20, f"{len(lines)} commands in a network of their own: 0 look-ups, 0 connections but to loopback")


def render_picture(path: Path) -> None:
    Image.fromarray(render(draw_scene(9, "test"), 96, 96)).save(path)
