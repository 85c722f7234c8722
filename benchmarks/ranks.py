"""Memory of a rank at the papers' sizes, on paper: what of it is weights, gradients and optimizer state.

    python -m benchmarks.ranks

In: nothing. Out: the table of README.md. Weights are counted in modules without memory. A trained weight takes 16
bytes: itself, its gradient and AdamW's two moments in float32; a momentum encoder's 4; what is frozen 2, in bfloat16.
Copies (DDP) hold all of it on every rank; with `--sharding full` (FSDP) all but the frozen image encoder is dealt out.
What a batch takes (features, and what backward needs of them) comes on top; `--batch-size` and `--recompute` lower it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from capfilt.models.blip import Blip
from capfilt.models.blip2 import Stage1
from capfilt.models.med import MEDConfig
from capfilt.models.momentum import MomentumConfig
from capfilt.models.qformer import QFormer, QFormerConfig
from capfilt.models.shapes import shapes_only
from capfilt.models.vit import VisionTransformer, ViTConfig

TRAINED_BYTES, MOMENTUM_BYTES, FROZEN_BYTES = 16, 4, 2
NUM_RANKS = (8, 16, 128)
VIT_B = ViTConfig(image_size_px=224)
VIT_L = ViTConfig(image_size_px=224, width=1024, depth=24, num_heads=16, mlp_width=4096)
CLIP_VIT_L = ViTConfig(
    image_size_px=224, patch_size_px=14, width=1024, depth=23, num_heads=16, mlp_width=4096, norm_first=True
)
EVA_VIT_G = ViTConfig(image_size_px=224, patch_size_px=14, width=1408, depth=39, num_heads=16, mlp_width=6144)
LLMS = {
    "OPT-2.7B": ("opt", {"hidden_size": 2560, "ffn_dim": 10240, "num_hidden_layers": 32, "num_attention_heads": 32}),
    "OPT-6.7B": ("opt", {"hidden_size": 4096, "ffn_dim": 16384, "num_hidden_layers": 32, "num_attention_heads": 32}),
    "FlanT5-XL": ("t5", {"d_model": 2048, "d_ff": 5120, "num_layers": 24, "num_heads": 32}),
    "FlanT5-XXL": ("t5", {"d_model": 4096, "d_ff": 10240, "num_layers": 24, "num_heads": 64}),
}
"""The released sizes."""


@dataclass(frozen=True)
class Need:
    """Weights of a training."""

    name: str
    trained: int
    momentum: int = 0
    encoder: int = 0
    """Frozen, whole on every rank."""
    llm: int = 0
    """Frozen, dealt out with the rest."""

    def copies_gb(self) -> float:
        """A rank's, all of it."""
        frozen = FROZEN_BYTES * (self.encoder + self.llm)
        return (TRAINED_BYTES * self.trained + MOMENTUM_BYTES * self.momentum + frozen) / 1e9

    def shared_gb(self, num_ranks: int) -> float:
        """A rank's share, and the image encoder."""
        whole = FROZEN_BYTES * self.encoder / 1e9
        return (self.copies_gb() - whole) / num_ranks + whole

    def row(self) -> str:
        """Of the table."""
        frozen = self.encoder + self.llm
        weights = [f"{num / 1e6:,.0f}M" if num else "" for num in (self.trained, frozen)]
        gigabytes = [self.copies_gb(), *(self.shared_gb(num) for num in NUM_RANKS)]
        cells = [self.name, *weights, *(f"{one:.1f}" for one in gigabytes)]
        return f"| {' | '.join(cells)} |"


def count(module: nn.Module) -> int:
    """Weights, each once."""
    return sum(parameter.numel() for parameter in module.parameters())


def blip(name: str, vit: ViTConfig) -> Need:
    """Pre-training with momentum encoders."""
    with shapes_only():
        model = Blip(VisionTransformer(vit), MEDConfig(vision_width=vit.width))
        trained = count(model)
        model.start_momentum(MomentumConfig())
    return Need(name, trained, momentum=count(model) - trained)


def stage1(name: str, vit: ViTConfig) -> Need:
    """The Q-Former with its text side, on a frozen image encoder."""
    with shapes_only():
        return Need(name, count(Stage1(QFormerConfig(vision_width=vit.width))), encoder=count(VisionTransformer(vit)))


def stage2(llm: str, vit: ViTConfig) -> Need:
    """The Q-Former and its projection, on a frozen image encoder and language model."""
    kind, sizes = LLMS[llm]
    with shapes_only():
        qformer = QFormer(QFormerConfig(vision_width=vit.width, with_text=False))
        width = sizes.get("hidden_size", sizes.get("d_model", 0))
        trained = count(qformer) + count(nn.Linear(qformer.config.width, width)) + 2 * vit.width
        encoder = count(VisionTransformer(vit))
    with torch.device("meta"):
        return Need(f"stage 2, ViT-g, {llm}", trained, encoder=encoder, llm=count(_llm(kind, sizes)))


def _llm(kind: str, sizes: dict[str, Any]) -> nn.Module:
    from transformers import OPTConfig, OPTForCausalLM, T5Config, T5ForConditionalGeneration

    if kind == "opt":
        return OPTForCausalLM(OPTConfig(word_embed_proj_dim=sizes["hidden_size"], **sizes))
    gated = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "d_kv": 64, "vocab_size": 32128}
    return T5ForConditionalGeneration(T5Config(**gated, **sizes))


def needs() -> list[Need]:
    """Of every row."""
    return [
        blip("BLIP, ViT-B", VIT_B), blip("BLIP, ViT-L", VIT_L), stage1("stage 1, CLIP ViT-L/14", CLIP_VIT_L),
        stage1("stage 1, EVA ViT-g/14", EVA_VIT_G), *(stage2(llm, EVA_VIT_G) for llm in LLMS),
    ]  # fmt: skip


def main() -> None:
    """Print the table."""
    ranks = " | ".join(f"{num} ranks" for num in NUM_RANKS)
    print(f"| training | trained | frozen | copies | {ranks} |")
    print("|---|---|---|---|" + "---|" * len(NUM_RANKS))
    for need in needs():
        print(need.row())


if __name__ == "__main__":
    main()
