"""How long the stages of a run took: a small file for each command that worked on it, beside what it made.

In: what a command did, at its end or when it is interrupted; one that is killed leaves none. Out: for `stats`, all of
them. They are figures for people: nothing depends on them, and where one cannot be written the work goes on.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from uuid import uuid4

from capfilt.data.paths import AnyPath, names_in, read_bytes
from capfilt.data.rundir import RunDir
from capfilt.errors import CapfiltError

FOLDER = "timings"
MAX_BYTES, MAX_FILES = 16_384, 10_000


@dataclass(frozen=True, kw_only=True)
class Timing:
    """One command's work on a run."""

    stages: dict[str, tuple[int, float]]
    """Stage → images (or rows of the URL table) that were new to it, and the seconds that its model (or the servers)
    worked on them, in all workers together."""
    seconds: float
    """From the command's begin to its end, loading models included."""


def note_timing(run: RunDir, timing: Timing) -> None:
    """Write it down, if anything was done."""
    if any(num for num, _ in timing.stages.values()):
        with suppress(OSError, CapfiltError):
            run.write_note(f"{FOLDER}/{time.time_ns()}-{uuid4().hex[:8]}.json", json.dumps(asdict(timing)))


def read_timings(run: RunDir) -> Iterator[Timing]:
    """Those of the last MAX_FILES commands, the oldest first; what is no timing is passed over."""
    folder = run.path / FOLDER
    for name in sorted(names_in(folder))[-MAX_FILES:]:
        if name.endswith(".json") and (found := _read(folder / name)) is not None:
            yield found


def _read(path: AnyPath) -> Timing | None:
    try:
        found = json.loads(read_bytes(path, MAX_BYTES))
        stages = {str(stage): (int(num), float(seconds)) for stage, (num, seconds) in found["stages"].items()}
        timing = Timing(stages=stages, seconds=float(found["seconds"]))
    except (OSError, CapfiltError, ArithmeticError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    numbers = (timing.seconds, *(number for own in stages.values() for number in own))
    return timing if all(math.isfinite(number) and number >= 0 for number in numbers) else None
