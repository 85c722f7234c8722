"""Image encoders of transformers against ours with the same weights, and their names there and back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig, CLIPVisionModel

from capfilt.errors import UsageError
from capfilt.models.convert_image_encoders import (
    at_image_size,
    clip_config,
    clip_sizes,
    eva_sizes,
    from_clip,
    from_eva,
    to_clip,
    without_last_block,
)
from capfilt.models.vit import VisionTransformer, ViTConfig
from tests import blip2_layouts

IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def build_clip(activation: str = "quick_gelu") -> Any:
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=48, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, image_size=32, patch_size=8,
        hidden_act=activation,
    )  # fmt: skip
    model = CLIPVisionModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.requires_grad_(False)


def run(state: dict[str, torch.Tensor], sizes: ViTConfig, images: torch.Tensor = IMAGES) -> torch.Tensor:
    vision = VisionTransformer(sizes)
    vision.norm = nn.Identity()  # type: ignore[assignment]
    vision.load_state_dict(state)
    with torch.no_grad():
        return vision.eval()(images)


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_features_of_a_clip_are_transformers_hidden_states(activation: str) -> None:
    theirs = build_clip(activation)
    sizes = clip_sizes(theirs.config.to_dict())
    ours, norm = from_clip(theirs.state_dict(), sizes)
    expected = theirs(IMAGES, output_hidden_states=True).hidden_states
    assert expected[-1].std() > 0.3
    torch.testing.assert_close(run(ours, sizes), expected[-1], atol=1e-4, rtol=0)
    torch.testing.assert_close(run(*without_last_block(ours, sizes)), expected[-2], atol=1e-4, rtol=0)
    assert (expected[-1] - expected[-2]).abs().max() > 0.1
    assert torch.equal(norm["weight"], theirs.post_layernorm.weight)


def test_the_image_encoder_of_a_whole_clip() -> None:
    vision = build_clip().config.to_dict()
    text = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {"vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2}
    model = CLIPModel(CLIPConfig(vision_config=vision, text_config=text | ids)).eval()
    state = model.state_dict() | {"vision_model.embeddings.position_ids": torch.arange(17)[None]}  # of older layouts
    sizes = clip_sizes(model.config.to_dict())
    ours, _ = from_clip(state, sizes)
    with torch.no_grad():
        expected = model.vision_model(IMAGES).last_hidden_state
    torch.testing.assert_close(run(ours, sizes), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_clip_goes_there_and_back(activation: str) -> None:
    theirs = build_clip(activation)
    sizes = clip_sizes(theirs.config.to_dict())
    back = to_clip(*_and_sizes(from_clip(theirs.state_dict(), sizes), sizes))
    assert back.keys() == theirs.state_dict().keys()
    for name, tensor in theirs.state_dict().items():
        torch.testing.assert_close(back[name], tensor, atol=1e-7, rtol=1e-6)
    assert clip_sizes(clip_config(sizes).to_dict()) == sizes


def _and_sizes(found: tuple[Any, Any], sizes: ViTConfig) -> tuple[Any, ViTConfig, Any]:
    return found[0], sizes, found[1]


def test_what_has_a_bias_on_its_patches_is_no_clip() -> None:
    theirs = build_clip()
    sizes = clip_sizes(theirs.config.to_dict())
    ours, norm = from_clip(theirs.state_dict(), sizes)
    ours["patch_embedding.bias"] = torch.ones(48)
    with pytest.raises(ValueError, match="no bias on its patches"):
        to_clip(ours, sizes, norm)


def test_eva_equals_the_image_encoder_of_transformers_blip2() -> None:
    theirs = blip2_layouts.build_vision()
    state = blip2_layouts.eva_state(theirs.state_dict())
    sizes = eva_sizes(state)
    assert (sizes.depth, sizes.width, sizes.num_heads, sizes.mlp_width) == (3, 88, 1, 112)
    with torch.no_grad():
        expected = theirs(IMAGES, output_hidden_states=True).hidden_states
    ours = from_eva(state, sizes)
    torch.testing.assert_close(run(ours, sizes), expected[-1], atol=1e-4, rtol=0)
    torch.testing.assert_close(run(*without_last_block(ours, sizes)), expected[-2], atol=1e-4, rtol=0)


@pytest.mark.parametrize("side", [48, 24])
def test_positions_are_interpolated_as_transformers_does(side: int) -> None:
    theirs = build_clip()
    sizes = clip_sizes(theirs.config.to_dict())
    ours, _ = from_clip(theirs.state_dict(), sizes)
    images = torch.randn(2, 3, side, side)
    expected = theirs(images, interpolate_pos_encoding=True).last_hidden_state
    resized = at_image_size(ours, sizes, side)
    assert resized[1].image_size_px == side
    torch.testing.assert_close(run(*resized, images), expected, atol=1e-4, rtol=0)


def test_odd_keys_sizes_and_activations_are_named() -> None:
    theirs = build_clip()
    sizes = clip_sizes(theirs.config.to_dict())
    state = dict(theirs.state_dict())
    del state["pre_layrnorm.bias"], state["encoder.layers.1.self_attn.k_proj.bias"]
    state["encoder.layers.0.gamma"] = torch.ones(1)
    message = (
        r"missing: encoder\.layers\.1\.self_attn\.k_proj\.bias, pre_layrnorm\.bias; "
        r"unknown: encoder\.layers\.0\.gamma"
    )
    with pytest.raises(UsageError, match=message):
        from_clip(state, sizes)
    eva = blip2_layouts.eva_state(blip2_layouts.build_vision().state_dict())
    eva["rel_pos_bias.table"] = eva.pop("blocks.2.attn.v_bias")
    with pytest.raises(UsageError, match=r"missing: blocks\.2\.attn\.v_bias; unknown: rel_pos_bias\.table"):
        from_eva(eva, eva_sizes(eva))
    with pytest.raises(UsageError, match="lacks cls_token, pos_embed"):
        eva_sizes({"weight": torch.ones(1)})
    with pytest.raises(UsageError, match="uses 'relu'; expected one of quick_gelu, gelu"):
        clip_sizes(theirs.config.to_dict() | {"hidden_act": "relu"})
    with pytest.raises(UsageError, match="image_size_px is 30; expected a multiple"):
        at_image_size(from_clip(theirs.state_dict(), sizes)[0], sizes, 30)
