"""open_clip's CLIP to ours, for scoring.

In: a model as open_clip built and loaded it, in float32. Out: ours with the same weights, or None where the model is
built otherwise than OpenAI's CLIP (other image encoders, texts that look both ways, other pooling).

QuickGELU, x·sigmoid(1.702·x), becomes SiLU: the layer before is scaled by 1.702, the layer after by its inverse.
"""

from __future__ import annotations

from typing import Any

import open_clip
import torch
from open_clip import transformer as layers
from torch import Tensor, nn

from capfilt.models.clip import Clip, ClipTextConfig
from capfilt.models.packed import Activation
from capfilt.models.vit import ViTConfig

QUICK_GELU_SCALE = 1.702


def clip_from_open_clip(model: Any) -> Clip | None:
    """Ours, in eval mode; None where our towers do not compute what the model computes."""
    if not _is_plain(model):
        return None
    visual = model.visual
    vision_blocks, text_blocks = list(visual.transformer.resblocks), list(model.transformer.resblocks)
    with torch.device("meta"):
        clip = Clip(
            ViTConfig(
                image_size_px=visual.image_size[0], patch_size_px=visual.patch_size[0], norm_first=True,
                **_sizes(vision_blocks),
            ),
            ClipTextConfig(
                vocab_size=model.token_embedding.num_embeddings, max_positions=len(model.positional_embedding),
                **_sizes(text_blocks),
            ),
            embed_dim=visual.proj.shape[1],
        )  # fmt: skip
    state = {
        "vision.patch_embedding.weight": visual.conv1.weight,
        "vision.patch_embedding.bias": visual.conv1.weight.new_zeros(len(visual.conv1.weight)),
        "vision.class_embedding": visual.class_embedding[None, None],
        "vision.position_embedding": visual.positional_embedding[None],
        **_of("vision.first_norm", visual.ln_pre),
        **_of("vision.norm", visual.ln_post),
        **_blocks_of("vision.blocks", vision_blocks),
        "vision_projection.weight": visual.proj.T,
        "text.token_embedding.weight": model.token_embedding.weight,
        "text.position_embedding": model.positional_embedding,
        **_of("text.norm", model.ln_final),
        **_blocks_of("text.blocks", text_blocks),
        "text_projection.weight": _matrix(model.text_projection).T,
    }
    clip.load_state_dict({name: value.detach().contiguous() for name, value in state.items()}, assign=True)
    return clip.eval().requires_grad_(False)


def _is_plain(model: Any) -> bool:
    return type(model) is open_clip.CLIP and _is_plain_vision(model.visual) and _is_plain_text(model)


def _is_plain_vision(visual: Any) -> bool:
    return (
        type(visual) is layers.VisionTransformer
        and visual.attn_pool is None
        and visual.pool_type == "tok"
        and not visual.final_ln_after_pool
        and isinstance(visual.ln_pre, nn.LayerNorm)
        and visual.proj is not None
        and _is_square(visual.image_size)
        and _is_square(visual.patch_size)
        and _cuts_evenly(visual.image_size, visual.patch_size)
        and _are_plain(visual.transformer.resblocks)
    )


def _is_square(size: Any) -> bool:
    return size[0] == size[1]


def _cuts_evenly(size: Any, patch: Any) -> bool:
    return size[0] % patch[0] == 0


def _is_plain_text(model: Any) -> bool:
    return (
        model.attn_mask is not None
        and model.text_pool_type in ("argmax", "eos")
        and model.text_projection is not None
        and getattr(model.text_projection, "bias", None) is None
        and _are_plain(model.transformer.resblocks)
    )


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


def _sizes(blocks: list[Any]) -> dict[str, Any]:
    first = blocks[0]
    mlp_width, width = first.mlp.c_fc.weight.shape
    activation: Activation = "silu" if isinstance(first.mlp.gelu, layers.QuickGELU) else "gelu"
    return {
        "width": width, "depth": len(blocks), "num_heads": first.attn.num_heads, "mlp_width": mlp_width,
        "layer_norm_eps": first.ln_1.eps, "activation": activation,
    }  # fmt: skip


def _of(name: str, module: Any, scale: float = 1.0) -> dict[str, Tensor]:
    return {f"{name}.weight": module.weight * scale, f"{name}.bias": module.bias * scale}


def _blocks_of(name: str, blocks: list[Any]) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for number, block in enumerate(blocks):
        scale = QUICK_GELU_SCALE if isinstance(block.mlp.gelu, layers.QuickGELU) else 1.0
        own = f"{name}.{number}"
        state |= {
            **_of(f"{own}.norm1", block.ln_1),
            f"{own}.query_key_value.weight": block.attn.in_proj_weight,
            f"{own}.query_key_value.bias": block.attn.in_proj_bias,
            **_of(f"{own}.projection", block.attn.out_proj),
            **_of(f"{own}.norm2", block.ln_2),
            **_of(f"{own}.fc1", block.mlp.c_fc, scale),
            f"{own}.fc2.weight": block.mlp.c_proj.weight / scale,
            f"{own}.fc2.bias": block.mlp.c_proj.bias,
        }
    return state


def _matrix(projection: Any) -> Tensor:
    """A matrix that features are multiplied with from the right; open_clip has it as a parameter or a layer."""
    return projection.weight.T if isinstance(projection, nn.Linear) else projection
