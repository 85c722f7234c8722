"""open_clip's CLIP to ours, for scoring, tower by tower.

In: a model as open_clip built and loaded it. Out: our image or text tower with the same weights in the precision asked
for. Not all towers can be ours: some are built otherwise than OpenAI's (other image encoders, texts that look both
ways, other pooling).

QuickGELU, x·sigmoid(1.702·x), becomes SiLU: the layer before is scaled by 1.702, the layer after by its inverse.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import open_clip
import torch
from open_clip import transformer as layers
from torch import Tensor, nn

from capfilt.models.clip import ClipImageTower, ClipTextConfig, ClipTextTower
from capfilt.models.convert_image_encoders import QUICK_GELU_SCALE
from capfilt.models.packed import Activation
from capfilt.models.shapes import shapes_only
from capfilt.models.vit import ViTConfig

_Tower = TypeVar("_Tower", ClipImageTower, ClipTextTower)


def image_tower_from_open_clip(model: Any, dtype: torch.dtype = torch.float32) -> ClipImageTower:
    """Ours, in eval mode, of a model that `has_plain_image_tower`; weights that need no change are the model's own."""
    visual = model.visual
    config = ViTConfig(
        image_size_px=visual.image_size[0], patch_size_px=visual.patch_size[0], norm_first=True,
        **_sizes(visual.transformer.resblocks),
    )  # fmt: skip
    with shapes_only():
        tower = ClipImageTower(config, visual.proj.shape[1])
    return _filled(tower, _image_weights(visual), dtype)


def text_tower_from_open_clip(model: Any, dtype: torch.dtype = torch.float32) -> ClipTextTower:
    """Ours, in eval mode, of a model that `has_plain_text_tower`; weights that need no change are the model's own."""
    config = ClipTextConfig(
        vocab_size=model.token_embedding.num_embeddings, max_positions=len(model.positional_embedding),
        **_sizes(model.transformer.resblocks),
    )  # fmt: skip
    with shapes_only():
        tower = ClipTextTower(config, _matrix(model.text_projection).shape[1])
    return _filled(tower, _text_weights(model), dtype)


def _filled(tower: _Tower, weights: Iterable[tuple[str, Tensor]], dtype: torch.dtype) -> _Tower:
    state = {name: value.detach().to(dtype).contiguous() for name, value in weights}
    tower.load_state_dict(state, assign=True)
    return tower.eval().requires_grad_(False)


def _image_weights(visual: Any) -> Iterator[tuple[str, Tensor]]:
    """Our names and their weights, each made when it is asked for, as those of texts are."""
    yield "vision.patch_embedding.weight", visual.conv1.weight
    yield "vision.patch_embedding.bias", visual.conv1.weight.new_zeros(len(visual.conv1.weight))
    yield "vision.class_embedding", visual.class_embedding[None, None]
    yield "vision.position_embedding", visual.positional_embedding[None]
    yield from _of("vision.first_norm", visual.ln_pre)
    yield from _of("vision.norm", visual.ln_post)
    yield from _blocks_of("vision.blocks", visual.transformer.resblocks)
    yield "projection.weight", visual.proj.T


def _text_weights(model: Any) -> Iterator[tuple[str, Tensor]]:
    yield "text.token_embedding.weight", model.token_embedding.weight
    yield "text.position_embedding", model.positional_embedding
    yield from _of("text.norm", model.ln_final)
    yield from _blocks_of("text.blocks", model.transformer.resblocks)
    yield "projection.weight", _matrix(model.text_projection).T


def has_plain_image_tower(model: Any) -> bool:
    """Whether our image tower computes what the model's does; its weights are not looked at."""
    if type(model) is not open_clip.CLIP or type(model.visual) is not layers.VisionTransformer:
        return False
    visual = model.visual
    return (
        visual.attn_pool is None
        and visual.pool_type == "tok"
        and not visual.final_ln_after_pool
        and isinstance(visual.ln_pre, nn.LayerNorm)
        and visual.proj is not None
        and _is_square(visual.image_size)
        and _is_square(visual.patch_size)
        and _cuts_evenly(visual.image_size, visual.patch_size)
        and _are_plain(visual.transformer.resblocks)
    )


def has_plain_text_tower(model: Any) -> bool:
    """Whether our text tower computes what the model's does; its weights are not looked at."""
    return (
        type(model) is open_clip.CLIP
        and model.attn_mask is not None
        and model.text_pool_type in ("argmax", "eos")
        and model.text_projection is not None
        and getattr(model.text_projection, "bias", None) is None
        and _are_plain(model.transformer.resblocks)
    )


def _is_square(size: Any) -> bool:
    return size[0] == size[1]


def _cuts_evenly(size: Any, patch: Any) -> bool:
    return size[0] % patch[0] == 0


def _are_plain(blocks: Any) -> bool:
    return all(
        type(block) is layers.ResidualAttentionBlock
        and isinstance(block.ls_1, nn.Identity)
        and isinstance(block.ls_2, nn.Identity)
        and _is_known(block.mlp.gelu)
        and block.attn.in_proj_bias is not None
        for block in blocks
    )


def _is_known(activation: Any) -> bool:
    if isinstance(activation, layers.QuickGELU):
        return True
    return isinstance(activation, nn.GELU) and activation.approximate == "none"


def _sizes(blocks: Any) -> dict[str, Any]:
    first = blocks[0]
    mlp_width, width = first.mlp.c_fc.weight.shape
    activation: Activation = "silu" if isinstance(first.mlp.gelu, layers.QuickGELU) else "gelu"
    return {
        "width": width, "depth": len(blocks), "num_heads": first.attn.num_heads, "mlp_width": mlp_width,
        "layer_norm_eps": first.ln_1.eps, "activation": activation,
    }  # fmt: skip


def _of(name: str, module: Any, scale: float = 1.0) -> Iterator[tuple[str, Tensor]]:
    yield f"{name}.weight", _scaled(module.weight, scale)
    yield f"{name}.bias", _scaled(module.bias, scale)


def _blocks_of(name: str, blocks: Any) -> Iterator[tuple[str, Tensor]]:
    for number, block in enumerate(blocks):
        scale = QUICK_GELU_SCALE if isinstance(block.mlp.gelu, layers.QuickGELU) else 1.0
        own = f"{name}.{number}"
        yield from _of(f"{own}.norm1", block.ln_1)
        yield f"{own}.query_key_value.weight", block.attn.in_proj_weight
        yield f"{own}.query_key_value.bias", block.attn.in_proj_bias
        yield from _of(f"{own}.projection", block.attn.out_proj)
        yield from _of(f"{own}.norm2", block.ln_2)
        yield from _of(f"{own}.fc1", block.mlp.c_fc, scale)
        yield f"{own}.fc2.weight", _scaled(block.mlp.c_proj.weight, 1 / scale)
        yield f"{own}.fc2.bias", block.mlp.c_proj.bias


def _scaled(weight: Tensor, scale: float) -> Tensor:
    return weight if scale == 1.0 else weight.float() * scale


def _matrix(projection: Any) -> Tensor:
    """A matrix that features are multiplied with from the right; open_clip has it as a parameter or a layer."""
    return projection.weight.T if isinstance(projection, nn.Linear) else projection
