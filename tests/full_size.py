"""Models of the released sizes with random weights, in the published layouts: what users really load.

Out: BLIP-base as captioner and as ITM filter (transformers folders, 384 px, the real vocabulary of BERT) and a
checkpoint of open_clip's ViT-L-14; 3.5 GB in all. Captions are nonsense and scores mean nothing; sizes,
shapes, files and vocabulary are the real ones.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests import factories

CLIP_NAME = "ViT-L-14"


def blip_base_config() -> Any:
    """The sizes in config.json of Salesforce/blip-image-captioning-base and blip-itm-base-coco."""
    from transformers import BlipConfig

    text = {
        "vocab_size": 30524, "hidden_size": 768, "encoder_hidden_size": 768, "intermediate_size": 3072,
        "num_hidden_layers": 12, "num_attention_heads": 12, "max_position_embeddings": 512,
        "bos_token_id": 30522, "pad_token_id": 0, "sep_token_id": 102, "eos_token_id": 2, "initializer_range": 0.02,
    }  # fmt: skip
    vision = {
        "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
        "image_size": 384, "patch_size": 16, "layer_norm_eps": 1e-5,
        "initializer_range": 0.02,  # transformers' own default is 1e-10: every image would look alike
    }  # fmt: skip
    return BlipConfig(text_config=text, vision_config=vision, image_text_hidden_size=256, initializer_range=0.02)


def save_captioner(folder: Path) -> None:
    """BLIP-base's captioner: 224 million weights, the head tied to the embeddings."""
    vocabulary = factories.read_bert_vocabulary()
    model = factories.save_captioner(folder, config=blip_base_config(), end_bias=10.0)
    assert model.num_parameters() == 223_971_644
    factories.save_tokenizer(folder, vocabulary)


def save_filter(folder: Path) -> None:
    """BLIP-base's ITM filter: 224 million weights."""
    vocabulary = factories.read_bert_vocabulary()
    model = factories.save_filter(folder, config=blip_base_config())
    assert model.num_parameters() == 223_744_258
    factories.save_tokenizer(folder, vocabulary)


@torch.no_grad()
def save_clip(path: Path) -> None:
    """The checkpoint of open_clip's ViT-L-14, 428 million weights, as `--clip-weights` takes it."""
    import open_clip
    from safetensors.torch import save_file

    torch.manual_seed(0)
    model = open_clip.create_model(CLIP_NAME)
    assert sum(parameter.numel() for parameter in model.parameters()) == 427_616_513
    model.token_embedding.weight.mul_(20)  # texts differ
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, path)
