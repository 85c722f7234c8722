"""Layers compiled and recomputed: the same losses and gradients, less kept."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from capfilt.settings import TrainSettings
from capfilt.train.batches import Batch, Cursor
from capfilt.train.blocks import called_blocks, compile_blocks, recompute_blocks, stacked_blocks
from capfilt.train.processes import join_processes
from capfilt.train.step import make_state, take_step
from tests.train import ranks_worker

ALONE = join_processes(TrainSettings(device="cpu"))


def one_step(name: str, change: Callable[[nn.Module], None] = lambda _: None) -> tuple[dict[str, Tensor], int]:
    """Losses and gradients of a step with dropout, and how many numbers autograd kept for the backward pass."""
    torch.manual_seed(0)
    objective = ranks_worker.OBJECTIVES[name]().train()
    for part in objective.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.1
    names = list(objective.state_dict())
    change(objective)
    assert list(objective.state_dict()) == names
    kept = 0

    def count(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += tensor.numel()
        return tensor

    torch.manual_seed(5)
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        losses = objective(**ranks_worker.inputs_of(name, ALONE, 0))
    losses["loss"].backward()
    gradients = {key: p.grad for key, p in objective.named_parameters() if p.grad is not None}
    return {**losses, **gradients}, kept


@pytest.mark.parametrize("name", list(ranks_worker.OBJECTIVES))
def test_recomputed_layers_give_the_same_step_and_keep_less(name: str) -> None:
    expected, num_kept = one_step(name)
    found, num_kept_now = one_step(name, recompute_blocks)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, atol=1e-6, rtol=1e-5, msg=lambda m, k=key: f"{k}: {m}")
    assert num_kept_now < 0.7 * num_kept


def test_recomputed_layers_take_the_kernels_of_the_forward_pass() -> None:
    """In bfloat16 on a CPU attention has a kernel of its own, and the backward pass stands outside its context."""
    losses = []
    for recompute in (False, True):
        settings = TrainSettings(device="cpu", autocast="bfloat16", recompute=recompute, learning_rate=1e-3)
        torch.manual_seed(0)
        objective, inputs = ranks_worker.OBJECTIVES["blip"]().train(), ranks_worker.inputs_of("blip", ALONE, 0)
        state = make_state(objective, lambda *_, given=inputs: given, settings, ALONE, dict, False, None)
        batches = iter([Batch(np.zeros((0,)), [], [], Cursor())] * 3)
        losses.append([take_step(state, batches, step).values["loss"] for step in range(3)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch.compile's own
def test_compiled_layers_give_the_same_step() -> None:
    """With torch's tracing and differentiation, but without its compiler, which takes minutes."""

    def without_dropout(objective: nn.Module) -> None:
        for part in objective.modules():
            if isinstance(part, nn.Dropout):
                part.p = 0.0

    def compiled(objective: nn.Module) -> None:
        without_dropout(objective)
        compile_blocks(objective, backend="aot_eager")

    expected, _ = one_step("blip-momentum", without_dropout)
    found, _ = one_step("blip-momentum", compiled)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, atol=1e-5, rtol=1e-3, msg=lambda m, k=key: f"{k}: {m}")


def test_every_layer_of_every_stack_is_found_once() -> None:
    blip, stage2 = ranks_worker.OBJECTIVES["blip"](), ranks_worker.OBJECTIVES["stage2-t5"]()
    assert len(stacked_blocks(blip)) == 2 + 2 + 2  # ViT, encoder, decoder
    assert len(called_blocks(blip)) == 2
    assert len(stacked_blocks(stage2)) == 2 + 2 + 2  # Q-Former, T5's encoder and decoder
    assert [type(block).__name__ for block in called_blocks(stage2)] == ["T5Block"] * 4
