"""Image encoders of published layouts: the features of timm's and of transformers' ViT with the same weights."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import timm
import torch
from transformers import ViTConfig as TheirConfig
from transformers import ViTForImageClassification, ViTModel

from capfilt.errors import UsageError
from capfilt.models.convert_vit import (
    from_timm,
    from_transformers_vit,
    positions_at,
    sizes_from_timm,
    sizes_from_transformers_vit,
)
from capfilt.models.vit import VisionTransformer, ViTConfig
from tests.models.small_vits import build_timm, saved_state

THEIR_SIZES: dict[str, Any] = {
    "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "image_size": 32,
    "patch_size": 8, "initializer_range": 0.2,
}  # fmt: skip


def features_of(sizes: ViTConfig, state: dict[str, torch.Tensor], images: torch.Tensor) -> torch.Tensor:
    vision = VisionTransformer(sizes).eval()
    vision.load_state_dict(state)
    with torch.no_grad():
        return vision(images)


def test_timm_gives_the_same_features() -> None:
    theirs = build_timm()
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    state = theirs.state_dict()
    assert any(name.startswith("head.") for name in state), "the classifier is left out"
    sizes = sizes_from_timm(state)
    assert (sizes.width, sizes.depth, sizes.num_heads, sizes.image_size_px) == (64, 2, 1, 32)
    with torch.no_grad():
        expected = theirs.forward_features(images)
    torch.testing.assert_close(features_of(sizes, from_timm(state), images), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("with_classifier", [True, False])
def test_transformers_gives_the_same_features(with_classifier: bool) -> None:
    torch.manual_seed(0)
    config = TheirConfig(**THEIR_SIZES)
    theirs: Any = ViTForImageClassification(config) if with_classifier else ViTModel(config)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = (theirs.eval().vit if with_classifier else theirs.eval())(images).last_hidden_state
    sizes = sizes_from_transformers_vit(config.to_dict())
    ours = from_transformers_vit(saved_state(theirs), sizes.depth)
    torch.testing.assert_close(features_of(sizes, ours, images), expected, atol=1e-4, rtol=1e-4)


def test_other_sizes_of_images_as_transformers_interpolates_them() -> None:
    torch.manual_seed(0)
    theirs = ViTModel(TheirConfig(**THEIR_SIZES)).eval()
    sizes = replace(sizes_from_transformers_vit(theirs.config.to_dict()), image_size_px=48)
    state = positions_at(from_transformers_vit(saved_state(theirs), 2), sizes)
    images = torch.randn(1, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = theirs(images, interpolate_pos_encoding=True).last_hidden_state
    torch.testing.assert_close(features_of(sizes, state, images), expected, atol=1e-4, rtol=1e-4)


def test_missing_and_unknown_weights_are_named() -> None:
    state = dict(build_timm().state_dict())
    state["dist_token"] = state.pop("blocks.1.mlp.fc2.bias")
    with pytest.raises(UsageError, match=r"missing: blocks\.1\.mlp\.fc2\.bias; unknown: dist_token"):
        from_timm(state)
    with pytest.raises(UsageError, match=r"lacks blocks\.0\.mlp\.fc1\.weight, patch_embed\.proj\.weight, pos_embed"):
        sizes_from_timm({})
    theirs = saved_state(
        ViTModel(TheirConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=1, intermediate_size=16))
    )
    theirs["surprise"] = theirs.pop("encoder.layer.0.attention.attention.key.bias")
    with pytest.raises(UsageError, match=r"missing: encoder.*key\.bias; unknown: surprise"):
        from_transformers_vit(theirs, 1)


def test_what_ours_cannot_compute_is_refused() -> None:
    with pytest.raises(UsageError, match="hidden_act 'relu'"):
        sizes_from_transformers_vit({"hidden_act": "relu"})
    narrow = timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=96, depth=1, num_heads=3)
    with pytest.raises(UsageError, match="width 96; expected a multiple of 64"):
        sizes_from_timm(narrow.state_dict())
    huge = timm.create_model("vit_huge_patch14_224", img_size=14, depth=1)
    with pytest.raises(UsageError, match="width 1280; expected a multiple of 64, at most 1024"):
        sizes_from_timm(huge.state_dict())
