"""ITC's temperature and similarities: bounds that let go, float32 under autocast."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from capfilt.models.contrast import ImageTextContrast, bound_temperature
from capfilt.models.momentum import FeatureQueue
from capfilt.models.ranks import ALONE


def embeddings(seed: int) -> torch.Tensor:
    return F.normalize(torch.randn(8, 16, generator=torch.Generator().manual_seed(seed)), dim=1)


@pytest.mark.parametrize(("start", "aligned"), [(0.9, True), (0.5, True), (0.001, False), (1e-5, False)])
def test_a_temperature_at_its_bound_moves_back(start: float, aligned: bool) -> None:
    """A low one is better where pairs are aligned, a high one where they are not."""
    contrast, images = ImageTextContrast(), embeddings(0)
    contrast.start_at(start)
    at_first = contrast.value()
    assert at_first == pytest.approx(0.5 if aligned else 0.001)
    optimizer = torch.optim.AdamW(contrast.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(20):
        optimizer.zero_grad()
        contrast.within_batch((images, images if aligned else embeddings(1)), ALONE).loss().backward()
        optimizer.step()
        bound_temperature(contrast.temperature)
    assert contrast.value() < 0.8 * at_first if aligned else contrast.value() > 2 * at_first


def test_similarities_are_float32_under_autocast() -> None:
    contrast, queue = ImageTextContrast(), FeatureQueue(4, 16)
    contrast.start_at(0.01)
    queue.hold(embeddings(4), embeddings(5))
    queue.push()
    pairs, slow = (embeddings(0), embeddings(1)), (embeddings(2), embeddings(3))
    exact = contrast.with_queue(pairs, slow, queue, 0.4, ALONE)
    with torch.autocast("cpu", torch.bfloat16):
        found = contrast.with_queue(pairs, slow, queue, 0.4, ALONE)
    assert found.i2t.dtype == torch.float32
    assert torch.equal(found.i2t, exact.i2t)
    assert torch.equal(found.t2i, exact.t2i)
