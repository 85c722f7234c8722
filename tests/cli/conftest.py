"""The command line in this process, small models, and a small world that was downloaded through it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from capfilt.cli.main import app, report
from capfilt.world.site import SiteSettings, WorldSite
from tests import factories

NUM_URLS = 60
QUIET = {"hang": 0.0, "drip": 0.0, "not_found": 0.05, "truncated": 0.05, "html": 0.05}


@dataclass(frozen=True)
class Finished:
    """What a command left: exit code, standard output, standard error."""

    code: int
    out: str
    err: str

    def json(self) -> Any:
        return json.loads(self.out)


def capfilt(*arguments: object) -> Finished:
    """One command in this process; an error becomes its message and exit code, as `main` makes it."""
    done = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=True)
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        code = report(done.exception)
        return Finished(code, done.stdout, f"{done.stderr}{type(done.exception).__name__}: {done.exception}")
    return Finished(done.exit_code, done.stdout, done.stderr)


def capfilt_process(*arguments: object, in_group_of_its_own: bool = False, **environment: str) -> subprocess.Popen[str]:
    """One command in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "capfilt", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
        start_new_session=in_group_of_its_own,
    )


@dataclass(frozen=True)
class Models:
    """Folders of random models in the published layouts."""

    captioner: Path
    filter: Path
    clip: Path


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    folder = tmp_path_factory.mktemp("cli-models")
    found = Models(folder / "captioner", folder / "filter", folder / "clip")
    factories.save_captioner(found.captioner)
    factories.save_filter(found.filter)
    factories.save_clip(found.clip)
    return found


@pytest.fixture(scope="session")
def downloaded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with three shards, downloaded from the world's site by the command."""
    folder = tmp_path_factory.mktemp("cli-run")
    with WorldSite(SiteSettings(num_urls=NUM_URLS, behaviour_shares=QUIET)) as site:
        table = site.write_table(folder / "urls.parquet")
        done = capfilt(
            "download", table, folder / "run", "--num-shards", 3, "--timeout", 5, "--allow-private-addresses"
        )
    assert done.code == 0, done.err
    return folder / "run"


@pytest.fixture
def run(downloaded: Path, tmp_path: Path) -> Path:
    """A copy of the downloaded run, to work on."""
    return Path(shutil.copytree(downloaded, tmp_path / "run"))
