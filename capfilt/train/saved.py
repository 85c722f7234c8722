"""Saved BLIP-2 models: folders that plain transformers opens, and their way back.

In: modules. Out: `Blip2ForImageTextRetrieval` (stage 1) or `Blip2ForConditionalGeneration` (stage 2) folders:
config.json, model.safetensors, processor and tokenizer; for stage 1 also stage1_extra.safetensors with what
transformers' layout has no room for (ITG head, temperature), from which training can go on. The image encoder is saved
in float32, whatever it computed in. A CLIP's has no room in transformers' BLIP-2 and is saved beside the rest, in
image_encoder/ (`capfilt.train.clip_tower` puts both together).

Back: those folders, published ones and LAVIS's .pth (`capfilt.train.blip2_files`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from capfilt.errors import UsageError
from capfilt.models.blip2 import Stage1, Stage2, Texts
from capfilt.models.convert_blip2 import (
    EXTRA_STAGE1_KEYS,
    State,
    blip2_config,
    stage1_names,
    stage2_names,
    to_ours,
    to_theirs,
    vision_names,
)
from capfilt.models.llms import LanguageModel
from capfilt.train.blip2_files import (
    DEC_TOKEN_KEY,
    EXTRA_FILE,
    LLM_PREFIX,
    Blip2Files,
    read_blip2,
)
from capfilt.train.clip_tower import save_clip_tower
from capfilt.train.tokens import tokenise
from capfilt.weights.image_encoders import CLIP_TOWER_DIR, ImageEncoder
from capfilt.weights.llms import build_llm, llm_for_blip2
from capfilt.weights.model_files import ImagePreparation, naming, refuse_odd_shapes, reset_padding, save_tensors

IMAGE_TOKEN = "<image>"
"""Stands for a query output in the language model's input; transformers looks for it there."""


@dataclass(frozen=True)
class SavedStage1:
    """A stage-1 model with all it needs to read images and texts."""

    encoder: ImageEncoder
    stage: Stage1
    tokenizer: Any
    embed_dim: int


@dataclass(frozen=True)
class SavedStage2:
    """A stage-2 model with all it needs to read images and write texts."""

    encoder: ImageEncoder
    stage: Stage2


def encode_texts(
    tokenizer: Any, texts: list[str], max_tokens: int, device: torch.device, *, to_the_longest: bool = True
) -> Texts:
    """[CLS] … [SEP], padded to the longest or to `max_tokens`."""
    tokens_BT, mask_BT = tokenise(tokenizer, texts, max_tokens, to_the_longest=to_the_longest)
    return Texts(tokens=tokens_BT.to(device), mask=mask_BT.to(device))


def save_stage1(folder: Path, encoder: ImageEncoder, stage: Stage1, tokenizer: Any, embed_dim: int) -> None:
    """Writes a `Blip2ForImageTextRetrieval` folder."""
    state = {name: p.detach() for name, p in stage.named_parameters()}
    extra = {name: state.pop(name) for name in EXTRA_STAGE1_KEYS}
    config = blip2_config(encoder.vision.config, stage.qformer.config, embed_dim=embed_dim)
    setattr(config, DEC_TOKEN_KEY, stage.dec_token_id)
    own = to_theirs(state, stage1_names(stage.qformer.config))
    _write(folder, config, "Blip2ForImageTextRetrieval", own, encoder)
    save_tensors(folder / EXTRA_FILE, extra)
    _save_processor(folder, encoder.preparation, tokenizer, num_query_tokens=0)


def load_stage1(
    name: str | Path,
    device: torch.device,
    *,
    image_encoder: str = "",
    layer: str = "auto",
    image_size_px: int | None = None,
    dtype: torch.dtype = torch.float32,
    dropout: float | None = None,
) -> SavedStage1:
    """A stage-1 model of ours, any `Blip2ForImageTextRetrieval` (temperature and ITG head are new then) or LAVIS's.

    Args:
        image_encoder: as for `load_image_encoder`, where the model has none of its own (some .pth); `layer` is its.
        image_size_px: side of the images where it is to be another than the encoder's.
        dtype: precision of the frozen image encoder.
        dropout: the Q-Former's in further training; None as it was saved.
    """
    files = read_blip2(name, "stage1")
    encoder = files.load_image_encoder(
        device, image_encoder=image_encoder, layer=layer, image_size_px=image_size_px, dtype=dtype
    )
    tokenizer = files.load_tokenizer()
    stage = _build_stage1(files, encoder, tokenizer, dropout)
    return SavedStage1(encoder, stage.to(device), tokenizer, files.embed_dim)


def save_stage2(folder: Path, encoder: ImageEncoder, stage: Stage2) -> None:
    """Writes a `Blip2ForConditionalGeneration` folder; the language model's weights are part of it."""
    llm, qformer = stage.llm, stage.qformer.config
    own = {n: p.detach() for n, p in stage.named_parameters() if not n.startswith("llm.")}
    image_token_id = _add_image_token(llm.tokenizer)
    text_config, llm_state = llm_for_blip2(llm, image_token_id)
    theirs = to_theirs(own, stage2_names(qformer)) | {LLM_PREFIX + name: t for name, t in llm_state.items()}
    config = blip2_config(encoder.vision.config, qformer, text_config=text_config, image_token_id=image_token_id)
    _write(folder, config, "Blip2ForConditionalGeneration", theirs, encoder)
    _save_processor(folder, encoder.preparation, llm.tokenizer, num_query_tokens=qformer.num_queries)


def load_stage2(
    name: str | Path,
    device: torch.device,
    llm_dtype: torch.dtype | None = None,
    *,
    llm: LanguageModel | None = None,
    image_encoder: str = "",
    image_size_px: int | None = None,
    dtype: torch.dtype = torch.float32,
    dropout: float | None = None,
) -> SavedStage2:
    """A stage-2 model of ours, any `Blip2ForConditionalGeneration` with an OPT or a T5, or LAVIS's with `llm`.

    Arguments as `load_stage1`; `llm_dtype` None keeps the precision the language model was saved in.
    """
    files = read_blip2(name, "stage2")
    encoder = files.load_image_encoder(device, image_encoder=image_encoder, image_size_px=image_size_px, dtype=dtype)
    llm = _choose_llm(files, llm, device, llm_dtype)
    stage = Stage2(_with_dropout(files, dropout), llm, vision_norm_eps=encoder.vision.config.layer_norm_eps)
    with naming(files.name):
        ours = to_ours(files.state, stage2_names(files.qformer))
        refuse_odd_shapes(ours, stage.state_dict())
    stage.load_state_dict(ours, strict=False)  # the language model's are in place already
    return SavedStage2(encoder, stage.to(device))


def start_stage2(
    name: str | Path,
    llm: LanguageModel,
    dropout: float,
    device: torch.device,
    *,
    image_encoder: str = "",
    dtype: torch.dtype = torch.float32,
) -> SavedStage2:
    """A stage-2 model whose Q-Former comes from a stage-1 model; its text side is left behind."""
    saved = load_stage1(name, device, image_encoder=image_encoder, dtype=dtype)
    return connect_llm(saved, llm, dropout, device)


def connect_llm(saved: SavedStage1, llm: LanguageModel, dropout: float, device: torch.device) -> SavedStage2:
    """A stage-2 model with the Q-Former of a stage-1 model, trained or new; the projection is drawn at random."""
    config = replace(saved.stage.qformer.config, with_text=False, dropout=dropout)
    stage = Stage2(config, llm, vision_norm_eps=saved.encoder.vision.config.layer_norm_eps)
    wanted = set(dict(stage.qformer.named_parameters()))
    stage.qformer.load_state_dict({k: v for k, v in saved.stage.qformer.state_dict().items() if k in wanted})
    stage.vision_norm.load_state_dict(saved.stage.vision_norm.state_dict())
    return SavedStage2(saved.encoder, stage.to(device))


def dec_token_id_of(tokenizer: Any, bos_token_id: int | None = None) -> int:
    """[DEC] by name; else BLIP's bos (its released tokenizer lacks the name); else a new last row."""
    named = tokenizer.get_vocab().get("[DEC]")
    return int(named if named is not None else bos_token_id or len(tokenizer))


def _build_stage1(files: Blip2Files, encoder: ImageEncoder, tokenizer: Any, dropout: float | None) -> Stage1:
    dec_token_id = dec_token_id_of(tokenizer) if files.dec_token_id is None else files.dec_token_id
    if dec_token_id >= files.qformer.vocab_size:
        raise UsageError(
            f"The tokenizer in {files.side_dir} has {len(tokenizer)} tokens; {files.name} knows "
            f"{files.qformer.vocab_size}, [DEC] included. Put the model's own tokenizer there."
        )
    stage = Stage1(
        _with_dropout(files, dropout),
        embed_dim=files.embed_dim,
        dec_token_id=dec_token_id,
        vision_norm_eps=encoder.vision.config.layer_norm_eps,
    )
    new = {name: tensor for name, tensor in stage.state_dict().items() if name in EXTRA_STAGE1_KEYS}
    with naming(files.name):
        ours = to_ours(files.state, stage1_names(files.qformer)) | (files.extra or new)
        ours["temperature"] = ours["temperature"].reshape(1)  # a scalar in LAVIS's files
        ours["lm_head.vocabulary.weight"] = ours["qformer.word_embedding.weight"]
        refuse_odd_shapes(ours, stage.state_dict())
    stage.load_state_dict(ours)
    return stage


def _with_dropout(files: Blip2Files, dropout: float | None) -> Any:
    return files.qformer if dropout is None else replace(files.qformer, dropout=dropout)


def _choose_llm(
    files: Blip2Files, llm: LanguageModel | None, device: torch.device, dtype: torch.dtype | None
) -> LanguageModel:
    """The model's own language model, or the one given where it has none."""
    if files.llm_config is not None:
        if llm is not None:
            raise UsageError(f"{files.name} has a language model of its own. Leave --llm out.")
        return build_llm(files.llm_config, files.llm_state, files.load_tokenizer(), device, dtype)
    if llm is None:
        raise UsageError(f"{files.name} holds no language model: LAVIS saves none. Give --llm the one it had.")
    width, family = len(files.state["language_projection.weight"]), llm.model.config.model_type
    if (llm.width, family) != (width, files.llm_family):
        raise UsageError(
            f"{files.name} was trained on a {files.llm_family!r} of width {width}; "
            f"--llm is a {family!r} of {llm.width}."
        )
    return llm


def _write(folder: Path, config: Any, architecture: str, own: State, encoder: ImageEncoder) -> None:
    config.architectures = [architecture]
    if encoder.fits_blip2:
        state = {name: tensor.float() for name, tensor in encoder.vision.state_dict().items()}
        own = to_theirs(state, vision_names(encoder.vision.config.depth)) | own
    else:
        config.capfilt_image_encoder = CLIP_TOWER_DIR
        save_clip_tower(folder / CLIP_TOWER_DIR, encoder)
    config.save_pretrained(folder)
    save_tensors(folder / "model.safetensors", own)


def _save_processor(folder: Path, preparation: ImagePreparation, tokenizer: Any, *, num_query_tokens: int) -> None:
    """`num_query_tokens` image tokens go before a text: a language model's input needs them, ITM's none."""
    from transformers import Blip2Processor, BlipImageProcessor

    side = preparation.image_size_px
    images = BlipImageProcessor(
        size={"height": side, "width": side},
        image_mean=list(preparation.mean),
        image_std=list(preparation.std),
    )
    reset_padding(tokenizer)
    Blip2Processor(images, tokenizer, num_query_tokens=num_query_tokens).save_pretrained(folder)


def _add_image_token(tokenizer: Any) -> int:
    """The id of <image>, added to the tokenizer where it is not there yet."""
    tokenizer.add_tokens([IMAGE_TOKEN], special_tokens=True)
    return int(tokenizer.convert_tokens_to_ids(IMAGE_TOKEN))
