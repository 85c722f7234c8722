"""Row 7: machines of a Ray cluster lost, the command killed, the cluster's head gone: the files of one process.

The cluster's machines are nodes of Ray's own on this one, a core each. The command is killed by SIGKILL, a machine with
all of its processes; each is replaced, and a command that has ended is given again.
"""

from __future__ import annotations

import random
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from capfilt.data.rundir import RunDir
from capfilt.data.verify import verify_run
from tests.cli.conftest import capfilt, capfilt_process
from tests.curation.small_runs import Models, make_run, save_models
from tests.stress.conftest import FULL, Figure
from tests.stress.lives import committed_files

pytest.importorskip("ray", reason="the extra `ray` is not installed")
from ray.cluster_utils import Cluster

NUM_SHARDS, NUM_SAMPLES = (20, 50) if FULL else (6, 12)
LOSSES = {"machine": 10, "command": 5, "head": 1} if FULL else {"machine": 1}
PAUSE_SECONDS = (0.0, 4.0)
"""After something new was committed, until the next loss."""
NUM_MACHINES = 2
pytestmark = pytest.mark.timeout(3600 if FULL else 900)
LONGEST_SECONDS = 300.0
"""Without anything being committed."""
RECIPE = """
description = "small models"
[caption]
captioner = "{models}/captioner"
num_captions = 4
dtype = "float32"
batch_size = 4
[rank]
clip_model = "{models}/clip"
dtype = "float32"
batch_size = 4
[filter]
filter_model = "{models}/filter"
dtype = "float32"
batch_size = 4
"""


class Machines:
    """A cluster of one head, which works on nothing, and machines of one core."""

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        """Anew, where the head is gone."""
        noticed_soon = {"health_check_period_ms": 1000, "health_check_failure_threshold": 4}
        own = {"include_dashboard": False, "_system_config": {"worker_niceness": 0, **noticed_soon}}
        self._cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **own})
        self.address = self._cluster.address
        self._nodes = [self._cluster.add_node(num_cpus=1) for _ in range(NUM_MACHINES)]

    def lose_one(self, rng: random.Random) -> None:
        """A machine with all that runs on it; another one comes."""
        lost = self._nodes.pop(rng.randrange(len(self._nodes)))
        self._cluster.remove_node(lost, allow_graceful=False)
        self._nodes.append(self._cluster.add_node(num_cpus=1))

    def stop(self) -> None:
        """All of it."""
        self._cluster.shutdown()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return save_models(tmp_path_factory.mktemp("models"))


def test_losses(models: Models, tmp_path: Path, figure: Figure) -> None:
    recipe = tmp_path / "small.toml"
    recipe.write_text(RECIPE.format(models=models.root))
    run = make_run(tmp_path / "run", num_shards=NUM_SHARDS, num_samples=NUM_SAMPLES)
    undisturbed = Path(shutil.copytree(run.path, tmp_path / "undisturbed"))
    assert capfilt("run", recipe, undisturbed).code == 0
    machines, rng = Machines(), random.Random(7)
    losses = [kind for kind, num in LOSSES.items() for _ in range(num)]
    rng.shuffle(losses)
    losses.sort(key=lambda kind: kind != "head")  # the head while most is still to do
    happened = Counter[str]()
    began = time.monotonic()
    try:
        process = start(recipe, run, machines)
        for kind in losses:
            while True:
                wait_for_news(run, process)
                time.sleep(rng.uniform(*PAUSE_SECONDS) if FULL else 0.0)
                if process.poll() is None:
                    break
                process.communicate()
                clear(run, rng)  # all was done before the losses were: some of it once more
                process = start(recipe, run, machines)
            happened[kind] += 1
            LOSE[kind](machines, process, rng)
            if process.poll() is not None:
                process.communicate()
                process = start(recipe, run, machines)
        _, said = process.communicate(timeout=LONGEST_SECONDS)
        if process.returncode:
            done = capfilt(*command(recipe, run, machines))
            assert done.code == 0, said + done.err
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        machines.stop()
    assert committed_files(run.path) == committed_files(undisturbed)
    report = verify_run(run, deep=True)
    assert (report.findings, report.unfinished) == ([], [])
    lost = ", ".join(f"{num} {kind}s" if num > 1 else f"1 {kind}" for kind, num in happened.items())
    seconds = time.monotonic() - began
    figure(7, f"{NUM_SHARDS} shards x {NUM_SAMPLES}, lost: {lost}; {seconds:,.0f} s; the files of one process")


def command(recipe: Path, run: RunDir, machines: Machines) -> list[object]:
    engine = ["--engine", "ray", "--address", machines.address, "--cpus-per-worker", 1, "--num-workers", NUM_MACHINES]
    return ["run", recipe, run.path, *engine]


def start(recipe: Path, run: RunDir, machines: Machines) -> subprocess.Popen[str]:
    return capfilt_process(*command(recipe, run, machines))


def num_committed(run: RunDir) -> int:
    return len(list(run.path.glob("*/*.parquet")))


def wait_for_news(run: RunDir, process: subprocess.Popen[str]) -> None:
    """Return when something more is committed, or the command has ended."""
    before, end = num_committed(run), time.monotonic() + LONGEST_SECONDS
    while num_committed(run) == before and process.poll() is None:
        assert time.monotonic() < end, "nothing more was committed"
        time.sleep(0.05)


def clear(run: RunDir, rng: random.Random) -> None:
    """Take the stages of half of the shards away."""
    for shard in rng.sample(run.shard_names(), NUM_SHARDS // 2):
        for stage in ("captions", "clip", "itm", "manifest"):
            run.stage_file(stage, shard).unlink(missing_ok=True)


def lose_machine(machines: Machines, _process: Any, rng: random.Random) -> None:
    machines.lose_one(rng)


def lose_command(_machines: Machines, process: subprocess.Popen[str], _rng: random.Random) -> None:
    process.kill()
    process.wait()


def lose_head(machines: Machines, process: subprocess.Popen[str], _rng: random.Random) -> None:
    """With it the cluster is gone; the command has to end by itself, in failure."""
    machines.stop()
    process.communicate(timeout=LONGEST_SECONDS)
    assert process.returncode not in (0, None)
    machines.start()


LOSE: dict[str, Callable[[Machines, Any, random.Random], None]] = {
    "machine": lose_machine, "command": lose_command, "head": lose_head,
}  # fmt: skip
