"""Muon against torch's, and its updates against the singular value decomposition."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from capfilt.train.muon import Muon, orthogonalise

SHAPES = ((12, 48), (48, 12), (16, 16), (16, 16), (1, 7))


def random_matrix(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_are_those_of_torch(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.setattr("capfilt.train.muon.choose_fast_dtype", lambda _name, _device: dtype)
    ours = [nn.Parameter(random_matrix(*shape, seed=n)) for n, shape in enumerate(SHAPES)]
    started, theirs = copy.deepcopy(ours), copy.deepcopy(ours)
    no_gradient = nn.Parameter(random_matrix(3, 3))
    optimizers = (
        Muon([*ours, no_gradient], lr=0.1, weight_decay=0.3),
        torch.optim.Muon(theirs, lr=0.1, weight_decay=0.3, adjust_lr_fn="match_rms_adamw"),
    )
    for step in range(3):
        for n, (our, their) in enumerate(zip(ours, theirs, strict=True)):
            our.grad = random_matrix(*our.shape, seed=100 * step + n)
            their.grad = our.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for our, their, start in zip(ours, theirs, started, strict=True):
        assert (our - their).norm() < 0.01 * (their - start).norm()  # theirs: bfloat16
    assert torch.equal(no_gradient, random_matrix(3, 3))


@pytest.mark.parametrize("shape", [(20, 60), (60, 20), (32, 32)])
def test_singular_values_become_nearly_equal_and_vectors_stay(shape: tuple[int, int]) -> None:
    matrices = torch.stack([random_matrix(*shape, seed=n) * 10.0**n for n in range(-2, 3)])
    made = orthogonalise(matrices, torch.float32)
    for before, after in zip(matrices, made, strict=True):
        u, s, vh = torch.linalg.svd(before, full_matrices=False)
        within = u.mT @ after @ vh.mT
        assert torch.allclose(within, torch.diag(within.diagonal()), atol=1e-4)
        large = s > 0.05 * s[0]  # what is far smaller is not there yet after five iterations
        assert ((within.diagonal()[large] > 0.6) & (within.diagonal()[large] < 1.25)).all()


def test_a_gradient_of_zeros_moves_nothing() -> None:
    parameter = nn.Parameter(random_matrix(4, 6))
    parameter.grad = torch.zeros(4, 6)
    Muon([parameter], lr=0.1).step()
    assert torch.equal(parameter, random_matrix(4, 6))


def test_vectors_are_refused() -> None:
    with pytest.raises(ValueError, match=r"Muon takes matrices; found shapes \[\(5,\)\]"):
        Muon([nn.Parameter(torch.zeros(5))], lr=0.1)
