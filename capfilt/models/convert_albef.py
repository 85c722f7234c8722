"""Weights and sizes of ALBEF: ours ↔ the original release's .pth, and the start of its text side from BERT.

In: state dicts of one side. Out: those of the other. Strict: an error names every key that is missing or unknown, and
what is stored twice must be equal.

    ours      `Albef`, `MomentumAlbef` of `models.albef`
    original  visual_encoder.*, text_encoder.bert.* (layers of the text encoder, then those of the fusion encoder with
              crossattention), text_encoder.cls.predictions.*, vision_proj, text_proj, itm_head, temp; the momentum
              encoders by the same names with _m; image_queue, text_queue (features in columns), queue_ptr
    fine-tuned the original's for retrieval: text_encoder.* without bert, no text_encoder.cls, an idx_queue
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from capfilt.errors import UsageError
from capfilt.models.albef import AlbefConfig
from capfilt.models.convert_blip import ORIGINAL_HEAD_WIDTH, text_names
from capfilt.models.convert_blip2 import State, find_text_encoder, head_start
from capfilt.models.convert_vit import sizes_from_timm, timm_names
from capfilt.models.vit import ViTConfig
from capfilt.models.weight_names import count_layers, pair, refuse_odd_keys

QUEUE_KEYS = ("image_queue", "text_queue", "queue_ptr")
"""The queue of an original .pth."""

_TEXT = "text_encoder.bert"
_HEAD = "text_encoder.cls.predictions"
_MOMENTUM = re.compile(r"^(visual_encoder|text_encoder|vision_proj|text_proj)_m\.")
_FINE_TUNED = "text_encoder.embeddings.token_type_embeddings.weight"  # BLIP's text encoder knows no token types
_IDX_QUEUE = "idx_queue"
_LEFT_OUT = f"{_TEXT}.embeddings.position_ids"  # a buffer: 0, 1, 2, …
_TIED = {
    f"{_HEAD}.decoder.weight": f"{_TEXT}.embeddings.word_embeddings.weight",
    f"{_HEAD}.decoder.bias": f"{_HEAD}.bias",
}
"""Stored twice in an original .pth."""


@dataclass(frozen=True)
class AlbefWeights:
    """What an original .pth holds, by our names."""

    model: State
    """Of `Albef`, the tied matrix of the head included."""
    temperature: Tensor
    """(1,)."""
    momentum: State | None
    """Of `MomentumAlbef`: model.* and queue.*; None where the file has none of it."""


def original_names(*, vision_depth: int, text_depth: int, fusion_depth: int) -> dict[str, str]:
    """Names of the weights of `Albef`, each once → the original's."""
    names = {f"vision.{ours}": f"visual_encoder.{theirs}" for ours, theirs in timm_names(vision_depth).items()}
    names |= text_names("text", _TEXT, text_depth + fusion_depth, first_cross_layer=text_depth)
    names["text.type_embedding.weight"] = f"{_TEXT}.embeddings.token_type_embeddings.weight"
    names |= pair("head.transform", f"{_HEAD}.transform.dense") | pair("head.norm", f"{_HEAD}.transform.LayerNorm")
    names["head.vocabulary.bias"] = f"{_HEAD}.bias"
    for ours, theirs in (("vision_projection", "vision_proj"), ("text_projection", "text_proj"), ("itm_head",) * 2):
        names |= pair(ours, theirs)
    return names


def is_original(names: Iterable[str]) -> bool:
    """Whether these are the names of an original ALBEF's weights, from pre-training or fine-tuned for retrieval."""
    return any(name.startswith(f"{_TEXT}.") or name == _FINE_TUNED for name in names)


def as_pre_trained(state: Mapping[str, Tensor]) -> State:
    """The weights of one that was fine-tuned for retrieval by the names of pre-training; others as they are."""
    if _FINE_TUNED not in state:
        return dict(state)
    renamed = re.compile(r"^(text_encoder|text_encoder_m)\.")
    return {renamed.sub(r"\1.bert.", key): tensor for key, tensor in state.items() if key != _IDX_QUEUE}


def has_head(state: Mapping[str, Tensor]) -> bool:
    """Whether the head of MLM is among an original's weights; fine-tuning leaves it out."""
    return any(key.startswith("text_encoder.cls.") for key in state)


def from_original(
    state: Mapping[str, Tensor], *, vision_depth: int, text_depth: int, fusion_depth: int, with_head: bool = True
) -> AlbefWeights:
    """Our weights of an original .pth (its `model` entry), those of its momentum encoders and queue if it has them.

    Raises UsageError naming every missing and unknown key, and what should be equal but is not.
    """
    names = original_names(vision_depth=vision_depth, text_depth=text_depth, fusion_depth=fusion_depth)
    names = {ours: theirs for ours, theirs in names.items() if with_head or not ours.startswith("head.")}
    found = {key: tensor for key, tensor in state.items() if not _is_for_training(key)}
    slow = {_MOMENTUM.sub(r"\1.", key): tensor for key, tensor in state.items() if _MOMENTUM.match(key)}
    queue = {key: state[key] for key in QUEUE_KEYS if key in state}
    for part in (found, slow):
        part.pop(_LEFT_OUT, None)
        _drop_tied(part)
    slow_names = {ours: theirs for ours, theirs in names.items() if not ours.startswith("itm_head")}
    expected = {*names.values(), "temp"}
    if slow or queue:
        expected |= {_with_m(name) for name in slow_names.values()} | set(QUEUE_KEYS)
    refuse_odd_keys({*found, *map(_with_m, slow), *queue}, expected, "an ALBEF of these sizes")
    momentum = None
    if slow or queue:
        momentum = {f"model.{ours}": tensor for ours, tensor in _ours(slow, slow_names).items()}
        momentum |= {"queue.images": queue["image_queue"].T, "queue.texts": queue["text_queue"].T}
        momentum["queue.place"] = queue["queue_ptr"].reshape(())
    return AlbefWeights(_ours(found, names), found["temp"].reshape(1), momentum)


def to_original(weights: AlbefWeights, *, vision_depth: int, text_depth: int, fusion_depth: int) -> State:
    """An original .pth's `model` entry of ours; what the original stores twice is given twice."""
    names = original_names(vision_depth=vision_depth, text_depth=text_depth, fusion_depth=fusion_depth)
    theirs = _theirs(weights.model, names) | {"temp": weights.temperature.reshape(())}
    if weights.momentum is not None:
        slow = {name.removeprefix("model."): t for name, t in weights.momentum.items() if name.startswith("model.")}
        slow_names = {ours: their for ours, their in names.items() if not ours.startswith("itm_head")}
        theirs |= {_with_m(name): tensor for name, tensor in _theirs(slow, slow_names).items()}
        theirs["image_queue"] = weights.momentum["queue.images"].T.contiguous()
        theirs["text_queue"] = weights.momentum["queue.texts"].T.contiguous()
        theirs["queue_ptr"] = weights.momentum["queue.place"].reshape(1)
    return theirs


def without_copies(state: Mapping[str, Tensor]) -> State:
    """An original's state dict without what it stores twice or could count itself."""
    copies = {_LEFT_OUT, *_TIED}
    return {key: tensor for key, tensor in state.items() if _MOMENTUM.sub(r"\1.", key) not in copies}


def sizes_from_original(state: Mapping[str, Tensor]) -> tuple[ViTConfig, AlbefConfig, int]:
    """Our sizes (image, text, width of ITC's embedding) of an original .pth, read off its weights' shapes.

    Raises UsageError where weights lack that tell them.
    """
    needed = {
        "words": f"{_TEXT}.embeddings.word_embeddings.weight",
        "positions": f"{_TEXT}.embeddings.position_embeddings.weight",
        "mlp": f"{_TEXT}.encoder.layer.0.intermediate.dense.weight", "embedding": "text_proj.weight",
    }  # fmt: skip
    if missing := sorted(name for name in needed.values() if name not in state):
        raise UsageError(f"The .pth is no ALBEF from pre-training: it lacks {', '.join(missing)}. Give ALBEF.pth.")
    shapes = {part: state[name].shape for part, name in needed.items()}
    vit = sizes_from_timm(state, prefix="visual_encoder.")
    if shapes["words"][1] % ORIGINAL_HEAD_WIDTH:
        raise UsageError(f"The text's features have width {shapes['words'][1]}; expected a multiple of 64.")
    depth = count_layers(state, f"{_TEXT}.encoder.layer.")
    with_cross = [
        index for index in range(depth)
        if f"{_TEXT}.encoder.layer.{index}.crossattention.self.query.weight" in state
    ]  # fmt: skip
    if not with_cross or with_cross != list(range(with_cross[0], depth)) or with_cross[0] == 0:
        raise UsageError(
            f"Layers {with_cross} of {depth} attend to the image; expected the last ones, after a text encoder. "
            "Give ALBEF.pth of the release."
        )
    config = AlbefConfig(
        vocab_size=shapes["words"][0], width=shapes["words"][1], depth=depth, text_depth=with_cross[0],
        num_heads=shapes["words"][1] // ORIGINAL_HEAD_WIDTH, mlp_width=shapes["mlp"][0],
        max_positions=shapes["positions"][0], vision_width=vit.width, dropout=0.1,
    )  # fmt: skip
    return vit, config, shapes["embedding"][0]


def from_bert(state: Mapping[str, Tensor], config: AlbefConfig) -> State:
    """The weights of `Albef` that BERT gives: its first `depth` layers, embeddings, and the head of MLM if it has one.

    Cross-attention is not among them, nor anything of the image. UsageError where a layer lacks.
    """
    prefix = find_text_encoder(state)
    names = text_names("text", "", config.depth, first_cross_layer=config.depth)
    names["text.type_embedding.weight"] = ".embeddings.token_type_embeddings.weight"
    names = {ours: prefix + theirs.removeprefix(".") for ours, theirs in names.items()}
    if missing := sorted(set(names.values()) - state.keys()):
        raise UsageError(
            f"The BERT to start from lacks {len(missing)} weights of {config.depth} layers, such as {missing[0]}. Give "
            "one with as many layers (google-bert/bert-base-uncased: 12), or fewer --text-depth or --fusion-depth."
        )
    start = {ours: state[theirs] for ours, theirs in names.items()}
    return start | {f"head.{ours}": tensor for ours, tensor in head_start(state).items()}


def bert_config(config: AlbefConfig) -> dict[str, Any]:
    """Entries of a `BertConfig` that describe the text encoder."""
    return {
        "vocab_size": config.vocab_size, "hidden_size": config.width, "num_hidden_layers": config.text_depth,
        "num_attention_heads": config.num_heads, "intermediate_size": config.mlp_width, "hidden_act": "gelu",
        "max_position_embeddings": config.max_positions, "type_vocab_size": 2,
        "layer_norm_eps": config.layer_norm_eps, "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": 0.0, "pad_token_id": config.pad_token_id,
    }  # fmt: skip


def _is_for_training(key: str) -> bool:
    return _MOMENTUM.match(key) is not None or key in QUEUE_KEYS


def _with_m(name: str) -> str:
    """The name of a momentum encoder's weight."""
    module, _, rest = name.partition(".")
    return f"{module}_m.{rest}"


def _ours(state: Mapping[str, Tensor], names: Mapping[str, str]) -> State:
    ours = {own: state[theirs] for own, theirs in names.items()}
    if not any(own.startswith("head.") for own in names):
        return ours
    return ours | {"head.vocabulary.weight": ours["text.word_embedding.weight"]}


def _theirs(state: Mapping[str, Tensor], names: Mapping[str, str]) -> State:
    odd = sorted((state.keys() - {"head.vocabulary.weight"}) ^ names.keys())
    if odd:
        raise ValueError(f"our ALBEF and the table of names differ in {len(odd)} keys, such as {odd[0]!r}")
    theirs = {their: state[own] for own, their in names.items()}
    num_positions = len(state["text.position_embedding.weight"])
    copies = {copy: theirs[source] for copy, source in _TIED.items()}
    return theirs | copies | {_LEFT_OUT: torch.arange(num_positions)[None]}


def _drop_tied(state: State) -> None:
    for copy, source in _TIED.items():
        tensor = state.pop(copy, None)
        if tensor is not None and source not in state:
            state[source] = tensor
        elif tensor is not None and not torch.equal(tensor, state[source]):
            raise UsageError(f"{copy} and {source} differ in this checkpoint; an ALBEF has them tied.")
