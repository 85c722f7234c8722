"""A training leaves arithmetic as it found it."""

from __future__ import annotations

import torch

from capfilt.train.cpu import fast_cpu


def test_denormals_count_again_afterwards() -> None:
    denormal = torch.tensor([1e-40])
    with fast_cpu():
        assert (denormal * 1.0).item() == 0.0
    assert (denormal * 1.0).item() > 0.0
