"""Row 22: `verify` finds a bit flipped anywhere in a run, and raises no false alarm.

Damages of forty kinds are seeded one by one in `tests/data/test_verify.py`.
"""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest

from capfilt.data.rundir import STAGES, RunDir
from capfilt.data.verify import verify_run
from tests.stress.conftest import FULL, Figure
from tests.stress.lives import live


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    path = tmp_path_factory.mktemp("template")
    live(path)
    return RunDir.open(path)


def test_a_flip_in_any_file_is_found(template: RunDir, tmp_path: Path, figure: Figure) -> None:
    rng, num = random.Random(3), 300 if FULL else 30
    files = [path for stage in (*STAGES, "quarantine") for path in sorted((template.path / stage).glob("*"))]
    for _ in range(num):
        run = RunDir(Path(shutil.copytree(template.path, tmp_path / "run")))
        path = run.path / rng.choice(files).relative_to(template.path)
        content = bytearray(path.read_bytes())
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
        assert verify_run(run, deep=True).exit_code == 5, path
        shutil.rmtree(run.path)
    report = verify_run(template, deep=True)
    assert (report.findings, report.unfinished) == ([], [])
    figure(22, f"{num} of {num} flipped bits anywhere in a run found; no false alarm")
