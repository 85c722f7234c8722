"""A random stage-2 BLIP-2 of a few thousand weights, in transformers' layout."""

from __future__ import annotations

from pathlib import Path

import torch

from capfilt.models.blip2 import Stage2
from capfilt.models.qformer import QFormerConfig
from capfilt.train.saved import save_stage2
from capfilt.weights.image_encoders import load_image_encoder
from capfilt.weights.llms import load_llm
from tests.train import small_models


def save_blip2(folder: Path, family: str) -> Path:
    """With an OPT or a T5 (`family`); its texts differ from image to image."""
    parts = folder.parent / f"{folder.name}-parts"
    encoder = load_image_encoder(str(small_models.save_blip(parts / "blip")), torch.device("cpu"))
    save = {"opt": small_models.save_opt, "t5": small_models.save_t5}[family]
    llm = load_llm(str(save(parts / family)))
    torch.manual_seed(4)
    config = QFormerConfig(
        num_queries=4, width=32, depth=2, num_heads=4, mlp_width=64, vision_width=48, with_text=False, dropout=0.0
    )
    stage = Stage2(config, llm)
    with torch.no_grad():
        for name, parameter in stage.qformer.named_parameters():
            if parameter.ndim > 1:
                parameter.mul_(8.0 if "query" not in name else 1.0)
        stage.projection.weight.mul_(30.0)
        for name, parameter in llm.model.named_parameters():
            if "EncDecAttention" in name:  # T5 looks at the image
                parameter.mul_(4.0)
    folder.mkdir(parents=True)
    save_stage2(folder, encoder, stage)
    return folder
