"""Weights and sizes of BLIP's captioner and filter: ours ↔ transformers' layout ↔ the original release's.

In: state dicts and configs of one side. Out: those of the other. Strict: an error names every key that is
missing or unknown. What tied layouts store twice must be equal; what only training needs is left out.

    ours         `Captioner`, `Filter` of `models.med`
    transformers `BlipForConditionalGeneration`, `BlipForImageTextRetrieval`
    original     the released .pth: visual_encoder.*, text_decoder.bert.* or text_encoder.*, itm_head, ...
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import BlipConfig

from capfilt.errors import UsageError
from capfilt.models.convert_blip2 import State, find_text_encoder, vision_names, vision_sizes
from capfilt.models.med import MEDConfig
from capfilt.models.vit import ViTConfig
from capfilt.models.weight_names import count_layers, pair, refuse_odd_keys

Kind = Literal["captioner", "filter"]

ORIGINAL_LAYER_NORM_EPS = 1e-6
"""Of the original image encoder; its .pth does not say."""
ORIGINAL_HEAD_WIDTH = 64
"""Width of an attention head in every released BLIP."""

_TRAINING_ONLY = ("visual_encoder_m.", "text_encoder_m.", "vision_proj_m.", "text_proj_m.")
_TRAINING_ONLY_KEYS = ("temp", "image_queue", "text_queue", "queue_ptr", "ptr_queue", "idx_queue")
_ONLY_IN: dict[Kind, tuple[str, ...]] = {
    "captioner": ("text_decoder.",),
    "filter": ("text_encoder.", "vision_proj.", "text_proj.", "itm_head."),
}
_OTHER: dict[Kind, Kind] = {"captioner": "filter", "filter": "captioner"}
_POSITION_IDS = "embeddings.position_ids"
"""A buffer of older layouts: 0, 1, 2, …"""
_TIED_IN_CAPTIONER = {
    "text_decoder.cls.predictions.decoder.weight": "text_decoder.bert.embeddings.word_embeddings.weight",
    "text_decoder.cls.predictions.decoder.bias": "text_decoder.cls.predictions.bias",
}
"""Stored twice in some files."""


def transformers_names(kind: Kind, *, vision_depth: int, text_depth: int) -> dict[str, str]:
    """Names of our captioner's or filter's weights → transformers' names."""
    names = {f"vision.{ours}": theirs for ours, theirs in vision_names(vision_depth).items()}
    names |= pair("vision.norm", "vision_model.post_layernorm")
    if kind == "captioner":
        return names | text_names("decoder", "text_decoder.bert", text_depth) | _head_names()
    names |= text_names("encoder", "text_encoder", text_depth)
    for ours, theirs in (
        ("vision_projection", "vision_proj"),
        ("text_projection", "text_proj"),
        ("itm_head", "itm_head"),
    ):
        names |= pair(ours, theirs)
    return names


def from_transformers(state: Mapping[str, Tensor], kind: Kind, *, vision_depth: int, text_depth: int) -> State:
    """Our state dict of transformers' (strict).

    Raises UsageError naming every missing and unknown key, and a weight that should be tied but is not.
    """
    names = transformers_names(kind, vision_depth=vision_depth, text_depth=text_depth)
    found = {key: tensor for key, tensor in state.items() if not key.endswith(_POSITION_IDS)}
    if kind == "captioner":
        _drop_tied(found)
    _refuse_other_kind(found, kind)
    refuse_odd_keys(found, names.values(), f"a BLIP {kind} of this config")
    ours = {our_name: found[their_name] for our_name, their_name in names.items()}
    if kind == "captioner":
        ours["head.vocabulary.weight"] = ours["decoder.word_embedding.weight"]
    return ours


def to_transformers(state: Mapping[str, Tensor], kind: Kind, *, vision_depth: int, text_depth: int) -> State:
    """transformers' state dict of ours; tied weights once, as safetensors wants them."""
    names = transformers_names(kind, vision_depth=vision_depth, text_depth=text_depth)
    odd = sorted((state.keys() - {"head.vocabulary.weight"}) ^ names.keys())
    if odd:
        raise ValueError(f"our {kind} and the table of names differ in {len(odd)} keys, such as {odd[0]!r}")
    return {theirs: state[ours] for ours, theirs in names.items()}


def med_from_bert(state: Mapping[str, Tensor], depth: int) -> State:
    """Weights of a `TextTransformer` that BERT gives: embeddings and layers; nothing of cross-attention.

    MED knows no token types: that of the first kind is added to the positions, so that texts keep their features
    (BLIP's released code drops it). UsageError where a weight lacks.
    """
    prefix = find_text_encoder(state)
    names = {
        ours.removeprefix("med."): theirs.replace("bert.", prefix, 1)
        for ours, theirs in text_names("med", "bert", depth).items()
        if "cross" not in ours
    }
    if missing := sorted(set(names.values()) - state.keys()):
        raise UsageError(f"The BERT to start from lacks {len(missing)} weights, such as {missing[0]}. Give another.")
    start = {ours: state[theirs] for ours, theirs in names.items()}
    types = state.get(f"{prefix}embeddings.token_type_embeddings.weight")
    if types is not None:
        start["position_embedding.weight"] = start["position_embedding.weight"] + types[:1]
    return start


def original_to_transformers(state: Mapping[str, Tensor], kind: Kind) -> State:
    """transformers' names for the weights of an original .pth (its `model` entry).

    Momentum encoders, queues and the temperature are left out, and of a file of pre-training, which has captioner and
    filter, the other one; what is unknown keeps its name, so that `from_transformers` names it.
    """
    depth = count_layers(state, "visual_encoder.blocks.")
    renames = dict(zip(_original_vision(depth), _theirs_vision(depth), strict=True))
    left_out = (*_TRAINING_ONLY, *_ONLY_IN[_OTHER[kind]]) if has_both_parts(state) else _TRAINING_ONLY
    return {
        renames.get(key, key): tensor
        for key, tensor in state.items()
        if not key.startswith(left_out) and key not in _TRAINING_ONLY_KEYS
    }


def has_both_parts(state: Mapping[str, Tensor]) -> bool:
    """Whether an original .pth is one of pre-training, with encoder and decoder."""
    words = "embeddings.word_embeddings.weight"
    return f"text_encoder.{words}" in state and f"text_decoder.bert.{words}" in state


def sizes_from_config(config: Mapping[str, Any]) -> tuple[ViTConfig, MEDConfig, int]:
    """Our sizes (image, text, width of ITC's embedding) of transformers' config.json.

    `enc_token_id` may stand in its text_config; without it [ENC] follows [DEC], as in every released BLIP.
    """
    parsed = BlipConfig.from_dict(dict(config))
    vision: Any = parsed.vision_config
    text: Any = parsed.text_config
    for part in (vision, text):
        if part.hidden_act != "gelu":
            raise UsageError(f"{part.model_type} uses {part.hidden_act!r}; expected 'gelu', as BLIP's models have.")
    med = MEDConfig(
        vocab_size=text.vocab_size, width=text.hidden_size, depth=text.num_hidden_layers,
        num_heads=text.num_attention_heads, mlp_width=text.intermediate_size,
        max_positions=text.max_position_embeddings, vision_width=vision.hidden_size,
        layer_norm_eps=text.layer_norm_eps, dropout=text.hidden_dropout_prob, pad_token_id=text.pad_token_id,
        sep_token_id=text.sep_token_id, dec_token_id=text.bos_token_id,
        enc_token_id=getattr(text, "enc_token_id", text.bos_token_id + 1),
    )  # fmt: skip
    return vision_sizes(vision), med, parsed.image_text_hidden_size


def config_from_sizes(kind: Kind, vit: ViTConfig, med: MEDConfig, *, embed_dim: int = 256) -> dict[str, Any]:
    """transformers' config.json of our sizes, with `enc_token_id` in its text_config."""
    text = {
        "vocab_size": med.vocab_size, "hidden_size": med.width, "encoder_hidden_size": vit.width,
        "intermediate_size": med.mlp_width, "num_hidden_layers": med.depth,
        "num_attention_heads": med.num_heads, "max_position_embeddings": med.max_positions,
        "layer_norm_eps": med.layer_norm_eps,
        "hidden_dropout_prob": med.dropout, "pad_token_id": med.pad_token_id,
        "sep_token_id": med.sep_token_id,
        "bos_token_id": med.dec_token_id, "enc_token_id": med.enc_token_id, "eos_token_id": med.sep_token_id,
    }  # fmt: skip
    vision = {
        "hidden_size": vit.width, "intermediate_size": vit.mlp_width, "num_hidden_layers": vit.depth,
        "num_attention_heads": vit.num_heads, "image_size": vit.image_size_px,
        "patch_size": vit.patch_size_px, "layer_norm_eps": vit.layer_norm_eps, "initializer_range": 0.02,
    }  # fmt: skip
    config = BlipConfig(text_config=text, vision_config=vision, image_text_hidden_size=embed_dim).to_dict()
    name = "BlipForConditionalGeneration" if kind == "captioner" else "BlipForImageTextRetrieval"
    return config | {"architectures": [name], "model_type": "blip"}


def sizes_from_original(state: Mapping[str, Tensor], kind: Kind) -> tuple[ViTConfig, MEDConfig, int]:
    """Our sizes of an original .pth, read off its weights' shapes. Raises UsageError where they lack."""
    text = "text_decoder.bert" if kind == "captioner" else "text_encoder"
    needed = {
        "patch": "visual_encoder.patch_embed.proj.weight", "position": "visual_encoder.pos_embed",
        "vision_mlp": "visual_encoder.blocks.0.mlp.fc1.weight",
        "words": f"{text}.embeddings.word_embeddings.weight",
        "positions": f"{text}.embeddings.position_embeddings.weight",
        "text_mlp": f"{text}.encoder.layer.0.intermediate.dense.weight",
    }  # fmt: skip
    missing = sorted(name for name in needed.values() if name not in state)
    if missing:
        expected = "model_*_caption*.pth" if kind == "captioner" else "model_*_retrieval_*.pth"
        raise UsageError(
            f"The .pth is no original BLIP {kind}: it lacks {', '.join(missing)}. Give a {expected} of the release."
        )
    shapes = {part: state[name].shape for part, name in needed.items()}
    width, patch = shapes["patch"][0], shapes["patch"][2]
    for found in (width, shapes["words"][1]):
        if found % ORIGINAL_HEAD_WIDTH:
            raise UsageError(f"The .pth has features of width {found}; expected a multiple of {ORIGINAL_HEAD_WIDTH}.")
    grid = round((shapes["position"][1] - 1) ** 0.5)
    vit = ViTConfig(
        image_size_px=grid * patch, patch_size_px=patch, width=width, num_heads=width // ORIGINAL_HEAD_WIDTH,
        depth=count_layers(state, "visual_encoder.blocks."), mlp_width=shapes["vision_mlp"][0],
        layer_norm_eps=ORIGINAL_LAYER_NORM_EPS,
    )  # fmt: skip
    med = MEDConfig(
        vocab_size=shapes["words"][0], width=shapes["words"][1],
        depth=count_layers(state, f"{text}.encoder.layer."), num_heads=shapes["words"][1] // ORIGINAL_HEAD_WIDTH,
        mlp_width=shapes["text_mlp"][0],
        max_positions=shapes["positions"][0], vision_width=width,
    )  # fmt: skip
    embed_dim = state["vision_proj.weight"].shape[0] if "vision_proj.weight" in state else 256
    return vit, med, embed_dim


def text_names(ours: str, theirs: str, depth: int, *, first_cross_layer: int = 0) -> dict[str, str]:
    """Names of a `TextTransformer` → BERT's layout, with cross-attention from a layer on."""
    names = {
        f"{ours}.word_embedding.weight": f"{theirs}.embeddings.word_embeddings.weight",
        f"{ours}.position_embedding.weight": f"{theirs}.embeddings.position_embeddings.weight",
        **pair(f"{ours}.embedding_norm", f"{theirs}.embeddings.LayerNorm"),
    }
    for index in range(depth):
        our_layer, their_layer = f"{ours}.layers.{index}", f"{theirs}.encoder.layer.{index}"
        for our_part, their_part in (("self", "attention"), ("cross", "crossattention")):
            if our_part == "cross" and index < first_cross_layer:
                continue
            for matrix in ("query", "key", "value"):
                names |= pair(f"{our_layer}.{our_part}_attention.{matrix}", f"{their_layer}.{their_part}.self.{matrix}")
            names |= pair(f"{our_layer}.{our_part}_attention.output", f"{their_layer}.{their_part}.output.dense")
            names |= pair(f"{our_layer}.{our_part}_norm", f"{their_layer}.{their_part}.output.LayerNorm")
        names |= pair(f"{our_layer}.feed_forward.fc1", f"{their_layer}.intermediate.dense")
        names |= pair(f"{our_layer}.feed_forward.fc2", f"{their_layer}.output.dense")
        names |= pair(f"{our_layer}.norm", f"{their_layer}.output.LayerNorm")
    return names


def _head_names() -> dict[str, str]:
    return {
        **pair("head.transform", "text_decoder.cls.predictions.transform.dense"),
        **pair("head.norm", "text_decoder.cls.predictions.transform.LayerNorm"),
        "head.vocabulary.bias": "text_decoder.cls.predictions.bias",
    }


def _original_vision(depth: int) -> list[str]:
    names = ["visual_encoder.cls_token", "visual_encoder.pos_embed"]
    modules = ["visual_encoder.patch_embed.proj", "visual_encoder.norm"]
    for index in range(depth):
        for part in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"):
            modules.append(f"visual_encoder.blocks.{index}.{part}")
    return names + [f"{module}.{kind}" for module in modules for kind in ("weight", "bias")]


def _theirs_vision(depth: int) -> list[str]:
    names = ["vision_model.embeddings.class_embedding", "vision_model.embeddings.position_embedding"]
    modules = ["vision_model.embeddings.patch_embedding", "vision_model.post_layernorm"]
    for index in range(depth):
        for part in (
            "layer_norm1",
            "self_attn.qkv",
            "self_attn.projection",
            "layer_norm2",
            "mlp.fc1",
            "mlp.fc2",
        ):
            modules.append(f"vision_model.encoder.layers.{index}.{part}")
    return names + [f"{module}.{kind}" for module in modules for kind in ("weight", "bias")]


def _drop_tied(state: State) -> None:
    for copy, source in _TIED_IN_CAPTIONER.items():
        tensor = state.pop(copy, None)
        if tensor is not None and source not in state:
            state[source] = tensor
        elif tensor is not None and not torch.equal(tensor, state[source]):
            raise UsageError(f"{copy} and {source} differ in this checkpoint; a BLIP captioner has them tied.")


def _refuse_other_kind(state: Mapping[str, Tensor], kind: Kind) -> None:
    other = _OTHER[kind]
    has_own, has_other = (any(name.startswith(_ONLY_IN[each]) for name in state) for each in (kind, other))
    if has_other and not has_own:
        raise UsageError(f"These are the weights of a BLIP {other}; expected a {kind}. Give the folder of a {kind}.")
