"""BLIP models on disk for training: folders in transformers' layout, read into our modules and written from them.

In: a folder with config.json, model.safetensors, preprocessor and tokenizer. Out: the same.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from capfilt.models.convert_blip import (
    Kind,
    config_from_sizes,
    from_transformers,
    sizes_from_config,
    to_transformers,
)
from capfilt.models.med import Captioner, Filter
from capfilt.models.vit import VisionTransformer
from capfilt.train.pretrained import (
    ImagePreparation,
    load_tokenizer,
    read_config,
    read_preparation,
    read_weights,
)


@dataclass(frozen=True)
class SavedBlip:
    """A captioner or a filter with what prepares its inputs."""

    model: Captioner | Filter
    tokenizer: Any
    preparation: ImagePreparation


def load_blip(folder: Path, kind: Kind) -> SavedBlip:
    """A captioner or filter from a folder in transformers' layout, in float32.

    Raises UsageError naming every missing and unknown key, or the file that is lacking.
    """
    vit, med, embed_dim = sizes_from_config(read_config(folder))
    vision = VisionTransformer(vit)
    model = Captioner(vision, med) if kind == "captioner" else Filter(vision, med, embed_dim=embed_dim)
    state = {name: tensor.float() for name, tensor in read_weights(folder).items()}
    model.load_state_dict(from_transformers(state, kind, vision_depth=vit.depth, text_depth=med.depth))
    return SavedBlip(model, load_tokenizer(folder), read_preparation(folder))


def save_blip(
    folder: Path,
    kind: Kind,
    model: Captioner | Filter,
    side: SavedBlip,
    *,
    prompt: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write a folder that plain transformers opens; `prompt` is what the captioner was trained to continue."""
    folder.mkdir(parents=True, exist_ok=True)
    text = model.decoder if isinstance(model, Captioner) else model.encoder
    vit, med = model.vision.config, text.config
    embed_dim = model.text_projection.out_features if isinstance(model, Filter) else 256
    config = config_from_sizes(kind, vit, med, embed_dim=embed_dim) | {"dtype": str(dtype).removeprefix("torch.")}
    if prompt is not None:
        config["capfilt_prompt"] = prompt
    _write_json(folder / "config.json", config)
    _write_json(folder / "preprocessor_config.json", _preprocessor(side.preparation))
    side.tokenizer.save_pretrained(folder)
    state = to_transformers(model.state_dict(), kind, vision_depth=vit.depth, text_depth=med.depth)
    tensors = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in state.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _preprocessor(preparation: ImagePreparation) -> dict[str, Any]:
    side = preparation.image_size_px
    return {
        "image_processor_type": "BlipImageProcessor", "processor_class": "BlipProcessor",
        "do_convert_rgb": True, "do_resize": True, "size": {"height": side, "width": side}, "resample": 3,
        "do_rescale": True, "rescale_factor": 1 / 255,
        "do_normalize": True, "image_mean": list(preparation.mean), "image_std": list(preparation.std),
    }  # fmt: skip


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
