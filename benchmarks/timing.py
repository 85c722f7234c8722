"""Two or more sides of one piece of work, timed in turns, each in a process of its own.

In: the name of the work, a `Case`, how many rounds. Out: seconds of every pass of every side, and the peak of its
resident memory. One side computes at a time; in a round every side does one pass, so that a machine's slower
moments meet all of them.

    python -m benchmarks.timing WORK SIDE CASE_AS_JSON      (one side; the parent starts it)
"""

from __future__ import annotations

import contextlib
import json
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import transformers

from benchmarks.sides import Case
from benchmarks.works import SIDES

READY = "ready"


@dataclass
class Timed:
    """What one side took."""

    seconds: list[float] = field(default_factory=list)
    """Of each pass."""
    peak_mib: float = 0.0
    """Largest resident memory of the process, loading included."""

    @property
    def median(self) -> float:
        """Seconds of a pass."""
        return statistics.median(self.seconds)

    @property
    def minimum(self) -> float:
        """Seconds of the quickest pass."""
        return min(self.seconds)


class _Side:
    """A process that does a pass whenever it is asked to."""

    def __init__(self, name: str, command: list[str]) -> None:
        self.name = name
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def read(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline().strip()
        if not line:
            raise RuntimeError(f"{self.name} ended; see above why")
        return line

    def wait_until_ready(self) -> None:
        """Loaded, and warmed up by one pass."""
        answer = self.read()
        if answer != READY:
            raise RuntimeError(f"{self.name} says {answer!r}; expected {READY!r}")

    def kill(self) -> None:
        """Whatever it does; nothing where it has ended."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()

    def ask(self) -> float:
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        return float(self.read())

    def end(self) -> float:
        """Peak resident memory in MiB."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        return float(self.read())


def time_sides(
    work: str, case: Case, rounds: int, sides: list[str] | None = None, others: dict[str, list[str]] | None = None
) -> dict[str, Timed]:
    """Each side's passes; one more before them warms up. `others` are sides that an environment of their own runs:
    name → command that answers as this module does."""
    asked = _as_json(case)
    commands = {
        name: [sys.executable, "-m", "benchmarks.timing", work, name, asked] for name in sides or list(SIDES[work])
    } | (others or {})
    found = {name: Timed() for name in commands}
    with contextlib.ExitStack() as stack:
        running = {}
        for name, command in commands.items():  # one after another: loading must not disturb loading
            running[name] = side = _Side(f"{name} of {work}", command)
            stack.callback(side.kill)
            side.wait_until_ready()
        for _ in range(rounds):
            for name, side in running.items():
                found[name].seconds.append(side.ask())
        for name, side in running.items():
            found[name].peak_mib = side.end()
    return found


def _as_json(case: Case) -> str:
    return json.dumps(asdict(case) | {"models": str(case.models)})


def find_floor(case: Case) -> float:
    """Seconds that the matrix products of a pass over a shard take at the processor's best."""
    command = [sys.executable, "-m", "benchmarks.floor", _as_json(case)]
    found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])
    return found["gflop"] / found["peak_gflop_per_s"]


def _serve(work: str, side: str, asked: str) -> None:
    transformers.logging.disable_progress_bar()
    options = json.loads(asked)
    run = SIDES[work][side](Case(**options | {"models": Path(options["models"])}))
    run()
    print(READY, flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        run()
        print(time.perf_counter() - start, flush=True)
    print(read_peak_mib(), flush=True)


def read_peak_mib() -> float:
    """Largest resident memory of this process; on Linux not what it inherited of its parent when it was started."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    _serve(*sys.argv[1:])
