"""What BLIP's trainings start from: an earlier result, published weights of ViT and BERT, or nothing.

In: settings. Out: the model with its tokenizer and image preparation, and a digest that identifies what was read.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from capfilt.errors import UsageError
from capfilt.models.blip import Blip
from capfilt.models.convert_blip import Kind, med_from_bert
from capfilt.models.convert_blip2 import head_start
from capfilt.models.med import Captioner, Filter, MEDConfig
from capfilt.models.vit import VisionTransformer, change_image_size
from capfilt.settings import BlipTrainSettings
from capfilt.train.pretrained import copy_start
from capfilt.train.starts import bert_sizes, find_bert, new_vision, sizes_from_settings
from capfilt.weights.blip import LoadedBlip, blip_digest, load_trainable_blip
from capfilt.weights.find import SIDE_FILES, find_model_dir
from capfilt.weights.model_files import (
    ImagePreparation,
    load_tokenizer,
    read_weights,
    tokenizer_digest,
    weights_digest,
)
from capfilt.weights.vit import load_vit_start

DEFAULT_IMAGE_SIZE_PX = 224
"""From nothing (BLIP §4.1: 224 in pre-training)."""

PARTS: tuple[Kind, ...] = ("captioner", "filter")


def start_blip(settings: BlipTrainSettings) -> tuple[Blip, LoadedBlip]:
    """The model of pre-training; UsageError where nothing says what it starts from."""
    return _start_from_init(settings) if settings.init else _start_anew(settings)


def origin_digest(settings: BlipTrainSettings, part: str) -> str:
    """What training starts from: both parts, one, or the tokenizer alone."""
    if not settings.init:
        named = [weights_digest(find_bert(settings.text_init))] if settings.text_init else []
        named += [load_vit_start(settings.vision_init).digest] if settings.vision_init else []
        return " ".join([*named, tokenizer_digest(_tokenizer_dir(settings.tokenizer or settings.text_init))])
    paths = _both_parts(settings.init).values() if part == "blip" else [part_of(settings.init, part)]
    return " ".join(blip_digest(path) for path in dict.fromkeys(paths))


def _tokenizer_dir(name: str) -> Path:
    return find_model_dir(name, "tokenizer", patterns=SIDE_FILES)


def load_part(settings: BlipTrainSettings, part: Kind) -> LoadedBlip:
    """The captioner or filter that fine-tuning starts from, for images of the size asked for."""
    start = load_trainable_blip(part_of(settings.init, part), part, settings.dropout)
    return _at_image_size(start, settings.image_size_px)


def _at_image_size(start: LoadedBlip, image_size_px: int | None) -> LoadedBlip:
    """The same for images of another size: its positions are interpolated (BLIP §4.1: 224 px, then 384)."""
    if image_size_px is None or image_size_px == start.preparation.image_size_px:
        return start
    try:
        change_image_size(start.model.vision, image_size_px)
    except ValueError as error:
        raise UsageError(f"--image-size-px {image_size_px}: {error}.") from None
    return replace(start, preparation=replace(start.preparation, image_size_px=image_size_px))


def part_of(init: str, part: str) -> Path:
    """The folder of a part in the output of `train blip`, the model folder, or an original .pth."""
    if (path := Path(init).expanduser()).is_file():
        return path
    folder = find_model_dir(init, f"BLIP {part} to start from", embedded=part)
    return folder / part if (folder / part / "config.json").exists() else folder


def _both_parts(init: str) -> dict[Kind, Path]:
    """The folders of captioner and filter in the output of `train blip`, or the original .pth that has both.

    UsageError for anything else.
    """
    if (path := Path(init).expanduser()).is_file():
        return dict.fromkeys(PARTS, path)
    folders: dict[Kind, Path] = {part: Path(init).expanduser() / part for part in PARTS}
    if not all((folder / "config.json").is_file() for folder in folders.values()):
        raise UsageError(
            f"{init} is no output of `capfilt train blip`, which has captioner/ and filter/ with shared weights; "
            f"pre-training goes on from that and from the release's model_base.pth alone: give --init one of them, or "
            f"start with --text-init or --tokenizer."
        )
    return folders


def _start_from_init(settings: BlipTrainSettings) -> tuple[Blip, LoadedBlip]:
    """Both parts of an earlier `train blip`; what they share must be equal."""
    parts = {
        part: _at_image_size(load_trainable_blip(folder, part, settings.dropout), settings.image_size_px)
        for part, folder in _both_parts(settings.init).items()
    }
    captioner, filter_model = parts["captioner"].model, parts["filter"].model
    assert isinstance(captioner, Captioner)
    assert isinstance(filter_model, Filter)
    config = filter_model.encoder.config
    model = Blip(
        VisionTransformer(filter_model.vision.config), config,
        embed_dim=filter_model.text_projection.out_features, label_smoothing=settings.label_smoothing,
    )  # fmt: skip
    model.captioner.load_state_dict(captioner.state_dict())
    model.filter.load_state_dict(filter_model.state_dict())  # over what both share
    model.filter_losses.contrast.start_at(parts["filter"].temperature)
    found = model.captioner.state_dict()
    if odd := [name for name, tensor in captioner.state_dict().items() if not torch.equal(tensor, found[name])]:
        raise UsageError(
            f"The captioner and the filter in {settings.init} differ in {len(odd)} of the weights that they share, the "
            f"first {odd[0]}; pre-training goes on from the output of `capfilt train blip` only."
        )
    return model, parts["captioner"]


def _blip_tokenizer(name: str) -> Any:
    """BERT's tokenizer; [DEC] (as bos) and [ENC] follow its tokens where it lacks them, as in BLIP's code.

    Raises UsageError for a tokenizer of another kind.
    """
    tokenizer = load_tokenizer(_tokenizer_dir(name))
    needed = {"[CLS]": tokenizer.cls_token_id, "[SEP]": tokenizer.sep_token_id, "[PAD]": tokenizer.pad_token_id}
    if missing := [token for token, token_id in needed.items() if token_id is None]:
        raise UsageError(
            f"The tokenizer {name} has no {', '.join(missing)}; expected one of BERT's kind. "
            "Give such a one: --tokenizer google-bert/bert-base-uncased."
        )
    names = tokenizer.get_vocab()
    if "[DEC]" not in names:
        tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    if "[ENC]" not in names:
        tokenizer.add_special_tokens({"additional_special_tokens": ["[ENC]"]}, replace_extra_special_tokens=False)
    return tokenizer


def _start_anew(settings: BlipTrainSettings) -> tuple[Blip, LoadedBlip]:
    if not settings.tokenizer and not settings.text_init:
        raise UsageError(
            "None of --init, --text-init and --tokenizer is given; name the output of `capfilt train blip` to go on "
            "from, a BERT to start from (google-bert/bert-base-uncased), or a tokenizer to start from nothing "
            "(`embedded`: the miniature world's)."
        )
    tokenizer = _blip_tokenizer(settings.tokenizer or settings.text_init)
    vision = new_vision(settings, DEFAULT_IMAGE_SIZE_PX)
    model = Blip(
        vision,
        _text_sizes(settings, tokenizer, vision.config.width),
        embed_dim=settings.embed_dim,
        label_smoothing=settings.label_smoothing,
    )
    if settings.text_init:
        _copy_bert(model, find_bert(settings.text_init))
    return model, LoadedBlip(model.captioner, tokenizer, ImagePreparation(vision.config.image_size_px))


def _text_sizes(settings: BlipTrainSettings, tokenizer: Any, vision_width: int) -> MEDConfig:
    """Those of the BERT to start from, else of the settings."""
    names = tokenizer.get_vocab()
    named = bert_sizes(find_bert(settings.text_init)) if settings.text_init else None
    return MEDConfig(
        vocab_size=len(tokenizer), vision_width=vision_width, dropout=settings.dropout,
        pad_token_id=tokenizer.pad_token_id, sep_token_id=tokenizer.sep_token_id,
        dec_token_id=names["[DEC]"], enc_token_id=names["[ENC]"],
        **(named or sizes_from_settings(settings, settings.text_depth)),
    )  # fmt: skip


def _copy_bert(model: Blip, folder: Path) -> None:
    """BERT's layers into encoder and decoder, its head into the captioner's (BLIP §4.1); cross-attention stays new."""
    state = read_weights(folder)
    weights = med_from_bert(state, model.filter.encoder.config.depth)
    copy_start(model.filter.encoder, weights)
    copy_start(model.captioner.decoder, weights)
    copy_start(model.captioner.head, head_start(state))
