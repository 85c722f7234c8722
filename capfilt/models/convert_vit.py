"""Weights and sizes of published Vision Transformers, to start an image encoder from: timm's layout, transformers' ViT.

In: state dicts and configs of one side. Out: those of the other. Strict: an error names every key that is missing or
unknown; what a classifier has behind the features is left out.

    ours          `VisionTransformer` of `models.vit`
    timm          cls_token, blocks.0.attn.qkv.weight, …: DeiT's and ViT's releases, BLIP's and ALBEF's image encoders
    transformers  `ViTModel`, `ViTForImageClassification`, `DeiTModel` without distillation
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from capfilt.errors import UsageError
from capfilt.models.convert_blip2 import State
from capfilt.models.vit import ViTConfig, interpolate_positions
from capfilt.models.weight_names import count_layers, pair, refuse_odd_keys

HEAD_WIDTH = 64
"""Width of an attention head in timm's ViTs up to `LARGEST_WIDTH`; their files do not say."""
LARGEST_WIDTH = 1024
"""Of ViT-L; wider ones have wider heads (ViT-H: 80, ViT-g: 88)."""
TIMM_LAYER_NORM_EPS = 1e-6
"""Of timm's Vision Transformers; their files do not say."""

_BEHIND_FEATURES = ("head.", "fc_norm.", "pre_logits.", "classifier.", "pooler.")
_TIMM_PARTS = {
    "norm1": "norm1", "query_key_value": "attn.qkv", "projection": "attn.proj", "norm2": "norm2", "fc1": "mlp.fc1",
    "fc2": "mlp.fc2",
}  # fmt: skip
_THEIR_PARTS = {
    "norm1": "layernorm_before", "projection": "attention.output.dense", "norm2": "layernorm_after",
    "fc1": "intermediate.dense", "fc2": "output.dense",
}  # fmt: skip


def timm_names(depth: int) -> dict[str, str]:
    """Names of our weights → timm's."""
    names = {"class_embedding": "cls_token", "position_embedding": "pos_embed"}
    names |= pair("patch_embedding", "patch_embed.proj") | pair("norm", "norm")
    for index in range(depth):
        for ours, theirs in _TIMM_PARTS.items():
            names |= pair(f"blocks.{index}.{ours}", f"blocks.{index}.{theirs}")
    return names


def from_timm(state: Mapping[str, Tensor]) -> State:
    """Our weights of timm's. UsageError naming every missing and unknown key."""
    found = _without_head(state)
    names = timm_names(count_layers(found, "blocks."))
    refuse_odd_keys(found, names.values(), "a Vision Transformer in timm's layout")
    return {ours: found[theirs] for ours, theirs in names.items()}


def sizes_from_timm(state: Mapping[str, Tensor], *, prefix: str = "") -> ViTConfig:
    """Sizes of timm's layout, read off the weights' shapes; heads are `HEAD_WIDTH` wide.

    Raises UsageError where weights lack that tell them, or where heads of this width are not to be expected.
    """
    needed = {part: prefix + name for part, name in (
        ("patch", "patch_embed.proj.weight"), ("position", "pos_embed"), ("mlp", "blocks.0.mlp.fc1.weight"),
    )}  # fmt: skip
    if missing := sorted(name for name in needed.values() if name not in state):
        raise UsageError(f"This is no Vision Transformer in timm's layout: it lacks {', '.join(missing)}.")
    shapes = {part: state[name].shape for part, name in needed.items()}
    width, patch = shapes["patch"][0], shapes["patch"][2]
    if width % HEAD_WIDTH or width > LARGEST_WIDTH:
        raise UsageError(
            f"The image encoder's features have width {width}; expected a multiple of {HEAD_WIDTH}, at most "
            f"{LARGEST_WIDTH}: of others the file does not say how wide a head is. Give transformers' folder."
        )
    grid = round((shapes["position"][1] - 1) ** 0.5)
    return ViTConfig(
        image_size_px=grid * patch, patch_size_px=patch, width=width, num_heads=width // HEAD_WIDTH,
        depth=count_layers(state, f"{prefix}blocks."), mlp_width=shapes["mlp"][0], layer_norm_eps=TIMM_LAYER_NORM_EPS,
    )  # fmt: skip


def from_transformers_vit(state: Mapping[str, Tensor], depth: int) -> State:
    """Our weights of a `ViTModel`'s or one with a classifier. UsageError naming every missing and unknown key."""
    found = _without_head({name.removeprefix("vit.").removeprefix("deit."): t for name, t in state.items()})
    names = _their_names(depth)
    apart = {name for index in range(depth) for kind in ("weight", "bias") for name in _their_attention(index, kind)}
    refuse_odd_keys(found, {*names.values(), *apart}, "transformers' ViT")
    ours = {own: found[theirs] for own, theirs in names.items()}
    for index in range(depth):
        for kind in ("weight", "bias"):
            parts = [found[name] for name in _their_attention(index, kind)]
            ours[f"blocks.{index}.query_key_value.{kind}"] = torch.cat(parts)
    return ours


def sizes_from_transformers_vit(config: Mapping[str, Any]) -> ViTConfig:
    """Sizes of transformers' config.json; UsageError for what ours cannot compute."""
    if config.get("hidden_act", "gelu") != "gelu" or not config.get("qkv_bias", True):
        raise UsageError(
            f"The ViT has hidden_act {config.get('hidden_act')!r} and qkv_bias {config.get('qkv_bias')}; expected "
            "'gelu' and true. Give another --vision-init."
        )
    return ViTConfig(
        image_size_px=config.get("image_size", 224), patch_size_px=config.get("patch_size", 16),
        width=config.get("hidden_size", 768), depth=config.get("num_hidden_layers", 12),
        num_heads=config.get("num_attention_heads", 12), mlp_width=config.get("intermediate_size", 3072),
        layer_norm_eps=config.get("layer_norm_eps", 1e-12),
    )  # fmt: skip


def positions_at(state: Mapping[str, Tensor], config: ViTConfig) -> State:
    """Our weights with positions for the images of `config`: interpolated where they were for others."""
    side = config.image_size_px // config.patch_size_px
    return {**state, "position_embedding": interpolate_positions(state["position_embedding"], (side, side))}


def _without_head(state: Mapping[str, Tensor]) -> State:
    return {name: tensor for name, tensor in state.items() if not name.startswith(_BEHIND_FEATURES)}


def _their_names(depth: int) -> dict[str, str]:
    names = {"class_embedding": "embeddings.cls_token", "position_embedding": "embeddings.position_embeddings"}
    names |= pair("patch_embedding", "embeddings.patch_embeddings.projection") | pair("norm", "layernorm")
    for index in range(depth):
        for ours, theirs in _THEIR_PARTS.items():
            names |= pair(f"blocks.{index}.{ours}", f"encoder.layer.{index}.{theirs}")
    return names


def _their_attention(index: int, kind: str) -> list[str]:
    """Queries, keys, values, which ours has as one matrix."""
    return [f"encoder.layer.{index}.attention.attention.{part}.{kind}" for part in ("query", "key", "value")]
