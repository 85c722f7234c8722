"""AdamW or Muon with decay on matrices only, and the learning rate of a step: linear warm-up, then a cosine.

In: named parameters and `TrainSettings`. Out: an optimizer; a rate for any step (a pure function, so resuming
needs no scheduler state). A weight may have a share of the rate of its own: layer-wise decay of an image encoder's.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from capfilt.settings import TrainSettings
from capfilt.train.muon import Muon

NamedParameters = Iterable[tuple[str, nn.Parameter]]


RATE_SCALE = "rate_scale"
"""Of a group of parameters: what the learning rate of a step is multiplied by for it."""


def vision_rate_scales(names: Iterable[str], depth: int, decay: float, prefix: str = "vision.") -> dict[str, float]:
    """Scale of each weight's learning rate by its name: layer-wise decay of a ViT of `depth` blocks (BEiT, BLIP-2).

    Under `prefix`, block i of 0 … depth - 1 has decay^(depth - i), what is before the first block decay^(depth + 1);
    every other weight has the whole rate.
    """
    scales: dict[str, float] = {}
    for name in names:
        layer, own = depth + 1, name.removeprefix(prefix)
        if name.startswith(prefix):
            layer = int(own.split(".")[1]) + 1 if own.startswith("blocks.") else 0
        scales[name] = decay ** (depth + 1 - layer)
    return scales


def parameter_groups(
    named_parameters: NamedParameters, weight_decay: float, rate_scales: Mapping[str, float] | None = None
) -> list[dict[str, Any]]:
    """Two groups for each scale: matrices and larger decay; vectors and scalars (norms, biases, temperature) do not.

    Frozen parameters are left out: they get no optimizer state. Weights shared under two names count once, by the
    first. Without scales all have the whole rate.
    """
    scales = rate_scales or {}
    unique: dict[int, tuple[float, nn.Parameter]] = {}
    for name, p in named_parameters:
        if p.requires_grad:
            unique.setdefault(id(p), (scales.get(name, 1.0), p))
    groups: list[dict[str, Any]] = []
    for scale in sorted({scale for scale, _ in unique.values()}):
        own = [p for of, p in unique.values() if of == scale]
        groups += [
            {"params": [p for p in own if p.ndim >= 2], "weight_decay": weight_decay, RATE_SCALE: scale},
            {"params": [p for p in own if p.ndim < 2], "weight_decay": 0.0, RATE_SCALE: scale},
        ]
    return groups


def build_optimizer(
    named_parameters: NamedParameters, settings: TrainSettings, rate_scales: Mapping[str, float] | None = None
) -> torch.optim.Optimizer:
    """AdamW (0.9, beta2), fused, because small models spend their step on Python otherwise; or `MuonAndAdamW`.

    `rate_scales` go by the names of the parameters; `set_learning_rate` minds them.
    """
    named = [(name, p) for name, p in named_parameters if p.requires_grad]
    if not named:
        raise ValueError("No parameter to train: all of them are frozen.")
    if settings.optimizer == "muon":
        return MuonAndAdamW(named, settings, rate_scales)
    return _adamw(named, settings, rate_scales)


def _adamw(
    named_parameters: NamedParameters, settings: TrainSettings, rate_scales: Mapping[str, float] | None
) -> torch.optim.Optimizer:
    groups = parameter_groups(named_parameters, settings.weight_decay, rate_scales)
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, settings.beta2), fused=True)


class MuonAndAdamW(torch.optim.Optimizer):
    """Muon for the matrices inside the model; AdamW for embeddings, the vocabulary, convolutions and vectors.

    Both go by one learning rate.
    """

    def __init__(
        self, named_parameters: NamedParameters, settings: TrainSettings, rate_scales: Mapping[str, float] | None = None
    ) -> None:
        matrices: dict[int, tuple[str, nn.Parameter]] = {}
        others: dict[int, tuple[str, nn.Parameter]] = {}
        for name, p in named_parameters:
            is_table = "embedding" in name or "vocabulary" in name
            if id(p) in others or p.ndim != 2 or is_table:
                matrices.pop(id(p), None)
                others.setdefault(id(p), (name, p))
            else:
                matrices.setdefault(id(p), (name, p))
        self._parts: list[torch.optim.Optimizer] = []
        if matrices:
            groups = parameter_groups(matrices.values(), settings.weight_decay, rate_scales)
            self._parts.append(Muon([group for group in groups if group["params"]], lr=settings.learning_rate))
        if others:
            self._parts.append(_adamw(others.values(), settings, rate_scales))
        super().__init__([p for part in self._parts for g in part.param_groups for p in g["params"]], {})
        self.param_groups = [group for part in self._parts for group in part.param_groups]

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for part in self._parts:
            part.step()

    def state_dict(self) -> dict[str, Any]:
        """The parts' states under one numbering; the groups are not kept, they follow from the settings."""
        state: dict[int, Any] = {}
        for part, first in self._numbered():
            state |= {first + index: value for index, value in part.state_dict()["state"].items()}
        return {"state": state, "param_groups": []}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes what `state_dict` gave."""
        for part, first in self._numbered():
            own = range(first, first + _num_parameters(part))
            state = {index - first: value for index, value in state_dict["state"].items() if index in own}
            part.load_state_dict({"state": state, "param_groups": part.state_dict()["param_groups"]})
        self.param_groups = [group for part in self._parts for group in part.param_groups]

    def _numbered(self) -> Iterator[tuple[torch.optim.Optimizer, int]]:
        """Each part with the number of its first parameter."""
        first = 0
        for part in self._parts:
            yield part, first
            first += _num_parameters(part)


def _num_parameters(optimizer: torch.optim.Optimizer) -> int:
    return sum(len(group["params"]) for group in optimizer.param_groups)


def learning_rate_at(step: int, settings: TrainSettings) -> float:
    """Rate of step 0, 1, … max_steps - 1: linear up to the peak, then a cosine to the minimum."""
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    length = max(1, settings.max_steps - settings.warmup_steps)
    done = min(1.0, (step - settings.warmup_steps) / length)
    span = settings.learning_rate - settings.min_learning_rate
    return settings.min_learning_rate + span * 0.5 * (1.0 + math.cos(math.pi * done))


def ramped_alpha(alpha: float, alpha_epochs: float, num_epochs: float) -> float:
    """Weight of the momentum encoders' targets after so many epochs: it rises from 0 over the first `alpha_epochs`."""
    return alpha * min(1.0, num_epochs / alpha_epochs if alpha_epochs else 1.0)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """The rate of a step, for each group as much of it as its scale says."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get(RATE_SCALE, 1.0)
