"""What a new model starts with: a Vision Transformer, and the sizes of a BERT.

In: settings, folders in transformers' layout. Out: modules and sizes, and what identifies the files that were read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from capfilt.errors import UsageError
from capfilt.models.vit import VisionTransformer, ViTConfig
from capfilt.settings import AlbefTrainSettings, BlipTrainSettings
from capfilt.weights.find import find_model_dir
from capfilt.weights.model_files import load_config
from capfilt.weights.vit import build_vision, load_vit_start


def new_vision(settings: BlipTrainSettings | AlbefTrainSettings, default_image_size_px: int) -> VisionTransformer:
    """The published ViT that the settings name, or one of their sizes.

    Raises UsageError for an image that patches do not fill, and what `load_vit_start` raises.
    """
    side = settings.image_size_px or default_image_size_px
    if settings.vision_init:
        return build_vision(load_vit_start(settings.vision_init, image_size_px=side))
    if side % settings.patch_size_px:
        raise UsageError(f"image_size_px is {side}; expected a multiple of the patch, {settings.patch_size_px}.")
    sizes = ViTConfig(
        image_size_px=side, patch_size_px=settings.patch_size_px, width=settings.vision_width,
        depth=settings.vision_depth, num_heads=settings.vision_width // settings.head_width,
        mlp_width=4 * settings.vision_width,
    )  # fmt: skip
    return VisionTransformer(sizes)


def find_bert(name: str) -> Path:
    """The folder of a BERT; UsageError where there is none."""
    return find_model_dir(name, "BERT to start from", embedded=None)


def bert_sizes(folder: Path) -> dict[str, Any]:
    """width, depth, num_heads, mlp_width, max_positions and layer_norm_eps of a BERT, or of a BLIP's text encoder.

    UsageError for a model of another kind.
    """
    config = _text_config(folder)
    if (activation := getattr(config, "hidden_act", None)) != "gelu":
        raise UsageError(f"{folder} uses {activation!r}; expected 'gelu', as BERT has. Give a BERT.")
    try:
        return {
            "width": config.hidden_size, "depth": config.num_hidden_layers, "num_heads": config.num_attention_heads,
            "mlp_width": config.intermediate_size, "max_positions": config.max_position_embeddings,
            "layer_norm_eps": config.layer_norm_eps,
        }  # fmt: skip
    except AttributeError as error:
        raise UsageError(f"{folder}/config.json is no BERT's ({error}). Give a BERT.") from None


def _text_config(folder: Path) -> Any:
    """transformers' reading of config.json, which knows what a kind of model leaves out; of a BLIP its text side."""
    config: Any = load_config(folder, "Give a BERT.")
    return getattr(config, "text_config", config)


def sizes_from_settings(settings: BlipTrainSettings | AlbefTrainSettings, depth: int) -> dict[str, Any]:
    """The same sizes of a text side from nothing."""
    return {
        "width": settings.text_width, "depth": depth, "num_heads": settings.text_width // settings.head_width,
        "mlp_width": 4 * settings.text_width, "max_positions": settings.max_positions,
    }  # fmt: skip
