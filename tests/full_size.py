"""Models of the released sizes with random weights, in the published layouts: what users really load.

Out: BLIP-base or BLIP-large as captioner and as ITM filter (transformers folders, 384 px, the real vocabulary of BERT)
and a checkpoint of open_clip's ViT-L-14; 3.5 GB in all for base, 5.3 GB for large. Captions are nonsense and scores
mean nothing; sizes, shapes, files and vocabulary are the real ones.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests import factories

CLIP_NAME = "ViT-L-14"


NUM_WEIGHTS = {
    ("captioner", "base"): 223_971_644, ("filter", "base"): 223_744_258,
    ("captioner", "large"): 446_290_492, ("filter", "large"): 446_128_642,
}  # fmt: skip
"""As the released checkpoints have them, the head tied to the embeddings."""


def blip_config(size: str = "base") -> Any:
    """The sizes in config.json of Salesforce/blip-image-captioning-base and -large, and of the ITM filters."""
    from transformers import BlipConfig

    width, depth, num_heads = {"base": (768, 12, 12), "large": (1024, 24, 16)}[size]
    text = {
        "vocab_size": 30524, "hidden_size": 768, "encoder_hidden_size": width, "intermediate_size": 3072,
        "num_hidden_layers": 12, "num_attention_heads": 12, "max_position_embeddings": 512,
        "bos_token_id": 30522, "pad_token_id": 0, "sep_token_id": 102, "eos_token_id": 2, "initializer_range": 0.02,
    }  # fmt: skip
    vision = {
        "hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": depth,
        "num_attention_heads": num_heads, "image_size": 384, "patch_size": 16, "layer_norm_eps": 1e-5,
        "initializer_range": 0.02,  # transformers' own default is 1e-10: every image would look alike
    }  # fmt: skip
    return BlipConfig(text_config=text, vision_config=vision, image_text_hidden_size=256, initializer_range=0.02)


def save_captioner(folder: Path, size: str = "base", *, end_bias: float = 10.0) -> None:
    """BLIP's captioner, base or large; the higher `end_bias`, the shorter its captions."""
    vocabulary = factories.read_bert_vocabulary()
    model = factories.save_captioner(folder, config=blip_config(size), end_bias=end_bias)
    assert model.num_parameters() == NUM_WEIGHTS["captioner", size]
    factories.save_tokenizer(folder, vocabulary)


def save_filter(folder: Path, size: str = "base") -> None:
    """BLIP's ITM filter, base or large."""
    vocabulary = factories.read_bert_vocabulary()
    model = factories.save_filter(folder, config=blip_config(size))
    assert model.num_parameters() == NUM_WEIGHTS["filter", size]
    factories.save_tokenizer(folder, vocabulary)


@torch.no_grad()
def save_clip(path: Path) -> Any:
    """The checkpoint of open_clip's ViT-L-14, 428 million weights, as `--clip-weights` takes it; gives the model."""
    import open_clip
    from safetensors.torch import save_file

    torch.manual_seed(0)
    model = open_clip.create_model(CLIP_NAME)
    assert sum(parameter.numel() for parameter in model.parameters()) == 427_616_513
    model.token_embedding.weight.mul_(20)  # texts differ
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, path)
    return model
