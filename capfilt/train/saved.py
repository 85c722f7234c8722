"""Saved BLIP-2 models: folders that plain transformers opens, and their way back.

In: modules. Out: `Blip2ForImageTextRetrieval` (stage 1) or `Blip2ForConditionalGeneration` (stage 2) folders:
config.json, model.safetensors, processor and tokenizer; for stage 1 also stage1_extra.safetensors with what
transformers' layout has no room for (ITG head, temperature), from which training can go on.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from capfilt.errors import UsageError
from capfilt.models.blip2 import Stage1, Stage2, Texts
from capfilt.models.convert_blip2 import (
    EXTRA_STAGE1_KEYS,
    State,
    blip2_config,
    refuse_unknown,
    sizes_from_config,
    stage1_names,
    stage2_names,
    to_ours,
    to_theirs,
    vision_names,
)
from capfilt.models.llms import LLMS, LanguageModel, wrap_llm
from capfilt.train.pretrained import ImageEncoder, build_image_encoder
from capfilt.weights.find import find_model_dir
from capfilt.weights.model_files import (
    ImagePreparation,
    load_tokenizer,
    read_config,
    read_preparation,
    read_weights,
)

IMAGE_TOKEN = "<image>"
"""Stands for a query output in the language model's input; transformers looks for it there."""

_LLM_PREFIX = "language_model."
_DEC_TOKEN_KEY = "capfilt_dec_token_id"


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
    padding = "longest" if to_the_longest else "max_length"
    encoded = tokenizer(texts, padding=padding, truncation=True, max_length=max_tokens, return_tensors="pt")
    return Texts(tokens=encoded.input_ids.to(device), mask=encoded.attention_mask.bool().to(device))


def save_stage1(folder: Path, encoder: ImageEncoder, stage: Stage1, tokenizer: Any, embed_dim: int) -> None:
    """Writes a `Blip2ForImageTextRetrieval` folder."""
    state = {name: p.detach() for name, p in stage.named_parameters()}
    extra = {name: state.pop(name) for name in EXTRA_STAGE1_KEYS}
    config = blip2_config(encoder.vision.config, stage.qformer.config, embed_dim=embed_dim)
    setattr(config, _DEC_TOKEN_KEY, stage.dec_token_id)
    theirs = _vision_state(encoder) | to_theirs(state, stage1_names(stage.qformer.config))
    _write(folder, config, "Blip2ForImageTextRetrieval", theirs)
    _save_tensors(folder / "stage1_extra.safetensors", extra)
    _save_processor(folder, encoder.preparation, tokenizer, num_query_tokens=0)


def load_stage1(name: str | Path, device: torch.device) -> SavedStage1:
    """A stage-1 folder of ours, or any `Blip2ForImageTextRetrieval` (its ITG head is new then)."""
    folder, config, state = _read_blip2(name, "Blip2ForImageTextRetrieval", "stage1")
    vision, qformer = sizes_from_config(config)
    names = stage1_names(qformer)
    refuse_unknown(state, vision_names(vision.depth), names, ignored_prefixes=("embeddings.position_ids",))
    stage = Stage1(
        qformer,
        embed_dim=config.image_text_hidden_size,
        dec_token_id=getattr(config, _DEC_TOKEN_KEY, qformer.vocab_size - 1),
        vision_norm_eps=vision.layer_norm_eps,
    )
    ours = to_ours(state, names)
    extra = folder / "stage1_extra.safetensors"
    ours |= (
        load_file(extra) if extra.exists() else {k: v for k, v in stage.state_dict().items() if k in EXTRA_STAGE1_KEYS}
    )
    ours["temperature"] = ours["temperature"].reshape(1)
    ours["lm_head.vocabulary.weight"] = ours["qformer.word_embedding.weight"]
    stage.load_state_dict(ours)
    encoder = build_image_encoder(vision, state, read_preparation(folder, vision.image_size_px), device)
    return SavedStage1(encoder, stage.to(device), load_tokenizer(folder), config.image_text_hidden_size)


def save_stage2(folder: Path, encoder: ImageEncoder, stage: Stage2) -> None:
    """Writes a `Blip2ForConditionalGeneration` folder; the language model's weights are part of it."""
    llm, qformer = stage.llm, stage.qformer.config
    own = {n: p.detach() for n, p in stage.named_parameters() if not n.startswith("llm.")}
    theirs = _vision_state(encoder) | to_theirs(own, stage2_names(qformer))
    image_token_id = _add_image_token(llm.tokenizer)
    text_config, llm_state = _llm_for_blip2(llm, image_token_id)
    theirs |= {_LLM_PREFIX + name: tensor for name, tensor in llm_state.items()}
    config = blip2_config(encoder.vision.config, qformer, text_config=text_config, image_token_id=image_token_id)
    _write(folder, config, "Blip2ForConditionalGeneration", theirs)
    _save_processor(folder, encoder.preparation, llm.tokenizer, num_query_tokens=qformer.num_queries)


def load_stage2(name: str | Path, device: torch.device, llm_dtype: torch.dtype | None = None) -> SavedStage2:
    """A stage-2 folder of ours, or any `Blip2ForConditionalGeneration` with an OPT or a T5."""
    folder, config, state = _read_blip2(name, "Blip2ForConditionalGeneration", "stage2")
    vision, qformer = sizes_from_config(config)
    if config.text_config.model_type not in LLMS:
        raise UsageError(f"{folder} holds a {config.text_config.model_type!r}; expected one of {', '.join(LLMS)}.")
    names = stage2_names(qformer)
    refuse_unknown(state, vision_names(vision.depth), names, ignored_prefixes=(_LLM_PREFIX,))
    llm_state = {k.removeprefix(_LLM_PREFIX): v for k, v in state.items() if k.startswith(_LLM_PREFIX)}
    llm = _build_llm(config.text_config, llm_state, load_tokenizer(folder), device, llm_dtype)
    stage = Stage2(qformer, llm, vision_norm_eps=vision.layer_norm_eps)
    own = to_ours(state, names)
    _, unexpected = stage.load_state_dict(own, strict=False)  # the language model's are in place already
    assert not unexpected, unexpected
    encoder = build_image_encoder(vision, state, read_preparation(folder, vision.image_size_px), device)
    return SavedStage2(encoder, stage.to(device))


def start_stage2(name: str | Path, llm: LanguageModel, dropout: float, device: torch.device) -> SavedStage2:
    """A stage-2 model whose Q-Former comes from a stage-1 folder; its text side is left behind."""
    from dataclasses import replace

    saved = load_stage1(name, device)
    config = replace(saved.stage.qformer.config, with_text=False, dropout=dropout)
    stage = Stage2(config, llm, vision_norm_eps=saved.encoder.vision.config.layer_norm_eps)
    wanted = set(dict(stage.qformer.named_parameters()))
    stage.qformer.load_state_dict({k: v for k, v in saved.stage.qformer.state_dict().items() if k in wanted})
    stage.vision_norm.load_state_dict(saved.stage.vision_norm.state_dict())
    return SavedStage2(saved.encoder, stage.to(device))


def _vision_state(encoder: ImageEncoder) -> State:
    vision = encoder.vision
    return to_theirs(vision.state_dict(), vision_names(vision.config.depth))


def _write(folder: Path, config: Any, architecture: str, state: State) -> None:
    config.architectures = [architecture]
    config.save_pretrained(folder)
    _save_tensors(folder / "model.safetensors", state)


def _save_tensors(path: Path, state: State) -> None:
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(0o644)  # safetensors keeps its files to their owner


def _save_processor(folder: Path, preparation: ImagePreparation, tokenizer: Any, *, num_query_tokens: int) -> None:
    """`num_query_tokens` image tokens go before a text: a language model's input needs them, ITM's none."""
    from transformers import Blip2Processor, BlipImageProcessor

    side = preparation.image_size_px
    images = BlipImageProcessor(
        size={"height": side, "width": side},
        image_mean=list(preparation.mean),
        image_std=list(preparation.std),
    )
    tokenizer.backend_tokenizer.no_truncation()  # what the last batch was cut and padded to is no property
    tokenizer.backend_tokenizer.no_padding()
    Blip2Processor(images, tokenizer, num_query_tokens=num_query_tokens).save_pretrained(folder)


def read_stage1_image_size_px(name: str | Path) -> int:
    """Side of the images that a stage-1 folder's encoder takes; UsageError where it is something else."""
    _, config = _read_blip2_config(name, "Blip2ForImageTextRetrieval", "stage1")
    return config.vision_config.image_size


def _read_blip2(name: str | Path, architecture: str, command: str) -> tuple[Path, Any, State]:
    folder, config = _read_blip2_config(name, architecture, command)
    return folder, config, read_weights(folder)


def _read_blip2_config(name: str | Path, architecture: str, command: str) -> tuple[Path, Any]:
    from transformers import Blip2Config

    what = f"model of `capfilt train {command}`"
    give = f"what `capfilt train {command} RUN --output DIR` saved, or a BLIP-2's folder or hub id (owner/name)"
    folder = find_model_dir(str(name), what, embedded=None, give=give)
    raw = read_config(folder)
    if architecture not in (raw.get("architectures") or []):
        raise UsageError(
            f"{folder} holds {raw.get('architectures')}; expected {architecture}. "
            f"Make one: `capfilt train {command} RUN --output DIR`."
        )
    return folder, Blip2Config(**raw)


def _add_image_token(tokenizer: Any) -> int:
    """The id of <image>, added to the tokenizer where it is not there yet."""
    tokenizer.add_tokens([IMAGE_TOKEN], special_tokens=True)
    return int(tokenizer.convert_tokens_to_ids(IMAGE_TOKEN))


def _llm_for_blip2(llm: LanguageModel, image_token_id: int) -> tuple[Any, State]:
    """Config and weights (tied ones once) of the language model, with a row for <image> and its end token."""
    from copy import deepcopy

    config = deepcopy(llm.model.config)
    state = _without_tied(llm.model.state_dict())
    rows = llm.model.get_input_embeddings().weight.shape[0]
    if image_token_id >= rows:
        config.vocab_size = image_token_id + 1
        state = {k: _extended(v, image_token_id + 1) if v.shape[:1] == (rows,) else v for k, v in state.items()}
    if getattr(config, "bos_token_id", None) is None:  # T5: transformers starts a prompt of its own with it
        config.bos_token_id = llm.end_token_id
    config.eos_token_id = llm.end_token_id
    return config, state


def _without_tied(state: State) -> State:
    """Of tensors that share memory only the first, as safetensors and transformers expect."""
    first: dict[int, str] = {}
    for name, tensor in state.items():
        first.setdefault(tensor.data_ptr(), name)
    return {name: state[name] for name in first.values()}


def _extended(matrix: Tensor, rows: int) -> Tensor:
    """Further rows, each the mean of all: its logit is the mean logit, so never the highest."""
    mean = matrix.float().mean(dim=0, keepdim=True).to(matrix.dtype)
    return torch.cat([matrix, mean.expand(rows - len(matrix), *matrix.shape[1:])])


def _build_llm(
    config: Any, state: State, tokenizer: Any, device: torch.device, dtype: torch.dtype | None
) -> LanguageModel:
    _, theirs = LLMS[config.model_type]
    model = theirs(config)
    missing, unexpected = model.load_state_dict(state, strict=False)
    tied = set(model.state_dict()) - set(_without_tied(model.state_dict()))
    odd = sorted((set(missing) - tied) | set(unexpected))
    if odd:
        raise UsageError(f"The language model lacks or does not know {len(odd)} weights, such as {odd[0]!r}.")
    return wrap_llm(model.to(device=device, dtype=dtype or next(iter(state.values())).dtype), tokenizer)
