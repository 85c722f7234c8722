"""Muon (Jordan et al. 2024): momentum whose every update is made orthogonal, for the matrices inside a model.

In: matrices with gradients. Out: matrices that took a step. An update is scaled to AdamW's size (Liu et al. 2025,
§2.2), so that both go by one learning rate.

torch.optim.Muon computes the same in bfloat16 whatever the device; without instructions for it that was 65% of a step
of the embedded models' size (one AVX2 core: 1.93 of 2.95 s). Here the precision is the one that the device is fast at,
and matrices of one shape are worked on together (0.10 s).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from capfilt.weights.devices import choose_fast_dtype

QUINTIC = (3.4445, -4.7750, 2.0315)
"""Coefficients of x, x³ and x⁵: of all such steps the steepest at 0, whose repetition stays near 1 (Jordan et al.)."""
NUM_ITERATIONS = 5
UPDATE_RMS = 0.2
"""Root mean square of AdamW's updates (Liu et al. 2025, §2.2)."""


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum and decoupled weight decay; every parameter is a matrix."""

    def __init__(self, params: Iterable[Any], *, lr: float, momentum: float = 0.95, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        if odd := [tuple(p.shape) for group in self.param_groups for p in group["params"] if p.ndim != 2]:
            raise ValueError(f"Muon takes matrices; found shapes {odd}")

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            by_shape: dict[tuple[Any, ...], list[Tensor]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    by_shape.setdefault((p.device, *p.shape), []).append(p)
            for alike in by_shape.values():
                self._step_alike(alike, group["lr"], group["momentum"], group["weight_decay"])

    def _step_alike(self, params: list[Tensor], rate: float, momentum: float, weight_decay: float) -> None:
        """The update of matrices (R, C) of one shape."""
        updates_NRC = torch.stack([self._nesterov(p, momentum) for p in params])
        orthogonal_NRC = orthogonalise(updates_NRC, choose_fast_dtype("auto", updates_NRC.device))
        scale = UPDATE_RMS * math.sqrt(max(params[0].shape))
        for p, update in zip(params, orthogonal_NRC, strict=True):
            p.mul_(1 - rate * weight_decay).add_(update, alpha=-rate * scale)

    def _nesterov(self, p: Tensor, momentum: float) -> Tensor:
        """The running mean of the gradients, and from there on the way of this one."""
        assert p.grad is not None
        state = self.state[p]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(p)
        mean = state["momentum_buffer"].lerp_(p.grad, 1 - momentum)
        return p.grad.lerp(mean, momentum)


def orthogonalise(matrices_NRC: Tensor, dtype: torch.dtype) -> Tensor:
    """For each matrix U·S·Vᵀ about U·Vᵀ: singular values go to between 0.7 and 1.2 (Newton-Schulz, five iterations).

    Computed in `dtype`, given back in that of the matrices.
    """
    a, b, c = QUINTIC
    is_tall = matrices_NRC.shape[1] > matrices_NRC.shape[2]
    x_NRC = (matrices_NRC.mT if is_tall else matrices_NRC).to(dtype)  # the smaller side squared is the cheaper product
    x_NRC = x_NRC / x_NRC.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(NUM_ITERATIONS):
        square_NRR = x_NRC @ x_NRC.mT
        polynomial_NRR = torch.baddbmm(square_NRR, square_NRR, square_NRR, beta=b, alpha=c)
        x_NRC = torch.baddbmm(x_NRC, polynomial_NRR, x_NRC, beta=a)
    return (x_NRC.mT if is_tall else x_NRC).to(matrices_NRC.dtype)
