"""Several processes take the step that one takes with the joint batch: losses, gradients, weights, resumption."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from capfilt.settings import TrainSettings
from capfilt.train.processes import join_processes
from tests.train import ranks_worker

ROOT = Path(__file__).parents[2]


def start(num_processes: int, *command: str) -> subprocess.CompletedProcess[str]:
    """The command in so many gloo ranks, as torchrun starts them."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_processes}"]
    return subprocess.run(
        [*launch, *command], env=environment, capture_output=True, text=True, timeout=240, cwd=ROOT, check=False
    )


@pytest.fixture(scope="module")
def alone() -> dict[str, torch.Tensor]:
    processes = join_processes(TrainSettings(device="cpu"))
    return {k: v for name in ranks_worker.OBJECTIVES for k, v in ranks_worker.take_steps(name, processes).items()}


@pytest.mark.slow
@pytest.mark.parametrize(("num_processes", "sharding"), [(2, "none"), (2, "full"), (4, "none")])
def test_several_processes_are_one_with_the_joint_batch(
    alone: dict[str, torch.Tensor], num_processes: int, sharding: str, tmp_path: Path
) -> None:
    output = tmp_path / "found.safetensors"
    done = start(num_processes, str(ROOT / "tests" / "train" / "ranks_worker.py"), str(output), sharding)
    assert done.returncode == 0, done.stderr[-3000:]
    found = load_file(output)
    assert found.keys() == alone.keys()
    for name, expected in alone.items():
        torch.testing.assert_close(found[name], expected, atol=1e-5, rtol=2e-4, msg=lambda m, n=name: f"{n}: {m}")
