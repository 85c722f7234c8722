"""The image encoder's positions: how they start, and how they are brought to another size of image."""

from __future__ import annotations

import pytest
import torch

from capfilt.models.convert_blip2 import to_ours, vision_names
from capfilt.models.vit import VisionTransformer, ViTConfig, change_image_size, interpolate_positions
from tests import factories


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


@pytest.mark.parametrize("image_size_px", [8, 24, 32, 40, 64, 104])
def test_other_sizes_give_the_features_that_transformers_gives(image_size_px: int) -> None:
    theirs = factories.build_filter(seed=3).vision_model
    config = theirs.config
    ours = VisionTransformer(
        ViTConfig(
            image_size_px=factories.IMAGE_SIZE_PX, patch_size_px=8, width=config.hidden_size, depth=2, num_heads=4,
            mlp_width=config.intermediate_size,
        )
    ).eval()  # fmt: skip
    state = {f"vision_model.{name}": tensor for name, tensor in theirs.state_dict().items()}
    norm = {f"norm.{kind}": state[f"vision_model.post_layernorm.{kind}"] for kind in ("weight", "bias")}
    ours.load_state_dict(to_ours(state, vision_names(2)) | norm)
    ours.requires_grad_(False)
    change_image_size(ours, image_size_px)
    assert ours.config.num_patches == (image_size_px // 8) ** 2
    assert not ours.position_embedding.requires_grad
    images = torch.randn(2, 3, image_size_px, image_size_px, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        expected = theirs(images, interpolate_pos_encoding=True).last_hidden_state
        torch.testing.assert_close(ours(images), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("grid", [(2, 5), (6, 3), (1, 1)])
def test_positions_of_grids_that_are_not_square(grid: tuple[int, int]) -> None:
    embeddings = factories.build_filter(seed=4).vision_model.embeddings
    patches = torch.zeros(1, 1 + grid[0] * grid[1], embeddings.embed_dim)
    expected = embeddings.interpolate_pos_encoding(patches, 8 * grid[0], 8 * grid[1])
    found = interpolate_positions(embeddings.position_embedding, grid)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_the_same_grid_and_the_places_of_a_threefold_one_keep_their_positions() -> None:
    positions = torch.randn(1, 1 + 36, 5, generator=torch.Generator().manual_seed(6))
    assert torch.equal(interpolate_positions(positions, (6, 6)), positions)
    tripled = interpolate_positions(positions, (18, 18))
    assert torch.equal(tripled[:, 0], positions[:, 0]), "[CLS] has no place"
    centres = tripled[0, 1:].view(18, 18, 5)[1::3, 1::3]
    torch.testing.assert_close(centres, positions[0, 1:].view(6, 6, 5))
    assert interpolate_positions(positions.to(torch.bfloat16), (3, 3)).dtype == torch.bfloat16


def test_sizes_that_make_no_grid() -> None:
    positions = torch.zeros(1, 1 + 9, 4)
    with pytest.raises(ValueError, match="10 positions make no square grid"):
        interpolate_positions(torch.zeros(1, 11, 4), (2, 2))
    with pytest.raises(ValueError, match="at least one row"):
        interpolate_positions(positions, (0, 3))
    vision = VisionTransformer(ViTConfig(image_size_px=32, patch_size_px=8, width=16, depth=1, num_heads=2))
    with pytest.raises(ValueError, match="no multiple of patch 8"):
        change_image_size(vision, 36)
    assert vision.config.image_size_px == 32
