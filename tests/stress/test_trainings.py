"""Row 19: trainings in any number of processes on any number of shards, losses that are not finite, and SIGKILL."""

from __future__ import annotations

import itertools
import multiprocessing
import random
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from capfilt.errors import CapfiltError
from capfilt.models.ranks import Ranks
from capfilt.settings import TrainSettings
from capfilt.train.batches import Cursor, iterate_batches
from capfilt.train.checkpoint import find_checkpoint
from capfilt.train.pairs import read_pairs
from tests.stress.conftest import FULL, Figure
from tests.train import small_models
from tests.train.test_loop import SETTINGS, read_metrics, run_training
from tests.train.test_processes import command, losses_in, start

BATCH = 2
SHARD_SIZES = [9, 3, 14, 5, 11, 2, 7]


@pytest.mark.parametrize("in_memory", [True, False])
def test_equal_steps_whatever_the_shards(tmp_path: Path, in_memory: bool, figure: Figure) -> None:
    """Shards of unequal size; every rank takes the same number of steps an epoch, and no image twice.

    The ranks are asked one after the other; `test_processes_of_their_own_on_uneven_shards` starts them.
    """
    sizes, combinations = SHARD_SIZES, 0
    for num_shards in range(1, 8) if FULL else (1, 3, 7):
        run = small_models.save_run(tmp_path / f"run{num_shards}", sizes[:num_shards])
        limit = {} if in_memory else {"memory_limit_bytes": 0}
        for num_ranks in range(1, 5):
            steps: list[list[list[str]]] = []
            for rank in range(num_ranks):
                dataset = read_pairs([run], image_size_px=16, **limit)
                ranks = Ranks(rank, num_ranks, lambda tensor: tensor)
                stream = iterate_batches(dataset, TrainSettings(batch_size=BATCH), Cursor(), ranks=ranks)
                taken = list(itertools.takewhile(lambda batch: batch.cursor.epoch == 0, stream))
                steps.append([batch.keys for batch in taken])
            assert len({len(own) for own in steps}) == 1
            seen = [key for own in steps for keys in own for key in keys]
            assert len(seen) == len(set(seen))
            assert len(seen) > 0
            assert 0 <= sum(sizes[:num_shards]) - len(seen) < BATCH * num_ranks, "what fills no step is left out"
            combinations += 1
    place = "in memory" if in_memory else "streamed"
    figure(19, f"{combinations} combinations of shards and ranks, {place}: equal steps, no image twice in an epoch")


@pytest.mark.skipif(not FULL, reason="starts four processes; of the full size (CAPFILT_STRESS=1)")
def test_processes_of_their_own_on_uneven_shards(tmp_path: Path, figure: Figure) -> None:
    """Three gloo ranks that torchrun starts, over three epochs, beside one process with the joint batch."""
    run = small_models.save_run(tmp_path / "run", SHARD_SIZES)
    blip = small_models.save_blip(tmp_path / "blip")
    num_ranks, num_steps = 3, 24
    assert num_steps == 3 * (sum(SHARD_SIZES) // (num_ranks * BATCH))
    for num_processes in (1, num_ranks):
        output, batch = tmp_path / str(num_processes), num_ranks * BATCH // num_processes
        done = start(num_processes, *command(run, blip, output, batch, dropout=0, max_steps=num_steps))
        assert done.returncode == 0, done.stderr[-3000:]
    found, expected = (losses_in(tmp_path / str(number)) for number in (num_ranks, 1))
    assert len(found) == num_steps
    for own, joint in zip(found, expected, strict=True):
        assert own == pytest.approx(joint, abs=1e-3)
    tensors = load_file(tmp_path / str(num_ranks) / "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    figure(19, f"torchrun, {num_ranks} ranks on {len(SHARD_SIZES)} uneven shards: {num_steps} steps with the losses of "
               "one process")  # fmt: skip


def test_a_loss_that_is_not_finite_leaves_a_finite_checkpoint(tmp_path: Path, figure: Figure) -> None:
    steps = range(SETTINGS.max_steps) if FULL else (0, 7, 19)
    for bad in steps:
        folder = tmp_path / str(bad)

        def spoil(step: int, loss: Tensor, bad: int = bad) -> Tensor:
            return loss * float("nan") if step == bad else loss

        with pytest.raises(CapfiltError, match=f"Step {bad + 1}: the loss .* is not finite"):
            run_training(folder, spoil)
        found = find_checkpoint(folder)
        assert (found is None) == (bad < SETTINGS.save_every_steps)
        if found is not None:
            assert all(tensor.isfinite().all() for tensor in load_file(found[0] / "model.safetensors").values())
    figure(19, f"NaN at each of {len(steps)} steps: refused with the step, the last checkpoint finite")


def train_in_child(folder: Path) -> None:
    torch.set_num_threads(1)
    run_training(folder, settings=replace(SETTINGS, save_every_steps=1))


def test_killed_while_it_saves(tmp_path: Path, figure: Figure) -> None:
    """A checkpoint at every step, so that many kills fall into one; those that did left its beginning behind."""
    rng, num_kills, num_killed, num_runs, num_unfinished = random.Random(2), 50 if FULL else 6, 0, 0, 0
    began = time.monotonic()
    train_in_child(tmp_path / "undisturbed")
    seconds, expected = time.monotonic() - began, read_metrics(tmp_path / "undisturbed")
    weights = torch.load(tmp_path / "undisturbed" / "model.bin", weights_only=True)
    while num_killed < num_kills:
        folder = tmp_path / f"killed{num_runs}"
        num_runs += 1
        for _ in range(4):
            child = multiprocessing.get_context("fork").Process(target=train_in_child, args=(folder,))
            child.start()
            child.join(rng.uniform(0, seconds))
            child.kill()
            child.join()
            num_killed += child.exitcode == -signal.SIGKILL
            num_unfinished += (folder / "checkpoints" / f".staging-{child.pid}").exists()
        train_in_child(folder)
        assert read_metrics(folder) == expected
        found = torch.load(folder / "model.bin", weights_only=True)
        assert all(torch.equal(found[name], value) for name, value in weights.items())
    assert num_unfinished > 0 or not FULL
    figure(19, f"{num_killed} SIGKILLs of a training that saves at every step, {num_unfinished} of them in the middle "
               "of a checkpoint: the same losses and weights, to the bit")  # fmt: skip
