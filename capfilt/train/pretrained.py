"""What training starts from: a frozen image encoder, a tokenizer, the weights of a text encoder.

In: folders or hub ids in transformers' layout (safetensors, or a .bin that holds tensors only). Out: our
modules and the weights for them. Nothing is unpickled, no remote code runs, HF_HUB_OFFLINE is honoured.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from capfilt.errors import UsageError
from capfilt.models.convert_blip2 import find_text_encoder, text_encoder_start, to_ours, vision_names
from capfilt.models.qformer import QFormerConfig
from capfilt.models.vit import VisionTransformer, ViTConfig
from capfilt.settings import EMBEDDED, Stage1Settings
from capfilt.train.batches import CLIP_MEAN, CLIP_STD

State = dict[str, Tensor]

EMBEDDED_MODELS = {
    EMBEDDED: "blip-captioner",
    f"{EMBEDDED}-captioner": "blip-captioner",
    f"{EMBEDDED}-filter": "blip-filter",
    f"{EMBEDDED}-opt": "opt",
    f"{EMBEDDED}-t5": "t5",
}
"""Name on the command line → folder under capfilt/world/assets."""

_SIDE_FILES = ("*.json", "*.txt", "*.model", "*.safetensors")


@dataclass(frozen=True)
class ImagePreparation:
    """How an encoder wants its images: square, this large, normalised so."""

    image_size_px: int
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD


@dataclass(frozen=True)
class ImageEncoder:
    """A frozen ViT whose last layer norm was taken off: that one is trained, so it belongs to the stage."""

    vision: VisionTransformer
    norm: State
    preparation: ImagePreparation


@dataclass(frozen=True)
class QFormerStart:
    """Sizes, tokenizer, [DEC]'s id, and weights (none where training starts from nothing)."""

    config: QFormerConfig
    tokenizer: Any
    dec_token_id: int
    weights: State
    head_weights: State


def find_model_dir(name: str, what: str) -> Path:
    """The folder of an embedded model, a local folder, or a hub id's snapshot; else UsageError."""
    if name in EMBEDDED_MODELS:
        return Path(str(resources.files("capfilt"))) / "world" / "assets" / EMBEDDED_MODELS[name]
    if not name:
        raise UsageError(f"No {what} is named. Give a folder, a hub id, or {EMBEDDED!r}.")
    path = Path(name)
    if path.is_dir():
        return path
    if path.exists() or name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise UsageError(f"The {what} {name!r} is no folder. Give a folder with config.json, or a hub id.")
    return _download(name, what)


def _download(name: str, what: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(name, allow_patterns=list(_SIDE_FILES)))
        if not list(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(name, allow_patterns=[*_SIDE_FILES, "*.bin"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise UsageError(
            f"The {what} {name!r} is neither a folder nor on the hub ({error}). Check the name; offline, give a folder."
        ) from error
    return folder


def read_config(folder: Path) -> dict[str, Any]:
    """A model folder's config.json."""
    try:
        return json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{folder} has no readable config.json ({error}). Give a model in transformers' layout."
        ) from error


def read_weights(folder: Path) -> State:
    """All tensors of a folder: safetensors (sharded or not), else .bin files that hold tensors only."""
    files = sorted(folder.glob("model*.safetensors"))
    if files:
        return {name: tensor for file in files for name, tensor in load_file(file).items()}
    files = sorted(folder.glob("pytorch_model*.bin"))
    if not files:
        raise UsageError(f"{folder} has no model.safetensors. Give a model in transformers' layout.")
    state: State = {}
    for file in files:
        state |= torch.load(file, map_location="cpu", weights_only=True)
    return state


def weights_digest(folder: Path) -> str:
    """sha256 over config, tokenizer and weights of a folder: a training goes on only with the same."""
    digest = hashlib.sha256()
    names = {p.name for pattern in (*_SIDE_FILES, "pytorch_model*.bin") for p in folder.glob(pattern)}
    for name in sorted(names - {"training.json"}):
        digest.update(f"{name}\0".encode())
        with open(folder / name, "rb") as handle:
            digest.update(hashlib.file_digest(handle, "sha256").digest())
    return digest.hexdigest()


def load_image_encoder(name: str, device: torch.device) -> ImageEncoder:
    """The image encoder of a BLIP model, frozen."""
    folder = find_model_dir(name, "image encoder")
    config = read_config(folder)
    sizes = config.get("vision_config", {})
    if config.get("model_type") != "blip":
        raise UsageError(f"{folder} is a {config.get('model_type')!r} model; the image encoder must be a BLIP's.")
    state = read_weights(folder)
    return build_image_encoder(_blip_vision_sizes(sizes), state, read_preparation(folder), device)


def build_image_encoder(
    sizes: ViTConfig, state: Mapping[str, Tensor], preparation: ImagePreparation, device: torch.device
) -> ImageEncoder:
    """A frozen encoder from a state dict of BLIP's or BLIP-2's layout (`vision_model.…`)."""
    vision = VisionTransformer(sizes)
    vision.norm = nn.Identity()  # pyright: ignore[reportAttributeAccessIssue]
    vision.load_state_dict(to_ours(state, vision_names(sizes.depth)))
    norm = {kind: state[f"vision_model.post_layernorm.{kind}"].float() for kind in ("weight", "bias")}
    vision.requires_grad_(False)
    return ImageEncoder(vision.float().to(device).eval(), norm, preparation)


def read_preparation(folder: Path) -> ImagePreparation:
    """Image size of config.json; mean and deviation from the processor's JSON, CLIP's where not given.

    The processor's own size is not asked: some published folders state one that the encoder cannot take.
    """
    processor: dict[str, Any] = {}
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (folder / name).exists():
            found = json.loads((folder / name).read_text())
            processor |= found.get("image_processor", found)
    side = read_config(folder).get("vision_config", {}).get("image_size", 384)
    mean, std = processor.get("image_mean", CLIP_MEAN), processor.get("image_std", CLIP_STD)
    return ImagePreparation(int(side), tuple(mean), tuple(std))


def load_qformer_start(settings: Stage1Settings, vision_width: int) -> QFormerStart:
    """Sizes, tokenizer and first weights of the Q-Former from BERT or a BLIP model's text encoder."""
    folder = find_model_dir(settings.qformer_init or settings.image_encoder, "start of the Q-Former")
    whole = read_config(folder)
    sizes = whole.get("text_config", whole)
    state = read_weights(folder)
    tokenizer = load_tokenizer(folder)
    dec_token_id = _dec_token_id(tokenizer, sizes)
    rows = state[find_text_encoder(state) + "embeddings.word_embeddings.weight"].shape[0]
    config = QFormerConfig(
        num_queries=settings.num_queries,
        width=sizes.get("hidden_size", 768),
        depth=sizes.get("num_hidden_layers", 12),
        num_heads=sizes.get("num_attention_heads", 12),
        mlp_width=sizes.get("intermediate_size", 3072),
        vision_width=vision_width,
        cross_attention_every=settings.cross_attention_every,
        vocab_size=max(rows, dec_token_id + 1),
        max_positions=sizes.get("max_position_embeddings", 512),
        layer_norm_eps=sizes.get("layer_norm_eps", 1e-12),
        dropout=settings.dropout,
        pad_token_id=sizes.get("pad_token_id") or 0,
    )
    if not settings.init_weights:
        return QFormerStart(config, tokenizer, dec_token_id, {}, {})
    weights, head = text_encoder_start(state, config, cross_attention=settings.init_cross_attention)
    return QFormerStart(config, tokenizer, dec_token_id, weights, head)


def load_tokenizer(folder: Path) -> Any:
    """A folder's tokenizer; UsageError where it has none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise UsageError(f"{folder} has no tokenizer that can be read ({error}).") from error


@torch.no_grad()
def copy_start(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copies weights over those of the same name; of a longer matrix (a larger vocabulary) the first rows."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    for name, value in weights.items():
        target = parameters[name]
        rows = min(len(target), len(value))
        if target.shape[1:] != value.shape[1:] or (
            rows < len(target) and "vocabulary" not in name and "word_" not in name
        ):
            raise UsageError(f"{name} has shape {tuple(value.shape)}; expected {tuple(target.shape)}.")
        target[:rows] = value[:rows]


def _dec_token_id(tokenizer: Any, sizes: Mapping[str, Any]) -> int:
    """[DEC] by name; else BLIP's bos (its released tokenizer lacks the name); else a new last row."""
    named = tokenizer.get_vocab().get("[DEC]")
    if named is not None:
        return int(named)
    return int(sizes.get("bos_token_id") or len(tokenizer))


def _blip_vision_sizes(sizes: Mapping[str, Any]) -> ViTConfig:
    """transformers' BlipVisionConfig, whose own defaults fill what config.json leaves out."""
    from transformers import BlipVisionConfig

    full: Any = BlipVisionConfig(**{k: v for k, v in sizes.items() if k != "model_type"})
    return ViTConfig(
        image_size_px=full.image_size, patch_size_px=full.patch_size, width=full.hidden_size,
        depth=full.num_hidden_layers, num_heads=full.num_attention_heads, mlp_width=full.intermediate_size,
        layer_norm_eps=full.layer_norm_eps,
    )  # fmt: skip
