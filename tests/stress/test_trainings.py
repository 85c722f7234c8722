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

BATCH = 2


@pytest.mark.parametrize("in_memory", [True, False])
def test_equal_steps_whatever_the_shards(tmp_path: Path, in_memory: bool, figure: Figure) -> None:
    """Shards of unequal size; every rank takes the same number of steps an epoch, and no image twice."""
    sizes, combinations = [9, 3, 14, 5, 11, 2, 7], 0
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
            assert len(seen) >= sum(sizes[:num_shards]) - 2 * BATCH * num_ranks
            combinations += 1
    place = "in memory" if in_memory else "streamed"
    figure(19, f"{combinations} combinations of shards and ranks, {place}: equal steps, no image twice in an epoch")


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
    """A checkpoint at every step, so that most kills fall into one."""
    rng, num_kills, num_killed, num_runs = random.Random(2), 50 if FULL else 6, 0, 0
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
        train_in_child(folder)
        assert read_metrics(folder) == expected
        found = torch.load(folder / "model.bin", weights_only=True)
        assert all(torch.equal(found[name], value) for name, value in weights.items())
    figure(19, f"{num_killed} SIGKILLs of a training that saves at every step: the same losses and weights, to the bit")
