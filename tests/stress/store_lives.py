"""A small run's life on an object store, for tests that end or stop it before any of its calls that change it."""

from __future__ import annotations

import itertools
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

import s3fs

from capfilt.data import leases
from capfilt.data.commit import input_digest, read_commit_record
from capfilt.data.paths import exists
from capfilt.data.rundir import STAGES, RunDir
from capfilt.errors import CapfiltError
from tests.data import conftest as small

CHANGING = ("_pipe_file", "_put_file", "_rm_file")
"""The calls through which a run changes on the store."""
DIED, REFUSED = 9, 3
COMMITS: dict[str, Callable[..., None]] = {
    "shards": small.commit_shard, "captions": small.commit_captions, "clip": small.commit_clip,
    "itm": small.commit_itm, "manifest": small.commit_manifest,
}  # fmt: skip


def live(run: RunDir, num_samples: int = 3) -> None:
    """Make whatever of its one shard is not there yet; then its captions anew, and what follows from them."""
    with run.lock():
        for seed in (0, 1):
            for stage in STAGES:
                if not exists(run.stage_file(stage, "00000")):
                    COMMITS[stage](run, "00000", **({"num_samples": num_samples} if stage == "shards" else {}))
                elif stage != "shards" and _is_old(run, stage, seed):
                    COMMITS[stage](run, "00000", replace=True, **({"seed": seed} if stage == "captions" else {}))


def _is_old(run: RunDir, stage: str, seed: int) -> bool:
    record = read_commit_record(run.stage_file(stage, "00000"))
    return record.input_digest != input_digest(run, stage, "00000") or record.fields.get("seed", seed) < seed


def at_call(number: int, happens: Callable[[], None]) -> None:
    """Have something happen before the n-th call of this process that changes the store, but for its lease's beats."""
    counter = itertools.count()

    def watched(real: Callable[..., Any]) -> Callable[..., Any]:
        async def call(self: Any, path: str, *args: Any, **options: Any) -> Any:
            names = [path, *map(str, args[:1])]
            if not any("/.lock/" in name or "/.workers/" in name for name in names) and next(counter) == number:
                happens()
            return await real(self, path, *args, **options)

        return call

    for name in CHANGING:
        setattr(s3fs.S3FileSystem, name, watched(getattr(s3fs.S3FileSystem, name)))


def main(address: str, call: int, what: str, num_samples: int) -> int:
    """Live; before a call die (`kill`) or stop until one is continued (`stop`). Gives the exit status."""
    if what == "stop":  # another process of this machine is to take this one for dead, as one elsewhere would
        leases._machine = lambda: None
        leases.LEASE_SECONDS, leases.BEAT_SECONDS = 1.5, 0.3
        at_call(call, lambda: os.kill(os.getpid(), signal.SIGSTOP))
    elif what == "kill":
        at_call(call, lambda: os._exit(DIED))
    elif what == "patient":
        leases._machine = lambda: None
        leases.LEASE_SECONDS, leases.BEAT_SECONDS = 1.5, 0.3
    try:
        live(RunDir.create(address), num_samples)
    except CapfiltError as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        return REFUSED
    return 0


if __name__ == "__main__":
    os._exit(main(sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4])))
