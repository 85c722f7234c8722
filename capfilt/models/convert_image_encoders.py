"""Weights and sizes of frozen image encoders: CLIP's in transformers' layout ↔ ours, those of LAVIS's layouts → ours.

In: state dicts and configurations of one side. Out: those of the other, without the layer norm behind the last block,
which stages 1 and 2 train. Strict: an error names every key that is missing or unknown.

- CLIP's query, key and value matrices lie apart; ours are one. Its patch embedding has no bias: ours is zero then
- QuickGELU is SiLU when the layers around it are scaled (`capfilt.models.convert_clip`)
- EVA's keys have no bias: it is zero between those of queries and values
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPConfig, CLIPVisionConfig

from capfilt.errors import UsageError
from capfilt.models.convert_blip2 import State
from capfilt.models.packed import Activation
from capfilt.models.vit import ViTConfig, interpolate_positions
from capfilt.models.weight_names import refuse_odd_keys

QUICK_GELU_SCALE = 1.702
EVA_HEAD_WIDTH = 88
"""Width of an attention head of EVA-CLIP's ViT-g (16 heads of 1,408); its files do not say."""
EVA_LAYER_NORM_EPS = 1e-6
EVA_DEPTH = 40
"""Blocks of EVA-CLIP's ViT-g; as published with BLIP-2 it lacks the last one."""

_ACTIVATIONS: dict[str, Activation] = {"quick_gelu": "silu", "gelu": "gelu"}
_POSITION_IDS = "embeddings.position_ids"  # a buffer of older layouts: 0, 1, 2, …
_BEHIND_EVA = ("norm.", "fc_norm.", "head.", "mask_token")  # what features do not pass through

_CLIP_MODULES = {
    "norm1": "layer_norm1", "projection": "self_attn.out_proj", "norm2": "layer_norm2", "fc1": "mlp.fc1",
    "fc2": "mlp.fc2",
}  # fmt: skip
_EVA_MODULES = {"norm1": "norm1", "projection": "attn.proj", "norm2": "norm2", "fc1": "mlp.fc1", "fc2": "mlp.fc2"}
_OPENAI_MODULES = {
    "norm1": "ln_1", "projection": "attn.out_proj", "norm2": "ln_2", "fc1": "mlp.c_fc", "fc2": "mlp.c_proj",
}  # fmt: skip
_OPENAI_HEAD_WIDTH = 64
_BEHIND_OPENAI = ("ln_post.", "proj")
_KINDS = ("weight", "bias")


def clip_sizes(config: Mapping[str, Any]) -> ViTConfig:
    """Sizes of the image encoder that a CLIP's config.json describes. UsageError for what ours cannot compute."""
    is_whole = config.get("model_type") == "clip"
    parsed: Any = CLIPConfig.from_dict(dict(config)).vision_config if is_whole else CLIPVisionConfig(**config)
    if parsed.hidden_act not in _ACTIVATIONS:
        known = ", ".join(_ACTIVATIONS)
        raise UsageError(f"The CLIP's image encoder uses {parsed.hidden_act!r}; expected one of {known}.")
    return ViTConfig(
        image_size_px=parsed.image_size, patch_size_px=parsed.patch_size, width=parsed.hidden_size,
        depth=parsed.num_hidden_layers, num_heads=parsed.num_attention_heads, mlp_width=parsed.intermediate_size,
        layer_norm_eps=parsed.layer_norm_eps, activation=_ACTIVATIONS[parsed.hidden_act], norm_first=True,
    )  # fmt: skip


def clip_config(sizes: ViTConfig) -> CLIPVisionConfig:
    """transformers' configuration of a `CLIPVisionModel` of these sizes."""
    names = {ours: theirs for theirs, ours in _ACTIVATIONS.items()}
    return CLIPVisionConfig(
        image_size=sizes.image_size_px, patch_size=sizes.patch_size_px, hidden_size=sizes.width,
        num_hidden_layers=sizes.depth, num_attention_heads=sizes.num_heads, intermediate_size=sizes.mlp_width,
        layer_norm_eps=sizes.layer_norm_eps, hidden_act=names[sizes.activation],
        architectures=["CLIPVisionModel"],
    )  # fmt: skip


def from_clip(state: Mapping[str, Tensor], sizes: ViTConfig) -> tuple[State, State]:
    """Our weights, and those of the last layer norm, of a `CLIPVisionModel`'s or `CLIPModel`'s; texts are left out.

    Raises UsageError naming every missing and unknown key of the image encoder.
    """
    if any(name.startswith("vision_model.") for name in state):
        state = {name.removeprefix("vision_model."): t for name, t in state.items() if name.startswith("vision_model.")}
    found = {name: tensor for name, tensor in state.items() if name not in (_POSITION_IDS, "visual_projection.weight")}
    plain = _clip_names(sizes.depth)
    parts = {name for index in range(sizes.depth) for name in _clip_attention(index)}
    norm_names = [f"post_layernorm.{kind}" for kind in _KINDS]
    refuse_odd_keys(found, {*plain.values(), *parts, *norm_names}, "a CLIP's image encoder")
    ours = {name: found[theirs] for name, theirs in plain.items()}
    ours = _as_ours(ours, sizes)
    for index in range(sizes.depth):
        names = _clip_attention(index)
        for offset, kind in enumerate(_KINDS):
            ours[f"blocks.{index}.query_key_value.{kind}"] = torch.cat([found[name] for name in names[offset::2]])
    norm = {kind: found[f"post_layernorm.{kind}"] for kind in _KINDS}
    return _scaled(ours, sizes, QUICK_GELU_SCALE), norm


def to_clip(state: Mapping[str, Tensor], sizes: ViTConfig, norm: Mapping[str, Tensor]) -> State:
    """A `CLIPVisionModel`'s weights of ours; `norm` is its last layer norm. ValueError where they are no CLIP's."""
    if bool(state["patch_embedding.bias"].any()) or not sizes.norm_first:
        raise ValueError("a CLIP has no bias on its patches, and a layer norm before its first block")
    ours = _scaled({name: tensor.float() for name, tensor in state.items()}, sizes, 1 / QUICK_GELU_SCALE)
    theirs = {name: ours[own] for own, name in _clip_names(sizes.depth).items()}
    theirs["embeddings.class_embedding"] = theirs["embeddings.class_embedding"].flatten()
    theirs["embeddings.position_embedding.weight"] = theirs["embeddings.position_embedding.weight"][0]
    for index in range(sizes.depth):
        names = _clip_attention(index)
        for offset, kind in enumerate(_KINDS):
            thirds = ours[f"blocks.{index}.query_key_value.{kind}"].chunk(3)
            theirs |= dict(zip(names[offset::2], thirds, strict=True))
    return theirs | {f"post_layernorm.{kind}": norm[kind].float() for kind in _KINDS}


def eva_sizes(state: Mapping[str, Tensor]) -> ViTConfig:
    """Sizes of an EVA-CLIP image encoder in LAVIS's layout, read off its weights. UsageError where they lack."""
    names = ("cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.mlp.fc1.weight")
    if missing := [name for name in names if name not in state]:
        raise UsageError(f"The file holds no EVA-CLIP image encoder in LAVIS's layout: it lacks {', '.join(missing)}.")
    _, positions, patches, mlp = (state[name].shape for name in names)
    width, patch, side = patches[0], patches[2], math.isqrt(positions[1] - 1)
    if width % EVA_HEAD_WIDTH:
        raise UsageError(f"The image encoder's width is {width}; expected a multiple of {EVA_HEAD_WIDTH}, as EVA's is.")
    return ViTConfig(
        image_size_px=side * patch, patch_size_px=patch, width=width, depth=_count_blocks(state),
        num_heads=width // EVA_HEAD_WIDTH, mlp_width=mlp[0], layer_norm_eps=EVA_LAYER_NORM_EPS,
    )  # fmt: skip


def from_eva(state: Mapping[str, Tensor], sizes: ViTConfig) -> State:
    """Our weights of an EVA-CLIP image encoder in LAVIS's layout; norm and head behind the last block are left out.

    Raises UsageError naming every missing and unknown key.
    """
    found = {name: tensor for name, tensor in state.items() if not name.startswith(_BEHIND_EVA)}
    plain = {"class_embedding": "cls_token", "position_embedding": "pos_embed"} | _pairs(
        "patch_embedding", "patch_embed.proj"
    )
    for index in range(sizes.depth):
        for ours, theirs in _EVA_MODULES.items():
            plain |= _pairs(f"blocks.{index}.{ours}", f"blocks.{index}.{theirs}")
    attention = [f"blocks.{index}.attn" for index in range(sizes.depth)]
    parts = {f"{own}.{name}" for own in attention for name in ("qkv.weight", "q_bias", "v_bias")}
    refuse_odd_keys(found, {*plain.values(), *parts}, "EVA-CLIP's image encoder")
    converted = {ours: found[theirs] for ours, theirs in plain.items()}
    for index, own in enumerate(attention):
        queries, values = found[f"{own}.q_bias"], found[f"{own}.v_bias"]
        converted[f"blocks.{index}.query_key_value.weight"] = found[f"{own}.qkv.weight"]
        converted[f"blocks.{index}.query_key_value.bias"] = torch.cat([queries, torch.zeros_like(queries), values])
    return converted


def openai_sizes(state: Mapping[str, Tensor]) -> ViTConfig:
    """Sizes of a CLIP's image encoder in OpenAI's layout, which LAVIS's BLIP-2 on ViT-L/14 has, read off its weights.

    UsageError where they lack.
    """
    names = ("conv1.weight", "positional_embedding", "transformer.resblocks.0.mlp.c_fc.weight")
    if missing := [name for name in names if name not in state]:
        raise UsageError(f"The file holds no CLIP's image encoder in OpenAI's layout: it lacks {', '.join(missing)}.")
    patches, positions, mlp = (state[name].shape for name in names)
    width, patch, side = patches[0], patches[2], math.isqrt(positions[0] - 1)
    if width % _OPENAI_HEAD_WIDTH:
        raise UsageError(f"The image encoder's width is {width}; expected a multiple of {_OPENAI_HEAD_WIDTH}.")
    return ViTConfig(
        image_size_px=side * patch, patch_size_px=patch, width=width,
        depth=_count_blocks(state, "transformer.resblocks."), num_heads=width // _OPENAI_HEAD_WIDTH, mlp_width=mlp[0],
        layer_norm_eps=1e-5, activation="silu", norm_first=True,
    )  # fmt: skip


def from_openai(state: Mapping[str, Tensor], sizes: ViTConfig) -> State:
    """Our weights of a CLIP's image encoder in OpenAI's layout; what is behind the last block is left out.

    Raises UsageError naming every missing and unknown key.
    """
    found = {name: tensor for name, tensor in state.items() if not name.startswith(_BEHIND_OPENAI)}
    plain = {
        "class_embedding": "class_embedding", "position_embedding": "positional_embedding",
        "patch_embedding.weight": "conv1.weight", **_pairs("first_norm", "ln_pre"),
    }  # fmt: skip
    for index in range(sizes.depth):
        own = f"transformer.resblocks.{index}"
        for ours, theirs in _OPENAI_MODULES.items():
            plain |= _pairs(f"blocks.{index}.{ours}", f"{own}.{theirs}")
        plain |= {f"blocks.{index}.query_key_value.{kind}": f"{own}.attn.in_proj_{kind}" for kind in _KINDS}
    refuse_odd_keys(found, plain.values(), "a CLIP's image encoder")
    return _scaled(_as_ours({ours: found[theirs] for ours, theirs in plain.items()}, sizes), sizes, QUICK_GELU_SCALE)


def without_last_block(state: Mapping[str, Tensor], sizes: ViTConfig) -> tuple[State, ViTConfig]:
    """Weights and sizes of an encoder whose output is that of the block before its last. UsageError for one block."""
    if sizes.depth < 2:
        raise UsageError(f"The image encoder has {sizes.depth} block; expected two or more to take the second-last.")
    last = f"blocks.{sizes.depth - 1}."
    kept = {name: tensor for name, tensor in state.items() if not name.startswith(last)}
    return kept, replace(sizes, depth=sizes.depth - 1)


def at_image_size(state: Mapping[str, Tensor], sizes: ViTConfig, image_size_px: int) -> tuple[State, ViTConfig]:
    """Weights and sizes for images of another size: positions are interpolated. UsageError where patches do not fit."""
    if image_size_px % sizes.patch_size_px:
        raise UsageError(
            f"image_size_px is {image_size_px}; expected a multiple of the encoder's patches, {sizes.patch_size_px} "
            f"px. Its own size is {sizes.image_size_px} px."
        )
    side = image_size_px // sizes.patch_size_px
    positions = interpolate_positions(state["position_embedding"], (side, side))
    return {**state, "position_embedding": positions}, replace(sizes, image_size_px=image_size_px)


def _as_ours(state: State, sizes: ViTConfig) -> State:
    """CLIP's embeddings in our shapes, and the bias that its patches lack."""
    return state | {
        "class_embedding": state["class_embedding"][None, None],
        "position_embedding": state["position_embedding"][None],
        "patch_embedding.bias": state["patch_embedding.weight"].new_zeros(sizes.width),
    }


def _clip_names(depth: int) -> dict[str, str]:
    names = {
        "class_embedding": "embeddings.class_embedding",
        "position_embedding": "embeddings.position_embedding.weight",
        "patch_embedding.weight": "embeddings.patch_embedding.weight",
        **_pairs("first_norm", "pre_layrnorm"),  # transformers' own spelling
    }
    for index in range(depth):
        for ours, theirs in _CLIP_MODULES.items():
            names |= _pairs(f"blocks.{index}.{ours}", f"encoder.layers.{index}.{theirs}")
    return names


def _clip_attention(index: int) -> list[str]:
    """Weight and bias of queries, keys and values, in this order."""
    own = f"encoder.layers.{index}.self_attn"
    return [f"{own}.{part}_proj.{kind}" for part in "qkv" for kind in _KINDS]


def _scaled(state: State, sizes: ViTConfig, scale: float) -> State:
    """The layers around QuickGELU scaled by `scale` and its inverse; all as they are for GELU."""
    if sizes.activation != "silu":
        return state
    scaled = dict(state)
    for index in range(sizes.depth):
        for name, factor in (("fc1.weight", scale), ("fc1.bias", scale), ("fc2.weight", 1 / scale)):
            own = f"blocks.{index}.{name}"
            scaled[own] = state[own].float() * factor
    return scaled


def _count_blocks(state: Mapping[str, Tensor], prefix: str = "blocks.") -> int:
    return len({name.removeprefix(prefix).split(".")[0] for name in state if name.startswith(prefix)})


def _pairs(ours: str, theirs: str) -> dict[str, str]:
    return {f"{ours}.{kind}": f"{theirs}.{kind}" for kind in _KINDS}
