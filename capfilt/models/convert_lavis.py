"""BLIP-2 as LAVIS published it: names and sizes of a .pth's weights → transformers'.

In: the state dict of stage 1 (`blip2_pretrained.pth`) or stage 2 (`blip2_pretrained_opt2.7b.pth`, `…_flant5xl.pth`).
Out: the same weights by the names of transformers' layout, sizes read off their shapes. The image encoder
(`visual_encoder.…`) is another module's (`capfilt.models.convert_image_encoders`). Strict: an error names every key
that is missing or unknown.

    query_tokens, ln_vision.*, Qformer.bert.*       both stages; in stage 2 without the text side
    Qformer.cls.*, vision_proj.*, text_proj.*,
    itm_head.*, temp                                stage 1
    opt_proj.*, t5_proj.*                           stage 2
    opt_model.*, t5_model.*                         left out: frozen in training, so it is the language model itself
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from capfilt.errors import UsageError
from capfilt.models.convert_blip2 import State, stage1_names, stage2_names
from capfilt.models.qformer import QFormerConfig
from capfilt.models.weight_names import refuse_odd_keys

HEAD_WIDTH = 64
"""Width of an attention head of BERT, from which every Q-Former was made; the .pth does not say."""

LLM_PROJECTIONS = {"opt_proj": "opt", "t5_proj": "t5"}
"""Projection of stage 2 → the family of its language model."""

_VISION = "visual_encoder."
_LLMS = ("opt_model.", "t5_model.")
_POSITION_IDS = "Qformer.bert.embeddings.position_ids"
_HEAD = "Qformer.cls.predictions"
_EXTRA = {
    "temperature": "temp",
    "lm_head.transform.weight": f"{_HEAD}.transform.dense.weight",
    "lm_head.transform.bias": f"{_HEAD}.transform.dense.bias",
    "lm_head.norm.weight": f"{_HEAD}.transform.LayerNorm.weight",
    "lm_head.norm.bias": f"{_HEAD}.transform.LayerNorm.bias",
    "lm_head.vocabulary.bias": f"{_HEAD}.bias",
}
"""What transformers' layout has no room for, ours → theirs."""
_TIED = {
    f"{_HEAD}.decoder.weight": "Qformer.bert.embeddings.word_embeddings.weight",
    f"{_HEAD}.decoder.bias": f"{_HEAD}.bias",
}
"""Stored twice."""


@dataclass(frozen=True)
class LavisBlip2:
    """A BLIP-2 without its image encoder and language model."""

    qformer: QFormerConfig
    state: State
    """By transformers' names."""
    extra: State
    """Stage 1: temperature and head of ITG, by our names."""
    embed_dim: int
    """Stage 1: width of ITC's embeddings."""
    llm_family: str | None
    """Stage 2: `opt` or `t5`; None for stage 1."""


def from_lavis(state: Mapping[str, Tensor]) -> LavisBlip2:
    """What a .pth of LAVIS's BLIP-2 holds besides image encoder and language model.

    Raises UsageError naming every missing and unknown key, and a tied weight that differs from its copy.
    """
    left_out = (_VISION, *_LLMS, _POSITION_IDS)
    found = {name: tensor for name, tensor in state.items() if not name.startswith(left_out)}
    family = next((llm for name, llm in LLM_PROJECTIONS.items() if f"{name}.weight" in found), None)
    qformer = _sizes_of(found, with_text=family is None)
    if family is None:
        _drop_tied(found)
        names = {theirs: lavis_name(theirs) for theirs in stage1_names(qformer).values()}
        refuse_odd_keys(found, {*names.values(), *_EXTRA.values()}, "stage 1 of LAVIS's BLIP-2")
        extra = {ours: found[theirs] for ours, theirs in _EXTRA.items()}
    else:
        names = {theirs: lavis_name(theirs, family) for theirs in stage2_names(qformer).values()}
        refuse_odd_keys(found, names.values(), "stage 2 of LAVIS's BLIP-2")
        extra = {}
    renamed = {theirs: found[name] for theirs, name in names.items()}
    embed_dim = len(found["vision_proj.weight"]) if family is None else 0
    return LavisBlip2(qformer, renamed, extra, embed_dim, family)


def lavis_name(theirs: str, llm_family: str = "opt") -> str:
    """LAVIS's name of a weight of transformers' BLIP-2, image encoder and language model excepted."""
    module, _, rest = theirs.partition(".")
    if theirs.startswith("vision_model.post_layernorm."):
        return theirs.replace("vision_model.post_layernorm", "ln_vision")
    if theirs.startswith("qformer.layernorm."):
        return theirs.replace("qformer.layernorm", "Qformer.bert.embeddings.LayerNorm")
    if module == "qformer":
        return f"Qformer.bert.{rest}".replace("attention.attention.", "attention.self.")
    modules = {
        "embeddings": "Qformer.bert.embeddings", "vision_projection": "vision_proj", "text_projection": "text_proj",
        "language_projection": f"{llm_family}_proj",
    }  # fmt: skip
    return f"{modules[module]}.{rest}" if module in modules else theirs


def _sizes_of(state: Mapping[str, Tensor], *, with_text: bool) -> QFormerConfig:
    layer = "Qformer.bert.encoder.layer."
    needed = ["query_tokens", f"{layer}0.crossattention.self.key.weight", f"{layer}0.intermediate_query.dense.weight"]
    if with_text:
        needed += [f"Qformer.bert.embeddings.{kind}_embeddings.weight" for kind in ("word", "position")]
    if missing := [name for name in needed if name not in state]:
        raise UsageError(f"The file is no BLIP-2 of LAVIS's: it lacks {', '.join(missing)}. Give another .pth.")
    shapes = [state[name].shape for name in needed]
    (_, num_queries, width), (_, vision_width), (mlp_width, _) = shapes[:3]
    if width % HEAD_WIDTH:
        raise UsageError(f"The Q-Former's width is {width}; expected a multiple of {HEAD_WIDTH}, as BERT's is.")
    layers = {name.removeprefix(layer).split(".")[0] for name in state if name.startswith(layer)}
    crossing = sorted(int(number) for number in layers if f"{layer}{number}.crossattention.self.key.weight" in state)
    texts = {"vocab_size": shapes[3][0], "max_positions": shapes[4][0]} if with_text else {}
    return QFormerConfig(
        num_queries=num_queries, width=width, depth=len(layers), num_heads=width // HEAD_WIDTH, mlp_width=mlp_width,
        vision_width=vision_width, cross_attention_every=crossing[1] if len(crossing) > 1 else len(layers),
        with_text=with_text, **texts,
    )  # fmt: skip


def _drop_tied(state: State) -> None:
    for copy, source in _TIED.items():
        tensor = state.pop(copy, None)
        if tensor is not None and not (source in state and torch.equal(tensor, state[source])):
            raise UsageError(f"{copy} and {source} differ in this checkpoint; a Q-Former has them tied.")
