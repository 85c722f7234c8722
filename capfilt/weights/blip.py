"""BLIP captioners and filters on disk: read from every published layout, written in transformers'.

In: a folder in transformers' layout, a hub id, an original .pth, or `embedded`. Out: our module with its weights,
tokenizer and image preparation; and back to a folder. No code of a checkpoint runs.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from capfilt.data.commit import file_sha256
from capfilt.errors import UsageError
from capfilt.models.convert_blip import (
    Kind,
    State,
    config_from_sizes,
    from_transformers,
    original_to_transformers,
    sizes_from_config,
    sizes_from_original,
    to_transformers,
)
from capfilt.models.med import Captioner, Filter, MEDConfig
from capfilt.models.shapes import shapes_only
from capfilt.models.vit import VisionTransformer, ViTConfig
from capfilt.weights.devices import name_dtype
from capfilt.weights.find import download_snapshot, find_model_dir
from capfilt.weights.model_files import (
    ImagePreparation,
    find_weights,
    load_tokenizer,
    naming,
    read_config,
    read_image_processor,
    read_preparation,
    read_tensors,
    read_weights,
    refuse_odd_shapes,
    reset_padding,
    save_tensors,
    weights_digest,
)

BLIP_PROMPT = "a picture of "
"""BLIP's prompt, where a captioner does not name its own (`capfilt_prompt` in config.json)."""
START_TEMPERATURE = 0.07
"""ITC's before training (BLIP's released code), and where a model does not name its own."""
BERT_TOKENIZER = "google-bert/bert-base-uncased"
"""Hub id of the tokenizer of every released BLIP, for a .pth that has none beside it."""

Sizes = tuple[ViTConfig, MEDConfig, int]
"""Of image encoder and text model, and the width of ITC's embedding."""

_BICUBIC = 3  # Pillow's number, as preprocessor_config.json has it
_VOCABULARY_FILES = ("tokenizer.json", "vocab.txt")
_TOKENIZER_FILES = (*_VOCABULARY_FILES, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_SIDE_FILES = ("config.json", "preprocessor_config.json", "processor_config.json", *_TOKENIZER_FILES)


@dataclass(frozen=True)
class LoadedBlip:
    """A captioner or filter, with what prepares its inputs."""

    model: Captioner | Filter
    tokenizer: Any
    preparation: ImagePreparation
    prompt: str = BLIP_PROMPT
    """Text that captions continue; of no meaning for a filter."""
    digests: dict[str, str] = field(default_factory=dict)
    """File name → sha256 of every file that was read, for the fingerprint of what is made with the model."""
    temperature: float = START_TEMPERATURE
    """ITC's, where a filter's training goes on from (`capfilt_temperature` in config.json, `temp` in a .pth)."""
    vision_digest: str = ""
    """sha256 of what the image encoder computes from a picture: its sizes, preparation, dtype and weights. Models of
    one digest give the same image features."""


def load_blip(
    name: str, kind: Kind, *, device: torch.device, dtype: torch.dtype, resizer: str = "torchvision"
) -> LoadedBlip:
    """Read a BLIP captioner or filter to run it, frozen.

    Args:
        name: a folder in transformers' layout, a hub id, an original .pth, or `embedded`.
        resizer: torchvision or pillow; becomes a part of the image preparation.

    Raises UsageError naming what is missing: the folder, a file, a weight, the network.
    """
    path = _find_blip(name, kind)
    if path.is_file():
        state, sizes, _ = _read_original(path, kind)
        config, weight_files, side_dir = {}, [path], tokenizer_dir(path)
        preparation = ImagePreparation(sizes[0].image_size_px)
    else:
        config, sizes = read_config(path), read_sizes(path)
        state, weight_files, side_dir = read_weights(path, dtype), find_weights(path), path
        preparation = read_preparation(path, sizes[0].image_size_px)
        _refuse_other_resizing(path, preparation)
    with shapes_only():
        model = _build(kind, sizes)
    with naming(path):
        model.load_state_dict(_our_weights(state, kind, model, sizes), assign=True)
    if isinstance(model, Captioner):
        model.head.vocabulary.weight = model.decoder.word_embedding.weight
    files = [*weight_files, *(side_dir / file for file in _SIDE_FILES if (side_dir / file).is_file())]
    model.to(dtype=dtype)
    preparation = replace(preparation, resizer=resizer)
    vision_digest = digest_vision(model.vision, preparation)
    return LoadedBlip(
        model=model.to(device).eval().requires_grad_(False),
        tokenizer=_load_tokenizer(side_dir, sizes[1]),
        preparation=preparation,
        prompt=str(config.get("capfilt_prompt", BLIP_PROMPT)),
        digests={file.name: file_sha256(file) for file in files},
        vision_digest=vision_digest,
    )


def digest_vision(vision: VisionTransformer, preparation: ImagePreparation) -> str:
    """sha256 of what an image encoder computes from a picture: its sizes, preparation, dtype and weights."""
    digest = hashlib.sha256(repr((vision.config, preparation)).encode())
    for name, tensor in sorted(vision.state_dict().items()):
        digest.update(f"{name} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def load_trainable_blip(path: Path, kind: Kind, dropout: float = 0.0) -> LoadedBlip:
    """Read a captioner or filter to train it, in float32, from a folder in transformers' layout or an original .pth.

    `dropout` is that of the text side in training.

    Raises UsageError naming every missing and unknown weight, or the file that is lacking.
    """
    if path.is_file():
        (state, sizes, temperature), side_dir = _read_original(path, kind), tokenizer_dir(path)
        preparation = ImagePreparation(sizes[0].image_size_px)
        state = {name: tensor.float() for name, tensor in state.items()}
    else:
        state, sizes, side_dir = read_weights(path), read_sizes(path), path
        preparation, temperature = read_preparation(path, sizes[0].image_size_px), _read_temperature(path)
    sizes = (sizes[0], replace(sizes[1], dropout=dropout), sizes[2])
    model = _build(kind, sizes)
    with naming(path):
        model.load_state_dict(_our_weights(state, kind, model, sizes))
    return LoadedBlip(model, _load_tokenizer(side_dir, sizes[1]), preparation, temperature=temperature)


def blip_digest(path: Path) -> str:
    """sha256 of the weights of a folder, or of an original .pth; where they lie may change."""
    return file_sha256(path) if path.is_file() else weights_digest(path)


def read_sizes(folder: Path) -> Sizes:
    """The sizes in config.json. Raises UsageError where it is not a BLIP's."""
    config = read_config(folder)
    if config.get("model_type") != "blip":
        raise UsageError(f"{folder} is a {config.get('model_type')!r} model; expected a 'blip' one.")
    try:
        return sizes_from_config(config)
    except UsageError:
        raise
    except Exception as error:  # transformers' checks of a configuration raise errors without a common base
        raise UsageError(f"{folder}/config.json is no BLIP configuration ({error}).") from error


def save_blip(
    folder: Path,
    kind: Kind,
    model: Captioner | Filter,
    side: LoadedBlip,
    *,
    prompt: str | None = None,
    temperature: float | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write a folder that plain transformers opens.

    `prompt` is what the captioner was trained to continue, `temperature` that of the filter's ITC.
    """
    folder.mkdir(parents=True, exist_ok=True)
    text = model.decoder if isinstance(model, Captioner) else model.encoder
    vit, med = model.vision.config, text.config
    embed_dim = model.text_projection.out_features if isinstance(model, Filter) else 256
    config = config_from_sizes(kind, vit, med, embed_dim=embed_dim) | {"dtype": name_dtype(dtype)}
    if prompt is not None:
        config["capfilt_prompt"] = prompt
    if temperature is not None:
        config["capfilt_temperature"] = temperature
    _write_json(folder / "config.json", config)
    _write_json(folder / "preprocessor_config.json", preprocessor_config(side.preparation))
    reset_padding(side.tokenizer)
    side.tokenizer.save_pretrained(folder)
    state = to_transformers(model.state_dict(), kind, vision_depth=vit.depth, text_depth=med.depth)
    save_tensors(folder / "model.safetensors", state, dtype)


def _find_blip(name: str, kind: Kind) -> Path:
    """The folder or .pth that `name` means."""
    path = Path(name).expanduser()
    if path.is_file() and path.suffix in (".pth", ".pt"):
        return path
    option = "--captioner" if kind == "captioner" else "--filter-model"
    return find_model_dir(name, kind, embedded=kind, give=f"{option} a folder, a hub id (owner/name), an original .pth")


def _read_original(path: Path, kind: Kind) -> tuple[State, Sizes, float]:
    """The weights of an original .pth by transformers' names, the sizes they tell, and the temperature of ITC."""
    state = read_tensors(path)
    temperature = float(state["temp"]) if "temp" in state else START_TEMPERATURE
    with naming(path):
        return original_to_transformers(state, kind), sizes_from_original(state, kind), temperature


def _read_temperature(folder: Path) -> float:
    found = read_config(folder).get("capfilt_temperature", START_TEMPERATURE)
    if not isinstance(found, int | float) or not 0 < found < math.inf:
        raise UsageError(f"{folder}/config.json has capfilt_temperature {found!r}; expected a number above 0.")
    return float(found)


def _build(kind: Kind, sizes: Sizes) -> Captioner | Filter:
    vit, med, embed_dim = sizes
    vision = VisionTransformer(vit)
    return Captioner(vision, med) if kind == "captioner" else Filter(vision, med, embed_dim=embed_dim)


def _our_weights(state: State, kind: Kind, model: Captioner | Filter, sizes: Sizes) -> State:
    """A state dict of `model` from transformers'; refuses missing, unknown and odd weights."""
    vit, med, _ = sizes
    ours = from_transformers(state, kind, vision_depth=vit.depth, text_depth=med.depth)
    refuse_odd_shapes(ours, model.state_dict())
    return ours


def _refuse_other_resizing(folder: Path, preparation: ImagePreparation) -> None:
    """What the folder says of resizing must be what is done."""
    processor, side = read_image_processor(folder), preparation.image_size_px
    if "size" not in processor:
        return
    size, resample = processor["size"], processor.get("resample", _BICUBIC)
    sides = {size} if isinstance(size, int) else {size.get("height"), size.get("width")}
    if sides != {side} or resample != _BICUBIC:
        raise UsageError(
            f"The image processor in {folder} asks for size {size} and resampling {resample}; expected "
            f"{side} x {side} as in config.json, and bicubic ({_BICUBIC})."
        )


def tokenizer_dir(path: Path) -> Path:
    """Where the tokenizer of an original .pth is: beside it, else BERT's from the hub's cache or the network."""
    if any((path.parent / name).is_file() for name in _VOCABULARY_FILES):
        return path.parent
    return download_snapshot(BERT_TOKENIZER, _TOKENIZER_FILES, f"and copy the files beside {path.name}")


def _load_tokenizer(folder: Path, med: MEDConfig) -> Any:
    if not any((folder / name).is_file() for name in _VOCABULARY_FILES):
        raise UsageError(f"{folder} has neither tokenizer.json nor vocab.txt. Copy them from the model's source.")
    tokenizer = load_tokenizer(folder, is_bert=True)
    if tokenizer.sep_token_id != med.sep_token_id or len(tokenizer) > med.vocab_size:
        raise UsageError(
            f"The tokenizer in {folder} has {len(tokenizer)} tokens and [SEP] {tokenizer.sep_token_id}; the "
            f"model has {med.vocab_size} and {med.sep_token_id}. Give the folder the model's own tokenizer."
        )
    return tokenizer


def preprocessor_config(preparation: ImagePreparation) -> dict[str, Any]:
    """preprocessor_config.json of how images are prepared."""
    side = preparation.image_size_px
    return {
        "image_processor_type": "BlipImageProcessor", "processor_class": "BlipProcessor",
        "do_convert_rgb": True, "do_resize": True, "size": {"height": side, "width": side}, "resample": 3,
        "do_rescale": True, "rescale_factor": 1 / 255,
        "do_normalize": True, "image_mean": list(preparation.mean), "image_std": list(preparation.std),
    }  # fmt: skip


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
