"""One step of a training: forward, backward and update, of several batches and processes where there are such.

In: an objective with its optimizer, a stream of batches, the number of the step. Out: the weights after it, its losses
and where the stream goes on; a step whose losses or gradients are not finite is refused on all processes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from capfilt.errors import CapfiltError
from capfilt.settings import TrainSettings
from capfilt.train.batches import Batch, Cursor, Draws
from capfilt.train.blocks import compile_blocks, recompute_blocks
from capfilt.train.cpu import fast_bfloat16_attention
from capfilt.train.optim import build_optimizer
from capfilt.train.processes import Processes, global_norm

Prepare = Callable[[Batch, Draws], Mapping[str, Any]]
"""A batch and its random numbers → the objective's arguments."""

SMALLEST_LOSS_SCALE = 1.0
"""float16: gradients that overflow at this scale of the loss are no passing overflow any more."""


@dataclass
class TrainState:
    """What a step works on."""

    module: nn.Module
    prepare: Prepare
    parameters: dict[str, nn.Parameter]
    extra_tensors: Callable[[], Mapping[str, Tensor]]
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    settings: TrainSettings
    processes: Processes

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds beside the optimizer's state."""
        return {**self.parameters, **self.extra_tensors()}


@dataclass(frozen=True)
class StepResult:
    """What a step did: losses and gradient norm, averaged over batches and processes, and where the stream is."""

    values: dict[str, float]
    num_images: int
    cursor: Cursor
    stop: bool
    """Whether one of the processes was asked to stop."""


def make_state(
    objective: nn.Module,
    prepare: Prepare,
    settings: TrainSettings,
    processes: Processes,
    extra_tensors: Callable[[], Mapping[str, Tensor]],
    some_unused: bool,
    rate_scales: Mapping[str, float] | None,
) -> TrainState:
    """The objective as a step takes it, on all processes; the options are those of `train`."""
    if settings.recompute:
        recompute_blocks(objective)
    if settings.compile:
        compile_blocks(objective)
    module = processes.wrap(objective, some_unused=some_unused)
    parameters = {name: p for name, p in objective.named_parameters() if p.requires_grad}
    optimizer = build_optimizer(parameters.items(), settings, rate_scales)
    scaler = torch.amp.GradScaler(processes.device.type, enabled=settings.autocast == "float16")
    return TrainState(module, prepare, parameters, extra_tensors, optimizer, scaler, settings, processes)


def take_step(state: TrainState, batches: Iterator[Batch], step: int, signals: Sequence[int] = ()) -> StepResult:
    """One update. Where it is refused the weights stay as they are. `signals` fills when one asks to stop."""
    settings, scaler, processes = state.settings, state.scaler, state.processes
    state.optimizer.zero_grad(set_to_none=True)
    places: list[str] = []
    found: list[dict[str, Tensor]] = []
    cursor = Cursor()
    for part in range(settings.accumulation_steps):
        batch = next(batches)
        places += batch.places or batch.keys
        cursor = batch.cursor
        draws = Draws(settings.seed, step, part, processes.ranks)
        draws.reseed()
        inputs = state.prepare(batch, draws)
        with processes.accumulating(state.module, is_last=part + 1 == settings.accumulation_steps):
            with _precision(settings, processes.device):
                losses = state.module(**inputs)
            scaler.scale(losses["loss"] / settings.accumulation_steps).backward()
        found.append({name: value.detach().float() for name, value in losses.items()})
    scaler.unscale_(state.optimizer)
    norm = _clip(state.parameters, settings.clip_grad_norm)
    averages = {name: torch.stack([losses[name] for losses in found]).mean() for name in found[0]}
    values, stops = _agree({**averages, "grad_norm": norm}, places, step, state, stop=bool(signals))
    scaler.step(state.optimizer)
    scaler.update()
    return StepResult(values, len(places) * processes.num, cursor, stops)


def _agree(
    values: Mapping[str, Tensor], keys: list[str], step: int, state: TrainState, *, stop: bool
) -> tuple[dict[str, float], bool]:
    """The values averaged over the processes, and whether one of them is to stop.

    CapfiltError on every process where one's are not finite; an overflow that float16 passes over is none.
    """
    asked = torch.tensor(float(stop), device=state.processes.device)
    own = torch.stack([*(value.to(asked.device) for value in values.values()), asked])
    by_process = state.processes.gather_values(own).tolist()
    names = list(values)
    scaled = state.scaler.is_enabled() and state.scaler.get_scale() >= SMALLEST_LOSS_SCALE
    checked = len(names) - 1 if scaled else len(names)  # the gradient norm is the last
    is_bad = [not all(math.isfinite(value) for value in row[:checked]) for row in by_process]
    if any(is_bad):
        rows = state.processes.gather_objects(keys)
        odd_keys = [key for row, bad in zip(rows, is_bad, strict=True) if bad for key in row]
        bad_row = by_process[is_bad.index(True)]
        raise CapfiltError(_non_finite_message(dict(zip(names, bad_row, strict=False)), step, odd_keys))
    averages = [sum(column) / len(by_process) for column in zip(*by_process, strict=True)]
    found = dict(zip(names, averages, strict=False))
    return {name: value for name, value in found.items() if math.isfinite(value)}, averages[-1] > 0


@contextmanager
def _precision(settings: TrainSettings, device: torch.device) -> Iterator[None]:
    """Matrix products as `settings.autocast` says; the weights stay float32."""
    if settings.autocast == "float32":
        yield
        return
    on_cpu = device.type == "cpu"
    kind = torch.bfloat16 if settings.autocast == "bfloat16" else torch.float16
    with torch.autocast(device.type, kind), fast_bfloat16_attention() if on_cpu else nullcontext():
        yield


def _clip(parameters: Mapping[str, nn.Parameter], max_norm: float) -> Tensor:
    """Global norm of the gradients before clipping; 0 for `max_norm` measures without clipping."""
    norm = global_norm(parameters)
    if max_norm:
        nn.utils.clip_grads_with_norm_(parameters.values(), max_norm, norm)
    return norm


def _non_finite_message(values: Mapping[str, float], step: int, keys: list[str]) -> str:
    losses = {name: value for name, value in values.items() if name != "grad_norm"}
    if all(math.isfinite(value) for value in losses.values()):
        what = f"gradient norm ({values['grad_norm']})"
    else:
        what = f"loss ({', '.join(f'{name} {value:.4g}' for name, value in losses.items())})"
    return (
        f"Step {step + 1}: the {what} is not finite; the weights were left as they were. "
        f"Keys of the batch: {', '.join(keys)}. Checkpoints saved before are kept: look at those samples "
        f"in the run's shards (KEY.jpg, KEY.txt), or train with a lower --learning-rate into another --output."
    )
