"""The image encoder's start: positions that tell places apart on small grids and large ones."""

from __future__ import annotations

import pytest
import torch

from capfilt.models.vit import VisionTransformer, ViTConfig


@pytest.mark.parametrize(("image_size_px", "patch_size_px", "width"), [(64, 8, 128), (32, 16, 32), (224, 16, 192)])
def test_positions_start_apart_and_neighbours_are_nearest(image_size_px: int, patch_size_px: int, width: int) -> None:
    config = ViTConfig(image_size_px=image_size_px, patch_size_px=patch_size_px, width=width, depth=1, num_heads=4)
    positions = VisionTransformer(config).position_embedding[0]
    side = image_size_px // patch_size_px
    assert positions.shape == (1 + side * side, width)
    assert not positions[0].any(), "[CLS] has no place"
    code = positions[1:].detach()
    assert code.mean(dim=0).abs().max() < 1e-5
    assert 0.3 < code.square().mean().sqrt() < 1.0, "about as large as the patches"
    distance = torch.cdist(code, code).view(side, side, side, side)
    for row in range(side):
        along = distance[row, 0, row]
        assert along[1] > 0.1 * width**0.5
        assert along[1:].min() == pytest.approx(along[1].item(), rel=0.2), "no place is nearer than the next one"
