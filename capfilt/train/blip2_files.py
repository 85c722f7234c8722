"""A BLIP-2 as it lies on disk, ours or published, read into one form.

In: a folder or hub id in transformers' layout (`Blip2ForImageTextRetrieval`, `Blip2ForConditionalGeneration`,
safetensors sharded or not, or .bin), or a .pth of LAVIS's. Out: sizes, weights by transformers' names, image encoder,
tokenizer's folder. Nothing is unpickled, and no code of a checkpoint runs.

A .pth of LAVIS's may lack the image encoder, and always lacks the language model: what is frozen was not saved.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from capfilt.data.commit import file_sha256
from capfilt.errors import UsageError
from capfilt.models.convert_blip2 import State, refuse_unknown, sizes_from_config, stage1_names, stage2_names
from capfilt.models.convert_lavis import from_lavis
from capfilt.models.qformer import QFormerConfig
from capfilt.weights.blip import tokenizer_dir
from capfilt.weights.find import find_model_dir
from capfilt.weights.image_encoders import (
    CLIP_TOWER_DIR,
    GIVE_IMAGE_ENCODER,
    ImageEncoder,
    Tower,
    blip2_tower,
    build_image_encoder,
    load_image_encoder,
    read_blip2_config,
    read_clip_tower,
    read_lavis_tower,
)
from capfilt.weights.model_files import (
    load_tokenizer,
    named_classes,
    naming,
    read_config,
    read_preparation,
    read_safetensors,
    read_tensors,
    read_weights,
    weights_digest,
)

STAGES = {"Blip2ForImageTextRetrieval": "stage1", "Blip2ForConditionalGeneration": "stage2"}
"""transformers' class → the stage that trains it."""
EXTRA_FILE = "stage1_extra.safetensors"
"""Beside a stage-1 model of ours: what transformers' layout has no room for."""
LLM_PREFIX = "language_model."
DEC_TOKEN_KEY = "capfilt_dec_token_id"

_LAVIS_ENDINGS = (".pth", ".pt")
_VISION, _NORM = "vision_model.", "vision_model.post_layernorm."


@dataclass(frozen=True)
class Blip2Files:
    """What was read; weights by transformers' names, without image encoder and language model."""

    name: str
    stage: str
    """stage1 or stage2."""
    qformer: QFormerConfig
    state: State
    side_dir: Path
    """Where the tokenizer is."""
    tower: Tower | None
    """The image encoder; None where the file has none."""
    embed_dim: int = 0
    """Stage 1: width of ITC's embeddings."""
    dec_token_id: int | None = None
    """Stage 1: [DEC]; None where the tokenizer has to say."""
    extra: State = field(default_factory=dict)
    """Stage 1: temperature and head of ITG, by our names; empty where there are none."""
    llm_config: Any = None
    """Stage 2: the language model's configuration; None where the file has none."""
    llm_state: State = field(default_factory=dict)
    llm_family: str | None = None
    """Stage 2: `opt` or `t5`."""

    def load_tokenizer(self) -> Any:
        """The tokenizer beside it: of the Q-Former's texts in stage 1, of the language model in stage 2."""
        return load_tokenizer(self.side_dir, is_bert=self.stage == "stage1")

    def load_image_encoder(
        self,
        device: torch.device,
        *,
        image_encoder: str = "",
        layer: str = "auto",
        image_size_px: int | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> ImageEncoder:
        """Its own image encoder, or the one named where it has none. UsageError where both are, or none is."""
        if self.tower is not None and image_encoder:
            raise UsageError(f"{self.name} has an image encoder of its own. Leave --image-encoder out.")
        if self.tower is not None and layer != "auto":
            raise UsageError(f"{self.name} was trained on features of its own. Leave --image-encoder-layer out.")
        if self.tower is None and not image_encoder:
            raise UsageError(f"{self.name} holds no image encoder. Give --image-encoder: {GIVE_IMAGE_ENCODER}.")
        if self.tower is not None:
            with naming(self.name):
                return build_image_encoder(self.tower, device, image_size_px=image_size_px, dtype=dtype)
        encoder = load_image_encoder(image_encoder, device, layer=layer, image_size_px=image_size_px, dtype=dtype)
        width = encoder.vision.config.width
        if width != self.qformer.vision_width:
            raise UsageError(
                f"The image encoder {image_encoder} gives features of width {width}; {self.name} was trained on "
                f"{self.qformer.vision_width}."
            )
        return encoder


def read_blip2(name: str | Path, stage: str | None = None) -> Blip2Files:
    """The BLIP-2 that `name` means; with a stage, UsageError where it is not that one's."""
    path = Path(name).expanduser()
    if _is_lavis(path):
        with naming(path):
            return _checked(_read_lavis(path), stage)
    folder = _find_folder(name, stage)
    _checked_config(folder, stage)
    with naming(folder):
        return _read_folder(folder)


def find_stage(name: str | Path) -> str:
    """stage1 or stage2, of which `name` is; errors as `read_blip2`."""
    path = Path(name).expanduser()
    if _is_lavis(path):
        return read_blip2(path).stage
    return str(_stage_of(_checked_config(_find_folder(name, None), None)))


def is_blip2_file(path: Path) -> bool:
    """Whether a .pth is LAVIS's of a BLIP-2, and not one of another model."""
    return _is_lavis(path) and "query_tokens" in read_tensors(path)


def blip2_digest(name: str | Path) -> str:
    """sha256 of what `name` contains; where it lies may change."""
    path = Path(name).expanduser()
    if _is_lavis(path):
        return file_sha256(path)
    return weights_digest(_find_folder(name, None))


def _read_folder(folder: Path) -> Blip2Files:
    config = read_blip2_config(folder)
    stage = _stage_of(read_config(folder))
    assert stage is not None
    state = read_weights(folder)
    vision, qformer = sizes_from_config(config)
    names = stage1_names(qformer) if stage == "stage1" else stage2_names(qformer)
    own = {key: tensor for key, tensor in state.items() if not _is_frozen(key)}
    refuse_unknown(own, names, ignored_prefixes=("embeddings.position_ids",))
    if (inner := folder / CLIP_TOWER_DIR).is_dir():
        tower = read_clip_tower(inner)
    else:
        tower = blip2_tower(config, state, read_preparation(folder, vision.image_size_px))
    files = Blip2Files(name=str(folder), stage=stage, qformer=qformer, state=own, side_dir=folder, tower=tower)
    if stage == "stage2":
        llm = {k.removeprefix(LLM_PREFIX): v for k, v in state.items() if k.startswith(LLM_PREFIX)}
        family = config.text_config.model_type
        return replace(files, llm_config=config.text_config, llm_state=llm, llm_family=family)
    extra = folder / EXTRA_FILE
    return replace(
        files,
        embed_dim=config.image_text_hidden_size,
        dec_token_id=getattr(config, DEC_TOKEN_KEY, qformer.vocab_size - 1),
        extra=read_safetensors(extra) if extra.exists() else {},
    )


def _is_lavis(path: Path) -> bool:
    return path.is_file() and path.suffix in _LAVIS_ENDINGS


def _is_frozen(key: str) -> bool:
    return key.startswith(LLM_PREFIX) or (key.startswith(_VISION) and not key.startswith(_NORM))


def _read_lavis(path: Path) -> Blip2Files:
    state = read_tensors(path)
    found = from_lavis(state)
    has_tower = any(key.startswith("visual_encoder.") for key in state)
    stage = "stage1" if found.llm_family is None else "stage2"
    return Blip2Files(
        name=str(path),
        stage=stage,
        qformer=found.qformer,
        state=found.state,
        side_dir=tokenizer_dir(path) if stage == "stage1" else path.parent,
        tower=read_lavis_tower(state, str(path)) if has_tower else None,
        embed_dim=found.embed_dim,
        extra=found.extra,
        llm_family=found.llm_family,
    )


def _find_folder(name: str | Path, stage: str | None) -> Path:
    command = stage or "stage1"
    saved = f"what `capfilt train {command} RUN --output DIR` saved"
    give = f"{saved}, or a BLIP-2's folder, hub id (owner/name) or .pth of LAVIS's"
    return find_model_dir(str(name), f"model of `capfilt train {command}`", embedded=None, give=give)


def _checked_config(folder: Path, stage: str | None) -> dict[str, Any]:
    """config.json; UsageError where it is not a BLIP-2's of the stage."""
    raw = read_config(folder)
    found = _stage_of(raw)
    if found is None or (stage is not None and found != stage):
        expected = [name for name, trained in STAGES.items() if stage in (None, trained)]
        raise UsageError(
            f"{folder} holds {', '.join(named_classes(raw)) or 'no model'}; expected {' or '.join(expected)}. "
            f"Make one: `capfilt train {stage or 'stage1'} RUN --output DIR`."
        )
    return raw


def _stage_of(config: dict[str, Any]) -> str | None:
    return next((STAGES[name] for name in named_classes(config) if name in STAGES), None)


def _checked(files: Blip2Files, stage: str | None) -> Blip2Files:
    if stage is not None and files.stage != stage:
        raise UsageError(f"{files.name} was saved by LAVIS after {files.stage}; expected one of {stage}.")
    return files
