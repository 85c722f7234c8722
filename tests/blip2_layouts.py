"""Random BLIP-2 models of transformers and their published layouts: LAVIS's .pth, and folders as on the hub.

The names of LAVIS's layout are made here by replacing parts of transformers' names, the way its released conversion
goes, and not by capfilt's tables.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Blip2Config, Blip2ForConditionalGeneration, Blip2ForImageTextRetrieval, Blip2VisionModel

State = dict[str, Tensor]
EVA_WIDTH, QFORMER_WIDTH, IMAGE_PX = 88, 64, 32


def blip2_config(vocab_size: int = 60, text_config: Any = None, depth: int = 3) -> Blip2Config:
    """Small sizes that LAVIS's heads divide: 88 wide in the image encoder, 64 in the Q-Former."""
    return Blip2Config(
        vision_config={
            "hidden_size": EVA_WIDTH, "intermediate_size": 112, "num_hidden_layers": depth, "num_attention_heads": 1,
            "image_size": IMAGE_PX, "patch_size": 8, "initializer_range": 0.1,
        },
        qformer_config={
            "vocab_size": vocab_size, "hidden_size": QFORMER_WIDTH, "num_hidden_layers": 3, "num_attention_heads": 1,
            "intermediate_size": 96, "max_position_embeddings": 40, "use_qformer_text_input": text_config is None,
            "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
        },
        num_query_tokens=4, image_text_hidden_size=16,
        **({} if text_config is None else {"text_config": text_config}),
    )  # fmt: skip


def build_itm(vocab_size: int = 60) -> Any:
    """A random `Blip2ForImageTextRetrieval`."""
    torch.manual_seed(5)
    return _lively(Blip2ForImageTextRetrieval(blip2_config(vocab_size)))


def build_generation(text_config: Any, image_token_id: int) -> Any:
    """A random `Blip2ForConditionalGeneration` around a language model of this configuration."""
    torch.manual_seed(6)
    config = blip2_config(text_config=text_config)
    config.image_token_index = image_token_id
    return _lively(Blip2ForConditionalGeneration(config))


def build_vision(depth: int = 3) -> Any:
    """A random `Blip2VisionModel`."""
    torch.manual_seed(7)
    return _lively(Blip2VisionModel(blip2_config(depth=depth).vision_config))


@torch.no_grad()
def _lively(model: Any) -> Any:
    for name, parameter in model.named_parameters():
        if "language_model" in name:
            continue
        if name.endswith("norm.weight") or "layer_norm" in name and name.endswith("weight"):
            parameter.copy_(1 + 0.2 * torch.randn_like(parameter))
        else:
            parameter.copy_(0.15 * torch.randn_like(parameter))
        if name.endswith("qkv.bias"):  # EVA's keys have none
            third = len(parameter) // 3
            parameter[third : 2 * third] = 0.0
    return model.eval()


def eva_state(vision: State, prefix: str = "") -> State:
    """EVA-CLIP's layout of a `Blip2VisionModel`'s weights; the norm behind the last block is left out."""
    found = {}
    for name, tensor in vision.items():
        if name.startswith("post_layernorm"):
            continue
        for theirs, lavis in (
            ("embeddings.class_embedding", "cls_token"), ("embeddings.position_embedding", "pos_embed"),
            ("embeddings.patch_embedding", "patch_embed.proj"), ("encoder.layers", "blocks"),
            ("layer_norm", "norm"), ("self_attn.projection", "attn.proj"), ("self_attn", "attn"),
        ):  # fmt: skip
            name = name.replace(theirs, lavis)
        if name.endswith("qkv.bias"):
            queries, _, values = tensor.chunk(3)
            found[prefix + name.replace("qkv.bias", "q_bias")] = queries.clone()
            found[prefix + name.replace("qkv.bias", "v_bias")] = values.clone()
        else:
            found[prefix + name] = tensor.clone()
    return found


def lavis_state(theirs: State, *, llm: str | None = None, with_vision: bool = True) -> State:
    """LAVIS's layout of a BLIP-2's weights; `llm` is opt or t5 in stage 2. The language model is left out."""
    vision = {k.removeprefix("vision_model."): v for k, v in theirs.items() if k.startswith("vision_model.")}
    found = eva_state(vision, "visual_encoder.") if with_vision else {}
    for kind in ("weight", "bias"):
        found[f"ln_vision.{kind}"] = vision[f"post_layernorm.{kind}"]
    for name, tensor in theirs.items():
        if name.startswith(("vision_model.", "language_model.")):
            continue
        name = name.replace("attention.attention", "attention.self").replace("qformer.layernorm", "qformer.LN")
        for old, new in (
            ("embeddings.", "Qformer.bert.embeddings."), ("qformer.LN", "Qformer.bert.embeddings.LayerNorm"),
            ("qformer.", "Qformer.bert."), ("vision_projection", "vision_proj"), ("text_projection", "text_proj"),
            ("language_projection", f"{llm}_proj"),
        ):  # fmt: skip
            if name.startswith(old):
                name = new + name.removeprefix(old)
                break
        found[name] = tensor.clone()
    if llm is None:
        found |= _stage1_only(found)
    return found


def _stage1_only(state: State) -> State:
    """Temperature and ITG's head, tied weights twice, as a LAVIS state dict has them, and BERT's buffer."""
    words = state["Qformer.bert.embeddings.word_embeddings.weight"]
    width, head, bias = words.shape[1], "Qformer.cls.predictions", torch.randn(len(words))
    return {
        "temp": torch.tensor(0.05),
        f"{head}.transform.dense.weight": torch.randn(width, width), f"{head}.transform.dense.bias": torch.randn(width),
        f"{head}.transform.LayerNorm.weight": torch.randn(width),
        f"{head}.transform.LayerNorm.bias": torch.randn(width),
        f"{head}.bias": bias, f"{head}.decoder.weight": words.clone(), f"{head}.decoder.bias": bias.clone(),
        "Qformer.bert.embeddings.position_ids": torch.arange(40)[None],
    }  # fmt: skip


def save_pth(path: Path, state: State) -> Path:
    """As LAVIS's runner saves: under `model`, beside the rest of a training."""
    torch.save({"model": state, "epoch": 0}, path)
    return path
