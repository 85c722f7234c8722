"""What a new Q-Former starts from, in stage 1 or in a stage 2 without it: sizes, tokenizer and first weights.

In: names of models in transformers' layout, BERT's or BLIP's. Out: sizes, and weights for our modules. The frozen image
encoder is `capfilt.weights.image_encoders`'.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from capfilt.errors import UsageError
from capfilt.models.convert_blip2 import State, find_text_encoder, text_encoder_start
from capfilt.models.qformer import QFormerConfig
from capfilt.settings import QFormerSettings
from capfilt.train.saved import dec_token_id_of
from capfilt.train.starts import bert_sizes
from capfilt.weights.find import find_model_dir
from capfilt.weights.image_encoders import is_open_clip
from capfilt.weights.model_files import load_tokenizer, read_config, read_weights


@dataclass(frozen=True)
class QFormerStart:
    """Sizes, tokenizer, [DEC]'s id, and weights (none where training starts from nothing)."""

    config: QFormerConfig
    tokenizer: Any
    dec_token_id: int
    weights: State
    head_weights: State


def load_qformer_start(settings: QFormerSettings, vision_width: int) -> QFormerStart:
    """Sizes, tokenizer and first weights of the Q-Former from BERT or a BLIP model's text encoder."""
    folder = find_qformer_start(settings)
    config = read_config(folder)
    text_config = config.get("text_config", config)
    state = read_weights(folder)
    tokenizer = load_tokenizer(folder)
    dec_token_id = dec_token_id_of(tokenizer, text_config.get("bos_token_id"))
    rows = state[find_text_encoder(state) + "embeddings.word_embeddings.weight"].shape[0]
    sizes = QFormerConfig(
        num_queries=settings.num_queries,
        vision_width=vision_width,
        cross_attention_every=settings.cross_attention_every,
        vocab_size=max(rows, dec_token_id + 1),
        dropout=settings.dropout,
        pad_token_id=text_config.get("pad_token_id") or 0,
        **bert_sizes(folder),
    )
    if not settings.init_weights:
        return QFormerStart(sizes, tokenizer, dec_token_id, {}, {})
    weights, head = text_encoder_start(state, sizes, cross_attention=settings.init_cross_attention)
    return QFormerStart(sizes, tokenizer, dec_token_id, weights, head)


def find_qformer_start(settings: QFormerSettings) -> Path:
    """The folder of BERT or BLIP that the Q-Former starts from. UsageError where none is named."""
    what = "start of the Q-Former"
    if settings.qformer_init:
        return find_model_dir(settings.qformer_init, what)
    name = settings.image_encoder
    if not is_open_clip(name) and not Path(name).expanduser().is_file():
        folder = find_model_dir(name, what)
        if read_config(folder).get("model_type") == "blip":
            return folder
    raise UsageError(
        f"The image encoder {name} comes without a text encoder for the Q-Former to start from. Name one: "
        "--qformer-init google-bert/bert-base-uncased (BLIP-2 §3.1)."
    )


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
