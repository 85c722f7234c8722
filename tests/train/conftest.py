"""Models and a run that the tests of training share; made once a session."""

from __future__ import annotations

from pathlib import Path

import pytest

from capfilt.data.rundir import RunDir
from tests.train import small_models


@pytest.fixture(scope="session")
def models_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="session")
def blip_dir(models_dir: Path) -> Path:
    return small_models.save_blip(models_dir / "blip")


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """95 samples in three shards; every fifth keeps no caption."""
    return small_models.save_run(tmp_path_factory.mktemp("run") / "run", [40, 30, 25], drop_every=5)
