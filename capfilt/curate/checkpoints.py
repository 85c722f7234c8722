"""Where a BLIP model's files are, and reading them: a folder, a hub id, an original .pth, or `embedded`.

In: the name a user gave. Out: our module with its weights, tokenizer, image preparation, and the sha256 of
every file that was read, for the fingerprint. Nothing is unpickled (weights_only), no code of a checkpoint
runs, and HF_HUB_OFFLINE is honoured: a hub id is then looked up in the cache alone.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

import capfilt
from capfilt.data.commit import file_sha256
from capfilt.errors import UsageError
from capfilt.models.convert_blip import (
    Kind,
    State,
    from_transformers,
    original_to_transformers,
    sizes_from_config,
    sizes_from_original,
)
from capfilt.models.med import Captioner, Filter, MEDConfig
from capfilt.models.vit import VisionTransformer, ViTConfig
from capfilt.settings import EMBEDDED

EMBEDDED_DIR = Path(capfilt.__file__).parent / "world" / "assets"
"""The models shipped in the package."""
EMBEDDED_FOLDERS = {"captioner": "blip-captioner", "filter": "blip-filter", "clip": "clip"}
"""What is asked for → its folder there."""

BLIP_PROMPT = "a picture of "
"""BLIP's prompt, where a captioner does not name its own (`capfilt_prompt` in config.json)."""
BERT_TOKENIZER = "google-bert/bert-base-uncased"
"""Hub id of the tokenizer of every released BLIP, for a .pth that has none beside it."""

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_BICUBIC = 3  # Pillow's number, as preprocessor_config.json has it

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
    "special_tokens_map.json",
    "added_tokens.json",
)
_SIDE_FILES = ("config.json", "preprocessor_config.json", "processor_config.json", *_TOKENIZER_FILES)
_TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Preparation:
    """How a BLIP model wants its images: resized to a square of this side, then normalised."""

    image_size_px: int
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD


@dataclass(frozen=True)
class LoadedBlip:
    """A captioner or filter ready for use."""

    model: Captioner | Filter
    tokenizer: Any
    preparation: Preparation
    prompt: str
    """Text that captions continue; of no meaning for a filter."""
    digests: dict[str, str]
    """File name → sha256 of every file that was read."""


def load_blip(name: str, kind: Kind, *, device: torch.device, dtype: torch.dtype) -> LoadedBlip:
    """Read a BLIP captioner or filter.

    Args:
        name: a folder in transformers' layout, a hub id, an original .pth, or `embedded`.

    Raises UsageError naming what is missing: the folder, a file, a weight, the network.
    """
    path = find_blip(name, kind)
    if path.is_file():
        state, vit, med, embed_dim = _read_original(path, kind)
        side_dir, config = _tokenizer_dir(path), {}
        digests = {path.name: file_sha256(path)}
        preparation = Preparation(vit.image_size_px)
    else:
        config = read_json(path / "config.json")
        vit, med, embed_dim = _sizes(path, config)
        state, weight_files = _read_weights(path)
        side_dir, digests = path, {file.name: file_sha256(file) for file in weight_files}
        preparation = _read_preparation(path, vit)
    model = _build(state, kind, vit, med, embed_dim)
    tokenizer = _load_tokenizer(side_dir, med)
    present = [side_dir / file for file in _SIDE_FILES if (side_dir / file).is_file()]
    digests |= {file.name: file_sha256(file) for file in present}
    return LoadedBlip(
        model=model.to(device=device, dtype=dtype).eval().requires_grad_(False),
        tokenizer=tokenizer,
        preparation=preparation,
        prompt=str(config.get("capfilt_prompt", BLIP_PROMPT)),
        digests=digests,
    )


def find_blip(name: str, kind: Kind) -> Path:
    """The folder or .pth that `name` means. Raises UsageError where there is none."""
    option = "--captioner" if kind == "captioner" else "--filter-model"
    if not name:
        raise UsageError(f"No {kind} is named. Give {option} with a folder, a hub id, a .pth, or `{EMBEDDED}`.")
    if name == EMBEDDED:
        return find_embedded(kind)
    path = Path(name).expanduser()
    if path.is_dir() or (path.is_file() and path.suffix in (".pth", ".pt")):
        return path
    if path.exists():
        raise UsageError(f"{path} is neither a folder nor a .pth. Give {option} a model in transformers' layout.")
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise UsageError(f"There is no {kind} {name}. Give {option} a folder, a hub id (owner/name) or a .pth.")
    return download_snapshot(name, option)


def find_embedded(what: str) -> Path:
    """The folder of an embedded model. Raises UsageError where the package came without it."""
    folder = EMBEDDED_DIR / EMBEDDED_FOLDERS[what]
    if not folder.is_dir():
        raise UsageError(f"This installation has no embedded {what} ({folder}). Build it: `make assets`.")
    return folder


def download_snapshot(name: str, option: str, patterns: Iterable[str] | None = None) -> Path:
    """The hub's files of `name`, from the cache or the network. Raises UsageError when they cannot be had."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    wanted = list(patterns or (*_SIDE_FILES, "model*.safetensors*"))
    try:
        folder = Path(snapshot_download(name, allow_patterns=wanted))
        if patterns is None and not list(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(name, allow_patterns=[*_SIDE_FILES, "pytorch_model*.bin*"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = "HF_HUB_OFFLINE is set and it is not in the cache" if is_offline() else f"{error}"
        raise UsageError(
            f"{name} is no folder here, and could not be had from the hub ({reason}). With a network, run "
            f"`huggingface-cli download {name}`, copy the folder, and give {option} its path."
        ) from error
    return folder


def is_offline() -> bool:
    """Whether HF_HUB_OFFLINE forbids the network."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def choose_device(name: str) -> torch.device:
    """The torch device of a setting. Raises UsageError for one that this machine does not have."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    device = torch.device(name)
    has_it = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available}.get(device.type)
    if has_it is not None and not has_it():
        raise UsageError(f"This machine has no {device.type} device that torch can use. Give --device cpu.")
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The torch dtype of a setting; auto is float32 on a CPU and bfloat16 on a GPU."""
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    return _TORCH_DTYPES[name]


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises UsageError where there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read ({error}). Give a folder with a model's config.json.") from error
    if not isinstance(content, dict):
        raise UsageError(f"{path} holds no JSON object. Give a folder with a model's config.json.")
    return content


def _sizes(folder: Path, config: dict[str, Any]) -> tuple[ViTConfig, MEDConfig, int]:
    if config.get("model_type") != "blip":
        raise UsageError(f"{folder} is a {config.get('model_type')!r} model; expected a 'blip' one.")
    try:
        return sizes_from_config(config)
    except UsageError:
        raise
    except Exception as error:  # transformers' checks of a configuration raise errors without a common base
        raise UsageError(f"{folder}/config.json is no BLIP configuration ({error}).") from error


def _build(state: State, kind: Kind, vit: ViTConfig, med: MEDConfig, embed_dim: int) -> Captioner | Filter:
    ours = from_transformers(state, kind, vision_depth=vit.depth, text_depth=med.depth)
    with torch.device("meta"):
        vision = VisionTransformer(vit)
        model = Captioner(vision, med) if kind == "captioner" else Filter(vision, med, embed_dim=embed_dim)
    _refuse_odd_shapes(ours, dict(model.state_dict()))
    model.load_state_dict(ours, assign=True)
    if isinstance(model, Captioner):
        model.head.vocabulary.weight = model.decoder.word_embedding.weight
    return model


def _refuse_odd_shapes(found: State, expected: dict[str, Tensor]) -> None:
    odd = [
        f"{name} {tuple(tensor.shape)}, expected {tuple(expected[name].shape)}"
        for name, tensor in found.items()
        if tensor.shape != expected[name].shape
    ]
    if odd:
        raise UsageError(f"{len(odd)} weights do not have the sizes of the config: {'; '.join(odd[:5])}.")


def _read_weights(folder: Path) -> tuple[State, list[Path]]:
    files = sorted(folder.glob("model*.safetensors"))
    if files:
        try:
            return {name: tensor for file in files for name, tensor in load_file(file).items()}, files
        except (SafetensorError, OSError, ValueError) as error:
            raise UsageError(f"The weights in {folder} cannot be read ({error}). Fetch them again.") from error
    files = sorted(folder.glob("pytorch_model*.bin"))
    if not files:
        raise UsageError(f"{folder} has no model.safetensors. Give a folder in transformers' layout.")
    state: State = {}
    for file in files:
        state |= _load_tensors(file)
    return state, files


def _read_original(path: Path, kind: Kind) -> tuple[State, ViTConfig, MEDConfig, int]:
    content = _load_tensors(path)
    state = content.get("model", content)
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise UsageError(f"{path} holds no weights under `model`. Give an original BLIP checkpoint.")
    vit, med, embed_dim = sizes_from_original(state, kind)
    return original_to_transformers(state, kind), vit, med, embed_dim


def _load_tensors(path: Path) -> dict[str, Any]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a dozen kinds of errors for files that are not what they should be
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UsageError(
            f"{path} is not a file of plain tensors ({first}). Nothing in it was run. Give safetensors, or a "
            "checkpoint that torch loads with weights_only."
        ) from error
    if not isinstance(content, dict):
        raise UsageError(f"{path} holds a {type(content).__name__}; expected a dictionary of weights.")
    return content


def _read_preparation(folder: Path, vit: ViTConfig) -> Preparation:
    for name in ("processor_config.json", "preprocessor_config.json"):
        if not (folder / name).is_file():
            continue
        content = read_json(folder / name)
        content = content.get("image_processor", content)
        if "size" not in content:
            continue
        size = content["size"]
        sides = {size} if isinstance(size, int) else {size.get("height"), size.get("width")}
        if sides != {vit.image_size_px} or content.get("resample", _BICUBIC) != _BICUBIC:
            raise UsageError(
                f"{folder / name} asks for size {size} and resampling {content.get('resample')}; expected "
                f"{vit.image_size_px} x {vit.image_size_px} as in config.json, and bicubic ({_BICUBIC})."
            )
        mean, std = content.get("image_mean", CLIP_MEAN), content.get("image_std", CLIP_STD)
        return Preparation(vit.image_size_px, tuple(mean), tuple(std))
    return Preparation(vit.image_size_px)


def _tokenizer_dir(path: Path) -> Path:
    """Beside the .pth, else BERT's from the hub's cache or the network."""
    if (path.parent / "tokenizer.json").is_file() or (path.parent / "vocab.txt").is_file():
        return path.parent
    return download_snapshot(BERT_TOKENIZER, f"the folder of {path.name}", _TOKENIZER_FILES)


def _load_tokenizer(folder: Path, med: MEDConfig) -> Any:
    from transformers import AutoTokenizer, BertTokenizer

    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.txt")):
        raise UsageError(f"{folder} has neither tokenizer.json nor vocab.txt. Copy them from the model's source.")
    try:
        if (folder / "tokenizer_config.json").is_file():
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        else:
            tokenizer = BertTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the tokenizers' errors have no common base
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UsageError(f"{folder} has no readable tokenizer ({first}). Add tokenizer.json.") from error
    if tokenizer.sep_token_id != med.sep_token_id or len(tokenizer) > med.vocab_size:
        raise UsageError(
            f"The tokenizer in {folder} has {len(tokenizer)} tokens and [SEP] {tokenizer.sep_token_id}; the "
            f"model has {med.vocab_size} and {med.sep_token_id}. Give the folder the model's own tokenizer."
        )
    return tokenizer
