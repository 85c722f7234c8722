"""What training starts from: a frozen image encoder, and the Q-Former's sizes, tokenizer and first weights.

In: names of models in transformers' layout, BLIP's or BERT's. Out: our modules and the weights for them.

Deviation from the paper: the features are those of the image encoder's last block, as transformers' BLIP-2 takes
them; BLIP-2 §3.2 takes the second-last, which its released encoders have as their last (the last one is cut off).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from capfilt.errors import UsageError
from capfilt.models.convert_blip2 import State, find_text_encoder, text_encoder_start, to_ours, vision_names
from capfilt.models.qformer import QFormerConfig
from capfilt.models.vit import VisionTransformer, ViTConfig
from capfilt.settings import Stage1Settings
from capfilt.weights.blip import read_sizes
from capfilt.weights.find import find_model_dir
from capfilt.weights.model_files import (
    ImagePreparation,
    load_tokenizer,
    read_config,
    read_preparation,
    read_weights,
)


@dataclass(frozen=True)
class ImageEncoder:
    """A frozen ViT whose last layer norm was taken off: that one is trained, so it belongs to the stage."""

    vision: VisionTransformer
    norm: State
    preparation: ImagePreparation


@dataclass(frozen=True)
class QFormerStart:
    """Sizes, tokenizer, [DEC]'s id, and weights (none where training starts from nothing)."""

    config: QFormerConfig
    tokenizer: Any
    dec_token_id: int
    weights: State
    head_weights: State


def load_image_encoder(name: str, device: torch.device) -> ImageEncoder:
    """The image encoder of a BLIP model, frozen."""
    folder = find_model_dir(name, "image encoder")
    sizes, _, _ = read_sizes(folder)
    return build_image_encoder(sizes, read_weights(folder), read_preparation(folder, sizes.image_size_px), device)


def build_image_encoder(
    sizes: ViTConfig, state: Mapping[str, Tensor], preparation: ImagePreparation, device: torch.device
) -> ImageEncoder:
    """A frozen encoder from a state dict of BLIP's or BLIP-2's layout (`vision_model.…`)."""
    vision = VisionTransformer(sizes)
    vision.norm = nn.Identity()  # pyright: ignore[reportAttributeAccessIssue]
    vision.load_state_dict(to_ours(state, vision_names(sizes.depth)))
    norm = {kind: state[f"vision_model.post_layernorm.{kind}"].float() for kind in ("weight", "bias")}
    vision.requires_grad_(False)
    return ImageEncoder(vision.float().to(device).eval(), norm, preparation)


def load_qformer_start(settings: Stage1Settings, vision_width: int) -> QFormerStart:
    """Sizes, tokenizer and first weights of the Q-Former from BERT or a BLIP model's text encoder."""
    folder = find_model_dir(settings.qformer_init or settings.image_encoder, "start of the Q-Former")
    whole = read_config(folder)
    sizes = whole.get("text_config", whole)
    state = read_weights(folder)
    tokenizer = load_tokenizer(folder)
    dec_token_id = _dec_token_id(tokenizer, sizes)
    rows = state[find_text_encoder(state) + "embeddings.word_embeddings.weight"].shape[0]
    config = QFormerConfig(
        num_queries=settings.num_queries,
        width=sizes.get("hidden_size", 768),
        depth=sizes.get("num_hidden_layers", 12),
        num_heads=sizes.get("num_attention_heads", 12),
        mlp_width=sizes.get("intermediate_size", 3072),
        vision_width=vision_width,
        cross_attention_every=settings.cross_attention_every,
        vocab_size=max(rows, dec_token_id + 1),
        max_positions=sizes.get("max_position_embeddings", 512),
        layer_norm_eps=sizes.get("layer_norm_eps", 1e-12),
        dropout=settings.dropout,
        pad_token_id=sizes.get("pad_token_id") or 0,
    )
    if not settings.init_weights:
        return QFormerStart(config, tokenizer, dec_token_id, {}, {})
    weights, head = text_encoder_start(state, config, cross_attention=settings.init_cross_attention)
    return QFormerStart(config, tokenizer, dec_token_id, weights, head)


@torch.no_grad()
def copy_start(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copies weights over those of the same name; of a longer matrix (a larger vocabulary) the first rows."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    for name, value in weights.items():
        target = parameters[name]
        rows = min(len(target), len(value))
        if target.shape[1:] != value.shape[1:] or (
            rows < len(target) and "vocabulary" not in name and "word_" not in name
        ):
            raise UsageError(f"{name} has shape {tuple(value.shape)}; expected {tuple(target.shape)}.")
        target[:rows] = value[:rows]


def _dec_token_id(tokenizer: Any, sizes: Mapping[str, Any]) -> int:
    """[DEC] by name; else BLIP's bos (its released tokenizer lacks the name); else a new last row."""
    named = tokenizer.get_vocab().get("[DEC]")
    if named is not None:
        return int(named)
    return int(sizes.get("bos_token_id") or len(tokenizer))
