"""One run for the exports of a module."""

from __future__ import annotations

import pytest

from capfilt.data.rundir import RunDir
from tests.export.runs import make_scored_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    return make_scored_run(tmp_path_factory.mktemp("export") / "run")
