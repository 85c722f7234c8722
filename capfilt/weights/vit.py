"""Published Vision Transformers on disk, to start an image encoder from.

In: a .pth or safetensors file in timm's layout (DeiT's release: under `model`), a folder or hub id of transformers' ViT
or of timm's. Out: its sizes and its weights by our names. Nothing is unpickled.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from capfilt.data.commit import file_sha256
from capfilt.errors import UsageError
from capfilt.models.convert_blip2 import State
from capfilt.models.convert_vit import (
    from_timm,
    from_transformers_vit,
    positions_at,
    sizes_from_timm,
    sizes_from_transformers_vit,
)
from capfilt.models.vit import VisionTransformer, ViTConfig
from capfilt.weights.find import find_model_dir
from capfilt.weights.model_files import (
    naming,
    read_config,
    read_tensors,
    read_weights,
    refuse_odd_shapes,
    weights_digest,
)

_TRANSFORMERS = ("vit", "deit")
"""`model_type` of transformers' folders that are read."""


@dataclass(frozen=True)
class VitStart:
    """A published image encoder: sizes, weights, and what identifies the files they were read from."""

    config: ViTConfig
    weights: State
    digest: str


def load_vit_start(name: str, *, image_size_px: int | None = None) -> VitStart:
    """A Vision Transformer to start from; positions are interpolated for another size of images than its own.

    Raises UsageError where `name` means nothing that can be read, naming every missing and unknown weight.
    """
    path = Path(name).expanduser()
    with naming(name):
        config, weights, digest = _read_file(path) if path.is_file() else _read_folder(name)
    if image_size_px is not None and image_size_px != config.image_size_px:
        if image_size_px % config.patch_size_px:
            raise UsageError(
                f"image_size_px is {image_size_px}; expected a multiple of {config.patch_size_px}, the patch of {name}."
            )
        config = replace(config, image_size_px=image_size_px)
        weights = positions_at(weights, config)
    return VitStart(config, weights, digest)


def build_vision(start: VitStart) -> VisionTransformer:
    """An image encoder with these weights. UsageError where their shapes are not those of its sizes."""
    vision = VisionTransformer(start.config)
    refuse_odd_shapes(start.weights, vision.state_dict())
    vision.load_state_dict(start.weights)
    return vision


def _read_file(path: Path) -> tuple[ViTConfig, State, str]:
    state = read_tensors(path)
    return sizes_from_timm(state), from_timm(state), file_sha256(path)


def _read_folder(name: str) -> tuple[ViTConfig, State, str]:
    give = "a .pth or safetensors file in timm's layout, a folder or hub id (owner/name) of a ViT"
    folder = find_model_dir(name, "image encoder to start from", embedded=None, give=give)
    config, digest = read_config(folder), weights_digest(folder)
    state = read_weights(folder)
    if "architecture" in config and "model_type" not in config:  # timm's folders on the hub
        return sizes_from_timm(state), from_timm(state), digest
    if config.get("model_type") not in _TRANSFORMERS:
        expected = ", ".join(_TRANSFORMERS)
        raise UsageError(f"{folder} is a {config.get('model_type')!r} model; expected one of {expected}. Give {give}.")
    sizes = sizes_from_transformers_vit(config)
    return sizes, from_transformers_vit(state, sizes.depth), digest
