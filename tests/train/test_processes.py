"""Several processes take the step that one takes with the joint batch: losses, gradients, weights, resumption."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file
from transformers import Blip2ForImageTextRetrieval

from capfilt.data.rundir import RunDir
from capfilt.errors import UsageError
from capfilt.settings import TrainSettings
from capfilt.train.processes import join_processes, launched_autocast
from tests.train import ranks_worker, small_models

ROOT = Path(__file__).parents[2]


def start(num_processes: int, *command: str) -> subprocess.CompletedProcess[str]:
    """The command in so many gloo ranks, as torchrun starts them."""
    return subprocess.run(
        launch(num_processes, *command), env=environment(), capture_output=True, text=True, timeout=280, check=False
    )


def launch(num_processes: int, *command: str) -> list[str]:
    started = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_processes}"]
    return [*started, *command]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


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


# --- whole trainings, as users start them --------------------------------------------------------------


@pytest.fixture(scope="module")
def blip_start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_models.save_blip(tmp_path_factory.mktemp("start") / "blip")


def command(run: RunDir, start_dir: Path, output: Path, batch_size: int, **changes: object) -> list[str]:
    """`capfilt train stage1`, 60 steps of 8 images in all, with a checkpoint every second step."""
    chosen = {
        "batch_size": batch_size, "num_queries": 4, "dropout": 0.1, "max_text_tokens": 16, "log_every_steps": 1,
        "max_steps": 60, "warmup_steps": 2, "save_every_steps": 2, **changes,
    }  # fmt: skip
    assignments = [item for name, value in chosen.items() for item in ("--set", f"{name}={value}")]
    named = ["--image-encoder", str(start_dir), "--output", str(output), "--device", "cpu"]
    return ["-m", "capfilt", "train", "stage1", str(run.path), *named, *assignments]


def losses_in(folder: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "images_per_second"} for line in lines]


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["none", "full"])
def test_killed_processes_go_on_exactly(run: RunDir, blip_start: Path, tmp_path: Path, sharding: str) -> None:
    """kill -9 of both ranks in the middle; the same command again ends as an undisturbed one does."""
    done = start(2, *command(run, blip_start, tmp_path / "whole", 4, sharding=sharding))
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("stage 1: 60 steps") == 1, "one process speaks"
    output = tmp_path / "killed"
    options = command(run, blip_start, output, 4, sharding=sharding)
    launched = psutil.Popen(
        launch(2, *options), env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 200
        while not list((output / "checkpoints").glob("step-*")) and time.monotonic() < deadline:
            time.sleep(0.01)
    finally:
        everyone = [launched, *launched.children(recursive=True)]
        for process in everyone:
            process.kill()
        psutil.wait_procs(everyone, timeout=30)
    reached = int(max(path.name for path in (output / "checkpoints").glob("step-*")).removeprefix("step-"))
    assert 0 < reached < 60, "it was killed in the middle"
    again = start(2, *options)
    assert again.returncode == 0, again.stderr[-3000:]
    for found, expected in zip(losses_in(output), losses_in(tmp_path / "whole"), strict=True):
        assert found == pytest.approx(expected, abs=1e-6)
    whole, resumed = (load_file(folder / "model.safetensors") for folder in (tmp_path / "whole", output))
    torch.testing.assert_close(resumed, whole, atol=1e-6, rtol=0)
    assert Blip2ForImageTextRetrieval.from_pretrained(output).num_parameters() > 0


@pytest.mark.slow
def test_two_processes_train_as_one_with_twice_the_batch(run: RunDir, blip_start: Path, tmp_path: Path) -> None:
    for num_processes, batch_size in ((1, 8), (2, 4)):
        output = tmp_path / str(num_processes)
        done = start(num_processes, *command(run, blip_start, output, batch_size, dropout=0, max_steps=6))
        assert done.returncode == 0, done.stderr[-3000:]
    for found, expected in zip(losses_in(tmp_path / "2"), losses_in(tmp_path / "1"), strict=True):
        assert found == pytest.approx(expected, abs=1e-4)


def test_what_cannot_be_shared_out_is_refused() -> None:
    with pytest.raises(UsageError, match="sharding 'full' with optimizer 'muon'"):
        join_processes(TrainSettings(device="cpu", sharding="full", optimizer="muon"))


def test_the_launcher_s_precision_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `accelerate launch --mixed_precision` hands it on."""
    for launched, named, expected in (
        ("no", "float16", "float16"), ("bf16", "float32", "bfloat16"), ("bf16", "auto", "bfloat16"),
        ("fp16", "float16", "float16"),
    ):  # fmt: skip
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
        assert launched_autocast(TrainSettings(autocast=named)) == expected
    for launched, named in (("fp16", "bfloat16"), ("fp8", "float32")):
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
        with pytest.raises(UsageError, match=f"mixed precision '{launched}' and autocast is '{named}'"):
            join_processes(TrainSettings(device="cpu", autocast=named))


@pytest.mark.slow
def test_accelerate_launch_trains_in_its_precision(run: RunDir, blip_start: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    options = command(run, blip_start, output, 8, max_steps=2)[1:]
    launcher = ["-m", "accelerate.commands.launch", "--cpu", "--mixed_precision", "bf16", "--num_processes", "1"]
    done = subprocess.run(
        [sys.executable, *launcher, "-m", *options],
        env=environment(), capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((output / "training.json").read_text())["fields"]["autocast"] == "bfloat16"


@pytest.mark.slow
def test_processes_that_would_begin_apart_are_refused(run: RunDir, blip_start: Path, tmp_path: Path) -> None:
    """As on machines whose disks are their own: one process finds a checkpoint, the other none."""
    there, empty = tmp_path / "there", tmp_path / "empty"
    done = start(1, *command(run, blip_start, there, 8, max_steps=4))
    assert done.returncode == 0, done.stderr[-3000:]
    script = tmp_path / "apart.py"
    options = command(run, blip_start, tmp_path / "OUTPUT", 8, max_steps=4)[2:]
    script.write_text(
        "import os, sys\nfrom capfilt.cli.main import main\n"
        f"own = {[str(there), str(empty)]!r}[int(os.environ['RANK'])]\n"
        f"sys.argv = ['capfilt', *[own if o.endswith('OUTPUT') else o for o in {options!r}]]\nmain()\n"
    )
    record = json.loads((there / "training.json").read_text())
    record["fields"]["num_processes"] = 2
    (there / "training.json").write_text(json.dumps(record))
    refused = start(2, str(script))
    assert refused.returncode != 0
    assert "The processes do not begin together: finished differs (process 0: True; process 1: False)" in refused.stderr
