"""A small run's life, stage by stage, for tests that interrupt it wherever they can."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from capfilt.data.commit import file_sha256
from capfilt.data.rundir import RunDir
from tests.data import conftest as small

COMMITS: dict[str, Callable[..., None]] = {
    "shards": small.commit_shard, "captions": small.commit_captions, "clip": small.commit_clip,
    "itm": small.commit_itm, "manifest": small.commit_manifest,
}  # fmt: skip
NUM_SHARDS = 2


def live(path: Path) -> None:
    """Make whatever of a run is not there yet."""
    run = RunDir.create(path)
    with run.lock():
        for number in range(NUM_SHARDS):
            shard = f"{number:05d}"
            for stage, commit in COMMITS.items():
                if not run.stage_file(stage, shard).exists():
                    commit(run, shard, **({"num_shards": NUM_SHARDS} if stage == "shards" else {}))


def committed_files(path: Path) -> dict[str, str]:
    """Relative path → digest of everything that was committed."""
    files = [file for file in path.rglob("*") if file.is_file() and file.suffix in (".parquet", ".tar")]
    return {str(file.relative_to(path)): file_sha256(file) for file in files}
