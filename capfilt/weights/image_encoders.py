"""Frozen image encoders of BLIP-2: read from every layout they are published in, cut and resized as asked.

In: a name, which means one of

    folder, hub id, `embedded`   transformers' layout: a BLIP, a CLIP (`openai/clip-vit-large-patch14`), a BLIP-2
    folder                       of open_clip: open_clip_config.json and its weights
    open_clip:NAME[:WEIGHTS]     a model that open_clip knows, with a tag or a file (`openai` unless given)
    file                         LAVIS's: `eva_vit_g.pth`, `clip_vit_L.pth`, or a BLIP-2 that has it inside

Out: a ViT without the layer norm behind it, which stages 1 and 2 train, what that norm starts from, and how the encoder
wants its images. UsageError says what is missing or does not fit.

BLIP-2 §3.2 takes the output of the second-last layer. By default (`auto`) that is done where the paper has it: of a
CLIP and of a whole EVA-CLIP the last block is dropped; EVA-CLIP as published with BLIP-2 lacks it already. BLIP's
encoder, which is none of the paper's, keeps its last block. The trained norm starts from the encoder's own where
features are those it was made for (of the last block), else from weight 1 and bias 0, as in the released code.

Deviation from LAVIS: its `create_clip_vit_L` keeps 21 of CLIP ViT-L/14's 24 blocks; the paper says second-last, 23.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from capfilt.data.commit import file_sha256, fingerprint
from capfilt.data.texts import first_line
from capfilt.errors import UsageError
from capfilt.models.convert_blip2 import State, refuse_unknown, sizes_from_config, to_ours, vision_names
from capfilt.models.convert_image_encoders import (
    EVA_DEPTH,
    at_image_size,
    clip_sizes,
    eva_sizes,
    from_clip,
    from_eva,
    from_openai,
    openai_sizes,
    without_last_block,
)
from capfilt.models.shapes import shapes_only
from capfilt.models.vit import VisionTransformer, ViTConfig
from capfilt.settings import RankSettings
from capfilt.weights.blip import read_sizes
from capfilt.weights.clip import ClipSource, find_clip, load_image_tower
from capfilt.weights.find import find_model_dir
from capfilt.weights.model_files import (
    ImagePreparation,
    naming,
    read_config,
    read_image_processor,
    read_preparation,
    read_tensors,
    read_weights,
    refuse_odd_shapes,
    weights_digest,
)

OPEN_CLIP = "open_clip:"
GIVE_IMAGE_ENCODER = (
    "a folder or hub id (owner/name) of a BLIP, CLIP or BLIP-2, open_clip:NAME:WEIGHTS, a .pth of EVA-CLIP's ViT-g"
)
"""What can be given as an image encoder, in messages."""
CLIP_TOWER_DIR = "image_encoder"
"""Where a BLIP-2 folder of ours has the image encoder that transformers' BLIP-2 has no room for."""
LAST = "last"
"""Of a config.json that we wrote: the last block was dropped already."""
LAYER_KEY = "capfilt_image_encoder_layer"

_BICUBIC = 3  # Pillow's number, as preprocessor_config.json has it
_NORM_KINDS = ("weight", "bias")
_LAVIS_PREFIX = "visual_encoder."


@dataclass(frozen=True)
class ImageEncoder:
    """A frozen ViT whose last layer norm was taken off: that one is trained, so it belongs to the stage."""

    vision: VisionTransformer
    norm: State
    """What the trained layer norm starts from: weight and bias, float32."""
    preparation: ImagePreparation

    @property
    def dtype(self) -> torch.dtype:
        """The precision that it computes in and gives its features in."""
        return self.vision.class_embedding.dtype

    @property
    def fits_blip2(self) -> bool:
        """Whether transformers' BLIP-2 has room for it: no norm before the first block, exact GELU."""
        return fits_blip2(self.vision.config)


@dataclass(frozen=True)
class Tower:
    """An image encoder as it was read: our weights without the last norm, on the CPU."""

    sizes: ViTConfig
    weights: State
    preparation: ImagePreparation
    norm: State = field(default_factory=dict)
    """The layer norm that its last block's output goes through; empty where the file has none."""
    has_last_block: bool = False
    """Whether the paper's features are those of the block before its last."""


def load_image_encoder(
    name: str,
    device: torch.device,
    *,
    layer: str = "auto",
    image_size_px: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> ImageEncoder:
    """The image encoder that `name` means, frozen; see the module's docstring.

    Args:
        layer: auto, last or second-last: the block whose output are the features.
        image_size_px: side of the images; None for the encoder's own. Positions are interpolated for another.
        dtype: precision it computes in.
    """
    with naming(name or "the image encoder"):
        return build_image_encoder(read_tower(name), device, layer=layer, image_size_px=image_size_px, dtype=dtype)


def build_image_encoder(
    tower: Tower,
    device: torch.device,
    *,
    layer: str = "auto",
    image_size_px: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> ImageEncoder:
    """A frozen encoder of what was read; arguments as `load_image_encoder`."""
    weights, sizes, norm, preparation = tower.weights, tower.sizes, tower.norm, tower.preparation
    if layer == "second-last" or (layer == "auto" and tower.has_last_block):
        weights, sizes = without_last_block(weights, sizes)
        norm = {}
    if image_size_px is not None:
        weights, sizes = at_image_size(weights, sizes, image_size_px)
        preparation = replace(preparation, image_size_px=image_size_px)
    with shapes_only():
        vision = VisionTransformer(sizes)
    vision.norm = nn.Identity()  # pyright: ignore[reportAttributeAccessIssue]
    refuse_odd_shapes(weights, vision.state_dict())
    vision.load_state_dict({key: tensor.to(dtype).contiguous() for key, tensor in weights.items()}, assign=True)
    start = {kind: norm[kind].float() if norm else _plain_norm(kind, sizes.width) for kind in _NORM_KINDS}
    return ImageEncoder(vision.requires_grad_(False).to(device).eval(), start, preparation)


def is_open_clip(name: str) -> bool:
    """Whether open_clip is to load what `name` means."""
    return name.startswith(OPEN_CLIP) or bool(name and (Path(name).expanduser() / "open_clip_config.json").is_file())


def read_tower(name: str) -> Tower:
    """The image encoder that `name` means, as it lies on disk."""
    path = Path(name).expanduser()
    if (source := _find_open_clip(name)) is not None:
        return _read_open_clip(source)
    if name and path.is_file():
        return read_lavis_tower(read_tensors(path), str(path))
    folder = find_model_dir(name, "image encoder", give=GIVE_IMAGE_ENCODER)
    kind = read_config(folder).get("model_type")
    if kind not in _READERS:
        expected = ", ".join(repr(known) for known in _READERS)
        raise UsageError(f"The image encoder {folder} is a {kind!r} model; expected one of {expected}.")
    return _READERS[str(kind)](folder)


def image_encoder_digest(name: str) -> str:
    """sha256 of what `name` contains; where it lies may change."""
    path = Path(name).expanduser()
    if (source := _find_open_clip(name)) is not None:
        return fingerprint(source.digests())
    if name and path.is_file():
        return file_sha256(path)
    return weights_digest(find_model_dir(name, "image encoder", give=GIVE_IMAGE_ENCODER))


def read_clip_tower(folder: Path) -> Tower:
    """The image encoder of a CLIP's folder in transformers' layout (`CLIPModel` or `CLIPVisionModel`)."""
    config = read_config(folder)
    sizes = clip_sizes(config)
    weights, norm = from_clip(read_weights(folder), sizes)
    _refuse_other_resampling(folder)
    preparation = read_preparation(folder, sizes.image_size_px)
    return Tower(sizes, weights, preparation, norm, has_last_block=config.get(LAYER_KEY) != LAST)


def read_blip2_config(folder: Path) -> Any:
    """transformers' `Blip2Config` of a folder. UsageError where it is none."""
    from transformers import Blip2Config

    raw = read_config(folder)
    try:
        return Blip2Config(**raw)
    except Exception as error:  # transformers' checks of a configuration raise errors without a common base
        raise UsageError(f"{folder}/config.json is no BLIP-2 configuration ({first_line(error)}).") from error


def blip2_tower(config: Any, state: Mapping[str, Tensor], preparation: ImagePreparation) -> Tower:
    """The image encoder of a BLIP-2 in transformers' layout; its last block is the paper's second-last."""
    sizes, _ = sizes_from_config(config)
    return _of_vision_model(sizes, state, preparation)


def read_lavis_tower(state: Mapping[str, Tensor], where: str) -> Tower:
    """The image encoder of LAVIS's files, EVA-CLIP's or CLIP's: bare, or the `visual_encoder` of a BLIP-2."""
    own = {key.removeprefix(_LAVIS_PREFIX): t for key, t in state.items() if key.startswith(_LAVIS_PREFIX)}
    if not own and any(key.startswith("Qformer.") for key in state):
        raise UsageError(
            f"{where} holds no image encoder: it was saved without what is frozen. Give that one too: "
            "--image-encoder eva_vit_g.pth."
        )
    is_bare, own = not own, own or dict(state)
    if "conv1.weight" in own:  # inside a BLIP-2 it was cut already
        return _lavis_tower(own, openai_sizes(own), from_openai, "ln_post", has_last_block=is_bare)
    sizes = eva_sizes(own)
    return _lavis_tower(own, sizes, from_eva, "norm", has_last_block=is_bare and sizes.depth >= EVA_DEPTH)


def _lavis_tower(
    own: State,
    sizes: ViTConfig,
    convert: Callable[[Mapping[str, Tensor], ViTConfig], State],
    norm_name: str,
    *,
    has_last_block: bool,
) -> Tower:
    norm = {kind: own[f"{norm_name}.{kind}"] for kind in _NORM_KINDS if f"{norm_name}.{kind}" in own}
    preparation = ImagePreparation(sizes.image_size_px)
    return Tower(sizes, convert(own, sizes), preparation, norm, has_last_block)


def fits_blip2(sizes: ViTConfig) -> bool:
    """Whether transformers' BLIP-2 has room for an encoder of these sizes."""
    return not sizes.norm_first and sizes.activation == "gelu"


def _read_blip(folder: Path) -> Tower:
    sizes, _, _ = read_sizes(folder)
    return _of_vision_model(sizes, read_weights(folder), read_preparation(folder, sizes.image_size_px))


def _read_blip2(folder: Path) -> Tower:
    if (inner := folder / CLIP_TOWER_DIR).is_dir():
        return read_clip_tower(inner)
    config = read_blip2_config(folder)
    _refuse_other_resampling(folder)
    return blip2_tower(config, read_weights(folder), read_preparation(folder, config.vision_config.image_size))


def _of_vision_model(sizes: ViTConfig, state: Mapping[str, Tensor], preparation: ImagePreparation) -> Tower:
    """Of the layout that BLIP and BLIP-2 share (`vision_model.…`)."""
    norm = {kind: f"vision_model.post_layernorm.{kind}" for kind in _NORM_KINDS}
    names = vision_names(sizes.depth)
    refuse_unknown([key for key in state if key.startswith("vision_model.")], names, norm)
    return Tower(sizes, to_ours(state, names), preparation, to_ours(state, norm))


_READERS: dict[str, Callable[[Path], Tower]] = {
    "blip": _read_blip, "clip": read_clip_tower, "clip_vision_model": read_clip_tower, "blip-2": _read_blip2,
}  # fmt: skip
"""model_type of a config.json → what reads the image encoder."""


def _find_open_clip(name: str) -> ClipSource | None:
    """What open_clip is asked for; None where `name` does not mean a model of its."""
    if not is_open_clip(name):
        return None
    model, _, weights = name.removeprefix(OPEN_CLIP).partition(":")
    return find_clip(RankSettings(clip_model=model, clip_weights=weights or None))


def _read_open_clip(source: ClipSource) -> Tower:
    tower, wanted = load_image_tower(source)
    interpolation = wanted.get("interpolation", "bicubic")
    if interpolation != "bicubic":
        raise UsageError(f"{source.name} wants its images resized by {interpolation!r}; expected 'bicubic'.")
    weights = tower.vision.state_dict()
    norm = {kind: weights.pop(f"norm.{kind}") for kind in _NORM_KINDS}
    sizes = tower.vision.config
    preparation = ImagePreparation(sizes.image_size_px, tuple(wanted["mean"]), tuple(wanted["std"]))
    return Tower(sizes, weights, preparation, norm, has_last_block=True)


def _refuse_other_resampling(folder: Path) -> None:
    """Trainings resize by bicubic interpolation; CLIP's crop is replaced by BLIP-2's square (or its random crop)."""
    resample = read_image_processor(folder).get("resample", _BICUBIC)
    if resample != _BICUBIC:
        raise UsageError(f"The image processor in {folder} asks for resampling {resample}; expected bicubic (3).")


def _plain_norm(kind: str, width: int) -> Tensor:
    return torch.ones(width) if kind == "weight" else torch.zeros(width)
