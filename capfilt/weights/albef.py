"""ALBEF on disk: read from our folders and from the original release's .pth, written as both.

In: a folder of ours or an original .pth. Out: our module with its weights, tokenizer and image preparation; and back:

    config.json             sizes; those of the text encoder as a BertConfig has them
    model.safetensors       the original's names without `text_encoder.`: bert.*, cls.predictions.*, visual_encoder.*, …
    momentum.safetensors    momentum encoders and queue by the original's names, to go on training with
    preprocessor_config.json, tokenizer

transformers has no ALBEF: its BERT attends to images in every layer or in none. Of a folder transformers opens the
text encoder (`BertModel.from_pretrained(folder, add_pooling_layer=False)`), the tokenizer and the image processor. No
code of a checkpoint runs.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from capfilt.data.commit import file_sha256
from capfilt.errors import UsageError
from capfilt.models.albef import Albef, AlbefConfig
from capfilt.models.convert_albef import (
    AlbefWeights,
    as_pre_trained,
    bert_config,
    from_original,
    has_head,
    is_original,
    sizes_from_original,
    to_original,
    without_copies,
)
from capfilt.models.convert_blip import ORIGINAL_HEAD_WIDTH
from capfilt.models.convert_blip2 import State
from capfilt.models.convert_vit import HEAD_WIDTH, TIMM_LAYER_NORM_EPS
from capfilt.models.vit import VisionTransformer, ViTConfig
from capfilt.weights.blip import preprocessor_config, tokenizer_dir
from capfilt.weights.devices import name_dtype
from capfilt.weights.find import find_model_dir
from capfilt.weights.model_files import (
    ImagePreparation,
    load_tokenizer,
    naming,
    read_config,
    read_preparation,
    read_safetensors,
    read_tensors,
    read_weights,
    refuse_odd_shapes,
    reset_padding,
    save_tensors,
)

MOMENTUM_FILE = "momentum.safetensors"
ORIGINAL_FILE = "albef.pth"
"""Beside our folder's files, where the original's layout is asked for."""

_MODEL_TYPE = "albef"
_TOKEN_IDS = ("pad_token_id", "cls_token_id", "sep_token_id", "mask_token_id")
_SHORT = ("bert.", "cls.")
_PREFIX = "text_encoder."


@dataclass(frozen=True)
class LoadedAlbef:
    """A model, with what prepares its inputs and what its training goes on from."""

    model: Albef
    tokenizer: Any
    preparation: ImagePreparation
    temperature: Tensor = field(default_factory=lambda: torch.tensor([0.07]))
    """(1,), of ITC."""
    momentum: State | None = None
    """Of `MomentumAlbef`; None where the files have none."""
    digests: dict[str, str] = field(default_factory=dict)
    """File name → sha256 of every file that was read."""


def load_albef(
    name: str, *, device: torch.device, dtype: torch.dtype = torch.float32, resizer: str = "torchvision"
) -> LoadedAlbef:
    """Read an ALBEF to run it, frozen: a folder of ours, a hub id of such, or an original .pth.

    One that was fine-tuned for retrieval comes without a head of MLM.

    Raises UsageError naming what is missing: the folder, a file, every missing and unknown weight.
    """
    loaded = _load(name, fine_tuned=True)
    loaded.model.to(device=device, dtype=dtype).eval().requires_grad_(False)
    return replace(loaded, preparation=replace(loaded.preparation, resizer=resizer), momentum=None)


def load_trainable_albef(name: str) -> LoadedAlbef:
    """The same to train it, in float32, with its momentum encoders and queue; from pre-training only."""
    return _load(name, fine_tuned=False)


def is_original_albef(path: Path) -> bool:
    """Whether a file holds an original ALBEF. UsageError where it cannot be read."""
    return is_original(read_tensors(path))


def _load(name: str, *, fine_tuned: bool) -> LoadedAlbef:
    """`fine_tuned`: one without the head of MLM will do."""
    path = Path(name).expanduser()
    if path.is_file():
        state, side_dir = as_pre_trained(read_tensors(path)), tokenizer_dir(path)
        with naming(path):
            vit, config, embed_dim = sizes_from_original(state)
        tokenizer = load_tokenizer(side_dir, is_bert=True)
        config = replace(config, **{name: getattr(tokenizer, name) for name in _TOKEN_IDS})
        preparation = ImagePreparation(vit.image_size_px)
    else:
        side_dir = find_albef_dir(name)
        vit, config, embed_dim = read_albef_sizes(side_dir)
        state, tokenizer = _read_folder(side_dir), load_tokenizer(side_dir, is_bert=True)
        preparation = read_preparation(side_dir, vit.image_size_px)
    model = Albef(VisionTransformer(vit), config, embed_dim=embed_dim)
    with naming(path if path.is_file() else side_dir):
        weights = from_original(
            {key: tensor.float() if tensor.is_floating_point() else tensor for key, tensor in state.items()},
            vision_depth=vit.depth, text_depth=config.text_depth, fusion_depth=config.fusion_depth,
            with_head=has_head(state) or not fine_tuned,
        )  # fmt: skip
        if not any(name.startswith("head.") for name in weights.model):
            model.head = nn.Identity()  # pyright: ignore[reportAttributeAccessIssue]
        refuse_odd_shapes(weights.model, model.state_dict())
    model.load_state_dict(weights.model)
    refuse_other_tokenizer(tokenizer, config, side_dir)
    digests = albef_digests(path if path.is_file() else side_dir)
    return LoadedAlbef(model, tokenizer, preparation, weights.temperature, weights.momentum, digests)


def albef_digests(path: Path) -> dict[str, str]:
    """File name → sha256 of an original .pth, or of what belongs to the model in a folder."""
    files = [path] if path.is_file() else [file for file in sorted(path.iterdir()) if _is_of_model(file)]
    return {file.name: file_sha256(file) for file in files}


def find_albef_dir(name: str) -> Path:
    """The folder that `name` means. UsageError where there is none."""
    return find_model_dir(
        name, "ALBEF", embedded=None, give="what `capfilt train albef` saved, or the release's ALBEF.pth"
    )


def read_albef_sizes(folder: Path) -> tuple[ViTConfig, AlbefConfig, int]:
    """Sizes (image, text, width of ITC's embedding) in config.json. UsageError where it is no ALBEF's."""
    config = read_config(folder)
    if config.get("model_type") != _MODEL_TYPE:
        raise UsageError(
            f"{folder} is a {config.get('model_type')!r} model; expected an {_MODEL_TYPE!r} one. Give what `capfilt "
            "train albef` saved, or the release's ALBEF.pth."
        )
    try:
        vit = ViTConfig(**config["vision_config"])
        text = AlbefConfig(
            vocab_size=config["vocab_size"], width=config["hidden_size"],
            depth=config["num_hidden_layers"] + config["fusion_depth"], text_depth=config["num_hidden_layers"],
            num_heads=config["num_attention_heads"], mlp_width=config["intermediate_size"],
            max_positions=config["max_position_embeddings"], vision_width=vit.width,
            layer_norm_eps=config["layer_norm_eps"], dropout=config["hidden_dropout_prob"],
            **{name: config[name] for name in _TOKEN_IDS},
        )  # fmt: skip
        return vit, text, int(config["embed_dim"])
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{folder}/config.json describes no ALBEF ({error}). Fetch it again.") from error


def save_albef(folder: Path, saved: LoadedAlbef, *, original: bool = False) -> None:
    """Write a folder; with `original` the release's .pth too, which repeats all weights.

    UsageError for a model that the .pth cannot describe.
    """
    if original:
        refuse_unlike_original(saved.model)
    folder.mkdir(parents=True, exist_ok=True)
    model, vit = saved.model, saved.model.vision.config
    config = {
        "model_type": _MODEL_TYPE, "architectures": ["Albef"], **bert_config(model.config),
        "fusion_depth": model.config.fusion_depth, "embed_dim": model.text_projection.out_features,
        "vision_config": asdict(vit), "dtype": name_dtype(torch.float32),
        **{name: getattr(model.config, name) for name in _TOKEN_IDS},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    preprocessor = preprocessor_config(saved.preparation)
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor, indent=2) + "\n")
    reset_padding(saved.tokenizer)
    saved.tokenizer.save_pretrained(folder)
    ours = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    slow = None if saved.momentum is None else {name: t.detach().cpu() for name, t in saved.momentum.items()}
    weights = AlbefWeights(ours, saved.temperature.detach().cpu(), slow)
    depths = {"text_depth": model.config.text_depth, "fusion_depth": model.config.fusion_depth}
    theirs = to_original(weights, vision_depth=vit.depth, **depths)
    if original:
        torch.save({"model": theirs}, folder / ORIGINAL_FILE)
    once = without_copies(theirs)
    plain = to_original(replace(weights, momentum=None), vision_depth=vit.depth, **depths)
    for_training = {name: tensor for name, tensor in once.items() if name not in plain}
    own = {name.removeprefix(_PREFIX): tensor for name, tensor in once.items() if name in plain}
    save_tensors(folder / "model.safetensors", own)
    if for_training:
        save_tensors(folder / MOMENTUM_FILE, for_training)


def refuse_unlike_original(model: Albef) -> None:
    """UsageError for sizes that an original .pth does not state and the release has otherwise."""
    vit, text = model.vision.config, model.config
    found = (vit.width // vit.num_heads, text.width // text.num_heads, vit.layer_norm_eps, text.layer_norm_eps)
    expected = (HEAD_WIDTH, ORIGINAL_HEAD_WIDTH, TIMM_LAYER_NORM_EPS, AlbefConfig.layer_norm_eps)
    if found != expected:
        raise UsageError(
            f"Attention heads of width {found[0]} (image) and {found[1]} (text), layer norms with {found[2]} and "
            f"{found[3]}; expected {expected}: the original's layout does not state them. Leave --save-original away."
        )


def refuse_other_tokenizer(tokenizer: Any, config: AlbefConfig, where: object) -> None:
    """UsageError where a tokenizer's tokens are not the model's."""
    ids = {name: getattr(tokenizer, name) for name in _TOKEN_IDS}
    odd = {name: found for name, found in ids.items() if found != getattr(config, name)}
    if odd or len(tokenizer) > config.vocab_size:
        expected = {name: getattr(config, name) for name in odd}
        raise UsageError(
            f"The tokenizer of {where} has {len(tokenizer)} tokens and {odd}; the model has {config.vocab_size} and "
            f"{expected}. Give the folder the model's own tokenizer."
        )


def _is_of_model(file: Path) -> bool:
    return file.suffix in (".json", ".safetensors", ".txt") and file.name != "training.json"


def _read_folder(folder: Path) -> State:
    """By the original's names."""
    state = {f"{_PREFIX}{key}" if key.startswith(_SHORT) else key: t for key, t in read_weights(folder).items()}
    momentum = folder / MOMENTUM_FILE
    return state | read_safetensors(momentum) if momentum.is_file() else state
