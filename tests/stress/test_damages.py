"""Row 22: `verify` finds what was damaged, names the shard, and raises no false alarm."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest

from capfilt.data.rundir import STAGES, RunDir
from capfilt.data.verify import verify_run
from tests.data import conftest as small
from tests.data.test_verify import BAD, DAMAGES
from tests.stress.conftest import FULL, Figure

COMMITS = (small.commit_shard, small.commit_captions, small.commit_clip, small.commit_itm, small.commit_manifest)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    run = RunDir.create(tmp_path_factory.mktemp("template"))
    for number in range(2):
        small.commit_shard(run, f"{number:05d}", 4, num_shards=2)
        for commit in COMMITS[1:]:
            commit(run, f"{number:05d}")
    return run


def test_every_seeded_damage_is_found(template: RunDir, tmp_path: Path, figure: Figure) -> None:
    cases = list(DAMAGES)[:: 1 if FULL else 6]
    for case in cases:
        run = RunDir(Path(shutil.copytree(template.path, tmp_path / "run")))
        DAMAGES[case](run)
        report = verify_run(run, deep=True)
        found = {finding.shard for finding in report.findings + report.unfinished}
        assert report.exit_code in (1, 5), case
        assert BAD in found <= {BAD, ""}, case
        shutil.rmtree(run.path)
    report = verify_run(template, deep=True)
    assert (report.findings, report.unfinished) == ([], [])
    figure(22, f"{len(cases)} of {len(cases)} seeded damages found, the shard named; no false alarm")


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
    figure(22, f"{num} of {num} flipped bits anywhere in a run found")
