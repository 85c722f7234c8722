"""Weights and sizes of BLIP-2: ours ↔ transformers'.

In: state dicts and configs of one side. Out: those of the other (`Blip2ForImageTextRetrieval` for stage 1,
`Blip2ForConditionalGeneration` for stage 2); every missing or unknown key is an error that names it. Also the
start of a Q-Former from a BERT-style text encoder (BLIP-2 §3.1).

transformers' BLIP-2 has no room for the ITG head and the temperature; those are `EXTRA_STAGE1_KEYS`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor
from transformers import Blip2Config

from capfilt.errors import UsageError
from capfilt.models.qformer import QFormerConfig
from capfilt.models.vit import ViTConfig
from capfilt.models.weight_names import pair

State = dict[str, Tensor]

EXTRA_STAGE1_KEYS = (
    "temperature", "lm_head.transform.weight", "lm_head.transform.bias",
    "lm_head.norm.weight", "lm_head.norm.bias", "lm_head.vocabulary.bias",
)  # fmt: skip
"""Of `Stage1`, what transformers' layout does not hold."""

TEXT_ENCODER_PREFIXES = ("text_encoder.", "text_decoder.bert.", "bert.", "")
"""Where a BERT-style encoder's weights are: BLIP's ITM model, BLIP's captioner, BERT with heads, BERT."""


def vision_names(depth: int) -> dict[str, str]:
    """Names of `VisionTransformer` without its last norm → transformers' (the same in BLIP and BLIP-2)."""
    names = {
        "class_embedding": "vision_model.embeddings.class_embedding",
        "position_embedding": "vision_model.embeddings.position_embedding",
        **pair("patch_embedding", "vision_model.embeddings.patch_embedding"),
    }
    parts = {
        "norm1": "layer_norm1", "query_key_value": "self_attn.qkv", "projection": "self_attn.projection",
        "norm2": "layer_norm2", "fc1": "mlp.fc1", "fc2": "mlp.fc2",
    }  # fmt: skip
    for index in range(depth):
        for ours, theirs in parts.items():
            names |= pair(f"blocks.{index}.{ours}", f"vision_model.encoder.layers.{index}.{theirs}")
    return names


def qformer_names(config: QFormerConfig) -> dict[str, str]:
    """Names of `QFormer` → transformers'."""
    names = {"query_tokens": "query_tokens", **pair("embedding_norm", "qformer.layernorm")}
    if config.with_text:
        names["word_embedding.weight"] = "embeddings.word_embeddings.weight"
        names["position_embedding.weight"] = "embeddings.position_embeddings.weight"
    for index in range(config.depth):
        layer, theirs = f"layers.{index}", f"qformer.encoder.layer.{index}"
        names |= _attention(f"{layer}.self", f"{theirs}.attention", "attention")
        if config.attends_to_image(index):
            names |= _attention(f"{layer}.cross", f"{theirs}.crossattention", "attention")
        names |= _feed_forward(f"{layer}.query", theirs, "_query")
        if config.with_text:
            names |= _feed_forward(f"{layer}.text", theirs, "")
    return names


def stage1_names(config: QFormerConfig) -> dict[str, str]:
    """Names of `Stage1`, but for `EXTRA_STAGE1_KEYS` → `Blip2ForImageTextRetrieval`."""
    return {
        **pair("vision_norm", "vision_model.post_layernorm"),
        **{f"qformer.{ours}": theirs for ours, theirs in qformer_names(config).items()},
        **pair("vision_projection", "vision_projection"),
        **pair("text_projection", "text_projection"),
        **pair("itm_head", "itm_head"),
    }


def stage2_names(config: QFormerConfig) -> dict[str, str]:
    """Names of `Stage2`, but for the language model → `Blip2ForConditionalGeneration`."""
    return {
        **pair("vision_norm", "vision_model.post_layernorm"),
        **{f"qformer.{ours}": theirs for ours, theirs in qformer_names(config).items()},
        **pair("projection", "language_projection"),
    }


def to_theirs(state: Mapping[str, Tensor], names: Mapping[str, str]) -> State:
    """Rename ours to theirs; ValueError where the keys are not exactly those named."""
    _refuse_odd_keys(state.keys(), names.keys(), "our model")
    return {names[key]: tensor for key, tensor in state.items()}


def to_ours(state: Mapping[str, Tensor], names: Mapping[str, str]) -> State:
    """Pick and rename theirs to ours; UsageError naming keys that are missing."""
    missing = sorted(set(names.values()) - state.keys())
    if missing:
        raise UsageError(f"The checkpoint lacks {len(missing)} weights, such as {', '.join(missing[:3])}.")
    return {ours: state[theirs] for ours, theirs in names.items()}


def refuse_unknown(state: Iterable[str], *known: Mapping[str, str], ignored_prefixes: tuple[str, ...] = ()) -> None:
    """UsageError naming their keys that none of the tables knows."""
    unknown = sorted(set(state).difference(*(names.values() for names in known)))
    unknown = [key for key in unknown if not (ignored_prefixes and key.startswith(ignored_prefixes))]
    if unknown:
        raise UsageError(f"The checkpoint has {len(unknown)} unknown weights, such as {', '.join(unknown[:3])}.")


def text_encoder_start(
    state: Mapping[str, Tensor], config: QFormerConfig, *, cross_attention: bool = False
) -> tuple[State, State]:
    """Q-Former and ITG-head weights to start from, taken from a BERT-style text encoder's state dict.

    Self-attention, embeddings and the feed-forward, which both queries and text start from (released code).
    With `cross_attention`, BLIP's cross-attention of the same layers too, which the paper draws at random.
    Vocabularies may differ in length: the rows both have are given. Second: the head's weights, where there
    are any. UsageError where the state holds no such encoder of the config's depth.
    """
    prefix = find_text_encoder(state)
    table = {"embeddings.word_embeddings.weight": ["word_embedding.weight"]}
    table["embeddings.position_embeddings.weight"] = ["position_embedding.weight"]
    table |= {theirs: [ours] for ours, theirs in pair("embedding_norm", "embeddings.LayerNorm").items()}
    for index in range(config.depth):
        layer, theirs = f"layers.{index}", f"encoder.layer.{index}"
        copied = _attention(f"{layer}.self", f"{theirs}.attention", "self")
        if cross_attention and config.attends_to_image(index):
            copied |= _attention(f"{layer}.cross", f"{theirs}.crossattention", "self")
        copied |= _feed_forward(f"{layer}.query", theirs, "") | _feed_forward(f"{layer}.text", theirs, "")
        for ours, name in copied.items():
            table.setdefault(name, []).append(ours)
    missing = sorted(name for name in table if prefix + name not in state)
    if missing:
        raise UsageError(f"The text encoder lacks {len(missing)} weights, such as {prefix}{missing[0]}.")
    start = {ours: state[prefix + name] for name, targets in table.items() for ours in targets}
    return start, head_start(state)


def find_text_encoder(state: Mapping[str, Tensor]) -> str:
    """The prefix of a BERT-style text encoder's keys; UsageError where there is none."""
    for prefix in TEXT_ENCODER_PREFIXES:
        if f"{prefix}encoder.layer.0.attention.self.query.weight" in state:
            return prefix
    raise UsageError("The checkpoint holds no BERT-style text encoder. Give a folder of BERT or of a BLIP model.")


def blip2_config(
    vision: ViTConfig,
    qformer: QFormerConfig,
    *,
    embed_dim: int = 256,
    text_config: Any = None,
    image_token_id: int | None = None,
) -> Blip2Config:
    """transformers' configuration of the same sizes; `text_config` is the language model's (stage 2)."""
    return Blip2Config(
        vision_config={
            "hidden_size": vision.width, "intermediate_size": vision.mlp_width,
            "num_hidden_layers": vision.depth, "num_attention_heads": vision.num_heads,
            "image_size": vision.image_size_px, "patch_size": vision.patch_size_px,
            "layer_norm_eps": vision.layer_norm_eps, "hidden_act": "gelu", "qkv_bias": True,
        },
        qformer_config={
            "vocab_size": qformer.vocab_size, "hidden_size": qformer.width,
            "num_hidden_layers": qformer.depth,
            "num_attention_heads": qformer.num_heads, "intermediate_size": qformer.mlp_width,
            "max_position_embeddings": qformer.max_positions, "layer_norm_eps": qformer.layer_norm_eps,
            "hidden_dropout_prob": qformer.dropout, "attention_probs_dropout_prob": 0.0,
            "pad_token_id": qformer.pad_token_id, "cross_attention_frequency": qformer.cross_attention_every,
            "encoder_hidden_size": qformer.vision_width, "use_qformer_text_input": qformer.with_text,
        },
        num_query_tokens=qformer.num_queries,
        image_text_hidden_size=embed_dim,
        image_token_index=image_token_id,
        **({} if text_config is None else {"text_config": text_config}),
    )  # fmt: skip


def vision_sizes(config: Any) -> ViTConfig:
    """The image encoder's sizes of a `vision_config` (the same in BLIP and BLIP-2)."""
    return ViTConfig(
        image_size_px=config.image_size, patch_size_px=config.patch_size, width=config.hidden_size,
        depth=config.num_hidden_layers, num_heads=config.num_attention_heads,
        mlp_width=config.intermediate_size, layer_norm_eps=config.layer_norm_eps,
    )  # fmt: skip


def sizes_from_config(config: Blip2Config) -> tuple[ViTConfig, QFormerConfig]:
    """Our sizes of a transformers configuration; UsageError for an activation that is not ours."""
    vision: Any = config.vision_config
    qformer: Any = config.qformer_config
    for part in (vision, qformer):
        if part.hidden_act != "gelu":
            raise UsageError(f"{part.model_type} uses {part.hidden_act!r}; expected 'gelu', as BLIP-2's models have.")
    return (
        vision_sizes(vision),
        QFormerConfig(
            num_queries=config.num_query_tokens, width=qformer.hidden_size, depth=qformer.num_hidden_layers,
            num_heads=qformer.num_attention_heads, mlp_width=qformer.intermediate_size,
            vision_width=vision.hidden_size, cross_attention_every=qformer.cross_attention_frequency,
            with_text=qformer.use_qformer_text_input, vocab_size=qformer.vocab_size,
            max_positions=qformer.max_position_embeddings, layer_norm_eps=qformer.layer_norm_eps,
            dropout=qformer.hidden_dropout_prob, pad_token_id=qformer.pad_token_id or 0,
        ),
    )  # fmt: skip


def head_start(state: Mapping[str, Tensor]) -> State:
    """Weights of BERT's masked-language or BLIP's captioning head as those of `LanguageModelHead`."""
    names = {
        **pair("transform", "predictions.transform.dense"),
        **pair("norm", "predictions.transform.LayerNorm"),
        "vocabulary.bias": "predictions.bias",
    }
    for prefix in ("cls.", "text_decoder.cls."):
        found = {ours: state[prefix + name] for ours, name in names.items() if prefix + name in state}
        if len(found) == len(names):
            return found
    return {}


def _attention(ours: str, theirs: str, inner: str) -> dict[str, str]:
    """`{ours}_attention` and `{ours}_norm` → BERT's layout, whose inner part is called `inner`."""
    names = pair(f"{ours}_attention.output", f"{theirs}.output.dense")
    names |= pair(f"{ours}_norm", f"{theirs}.output.LayerNorm")
    for part in ("query", "key", "value"):
        names |= pair(f"{ours}_attention.{part}", f"{theirs}.{inner}.{part}")
    return names


def _feed_forward(ours: str, theirs: str, suffix: str) -> dict[str, str]:
    return {
        **pair(f"{ours}_feed_forward.fc1", f"{theirs}.intermediate{suffix}.dense"),
        **pair(f"{ours}_feed_forward.fc2", f"{theirs}.output{suffix}.dense"),
        **pair(f"{ours}_norm", f"{theirs}.output{suffix}.LayerNorm"),
    }


def _refuse_odd_keys(found: Iterable[str], expected: Iterable[str], what: str) -> None:
    odd = sorted(set(found) ^ set(expected))
    if odd:
        raise ValueError(f"{what} and the table of names differ in {len(odd)} keys, such as {odd[0]!r}")
