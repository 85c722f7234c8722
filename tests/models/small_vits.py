"""Small random Vision Transformers, and an ALBEF in the original's layout, made without our code."""

from __future__ import annotations

import tempfile
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import BertConfig, BertForMaskedLM, BertModel

TEXT_DEPTH, FUSION_DEPTH = 2, 2


def build_timm(seed: int = 0, image_size_px: int = 32) -> Any:
    """timm's ViT with weights that matter, in eval mode."""
    torch.manual_seed(seed)
    model = timm.create_model(
        "deit_base_patch16_224", img_size=image_size_px, patch_size=8, embed_dim=64, depth=2, num_heads=1
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn_like(parameter))
    return model


def saved_state(model: Any) -> dict[str, Tensor]:
    """A transformers model's weights as its file has them, which may be other names than in memory."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return load_file(f"{folder}/model.safetensors")


def build_original_albef(
    vocab_size: int, *, seed: int = 0, momentum: bool = True, queue_size: int = 8
) -> dict[str, Tensor]:
    """The state dict of an ALBEF as the release has it: timm's ViT, BERT with cross-attention in its last layers."""
    torch.manual_seed(seed)
    config = _bert_config(vocab_size, TEXT_DEPTH + FUSION_DEPTH, is_fusion=True)
    state: dict[str, Tensor] = {"temp": torch.tensor(0.05)}
    for suffix in ("", "_m") if momentum else ("",):
        vision = {n: t for n, t in build_timm(seed).state_dict().items() if not n.startswith("head.")}
        bert = dict(BertForMaskedLM(config).state_dict())
        bert["bert.embeddings.position_ids"] = torch.arange(40)[None]
        bert["cls.predictions.bias"] = torch.randn(vocab_size)
        bert["cls.predictions.decoder.bias"] = bert["cls.predictions.bias"].clone()
        bert["cls.predictions.decoder.weight"] = bert["bert.embeddings.word_embeddings.weight"].clone()
        for name in list(bert):
            layer = name.removeprefix("bert.encoder.layer.").split(".")[0]
            if "crossattention" in name and int(layer) < TEXT_DEPTH:
                del bert[name]
        state |= {f"visual_encoder{suffix}.{name}": tensor for name, tensor in vision.items()}
        state |= {f"text_encoder{suffix}.{name}": tensor for name, tensor in bert.items()}
        heads = {"vision_proj": 24, "text_proj": 24, **({} if suffix else {"itm_head": 2})}
        for name, width in heads.items():
            state[f"{name}{suffix}.weight"], state[f"{name}{suffix}.bias"] = torch.randn(width, 64), torch.randn(width)
    if momentum:
        for name in ("image_queue", "text_queue"):
            state[name] = torch.nn.functional.normalize(torch.randn(24, queue_size), dim=0)
        state["queue_ptr"] = torch.tensor([3])
    return {name: tensor.detach().clone() for name, tensor in state.items()}


def build_their_encoders(state: dict[str, Tensor]) -> tuple[Any, Any]:
    """transformers' text encoder (a `BertModel`) and fusion encoder (a `BertEncoder`) with the weights of a release."""
    prefix = "text_encoder.bert."
    whole = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    vocab_size = len(whole["embeddings.word_embeddings.weight"])
    text = BertModel(_bert_config(vocab_size, TEXT_DEPTH, is_fusion=False), add_pooling_layer=False).eval()
    missing, _ = text.load_state_dict({n: t for n, t in whole.items() if "position_ids" not in n}, strict=False)
    assert not missing
    fusion = BertModel(_bert_config(vocab_size, FUSION_DEPTH, is_fusion=True), add_pooling_layer=False).eval().encoder
    layers = {}
    for name, tensor in whole.items():
        if name.startswith("encoder.layer."):
            number, _, rest = name.removeprefix("encoder.layer.").partition(".")
            layers[f"layer.{int(number) - TEXT_DEPTH}.{rest}"] = tensor
    fusion.load_state_dict({name: tensor for name, tensor in layers.items() if not name.startswith("layer.-")})
    return text, fusion


def _bert_config(vocab_size: int, depth: int, *, is_fusion: bool) -> BertConfig:
    return BertConfig(
        vocab_size=vocab_size, hidden_size=64, num_hidden_layers=depth, num_attention_heads=1, intermediate_size=96,
        max_position_embeddings=40, is_decoder=is_fusion, add_cross_attention=is_fusion, initializer_range=0.1,
    )  # fmt: skip
