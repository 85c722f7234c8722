"""AdamW with decay on matrices only, and the learning rate of a step: linear warm-up, then a cosine.

In: named parameters and `TrainSettings`. Out: an optimizer; a rate for any step (a pure function, so resuming
needs no scheduler state).
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from capfilt.settings import TrainSettings

NamedParameters = Iterable[tuple[str, nn.Parameter]]


def parameter_groups(named_parameters: NamedParameters, weight_decay: float) -> list[dict[str, object]]:
    """Two groups: matrices and larger decay; vectors and scalars (norms, biases, temperature) do not.

    Frozen parameters are left out: they get no optimizer state. Weights shared under two names count once.
    """
    unique = {id(p): p for _, p in named_parameters if p.requires_grad}.values()
    return [
        {"params": [p for p in unique if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in unique if p.ndim < 2], "weight_decay": 0.0},
    ]


def build_optimizer(named_parameters: NamedParameters, settings: TrainSettings) -> torch.optim.AdamW:
    """AdamW (0.9, beta2); fused, because small models spend their step on Python otherwise."""
    groups = [g for g in parameter_groups(named_parameters, settings.weight_decay) if g["params"]]
    if not groups:
        raise ValueError("No parameter to train: all of them are frozen.")
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, settings.beta2), fused=True)


def learning_rate_at(step: int, settings: TrainSettings) -> float:
    """Rate of step 0, 1, … max_steps - 1: linear up to the peak, then a cosine to the minimum."""
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    length = max(1, settings.max_steps - settings.warmup_steps)
    done = min(1.0, (step - settings.warmup_steps) / length)
    span = settings.learning_rate - settings.min_learning_rate
    return settings.min_learning_rate + span * 0.5 * (1.0 + math.cos(math.pi * done))


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
