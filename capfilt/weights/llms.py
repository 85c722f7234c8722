"""Language models for stage 2, read from disk or the hub in transformers' layout. Frozen.

In: a folder, or the part of a BLIP-2's weights that is its language model. Out: our class around transformers' model;
and back to the part of a BLIP-2.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer
from transformers.utils import logging

from capfilt.data.texts import clean_for_terminal, first_line
from capfilt.errors import UsageError
from capfilt.models.convert_blip2 import State
from capfilt.models.llms import LLMS, LanguageModel, wrap_llm
from capfilt.weights.model_files import find_weights, load_config, loading_problem, refuse_foreign_weights

_LOADING: dict[str, Any] = {
    "output_loading_info": True, "ignore_mismatched_sizes": True,
    "attn_implementation": None,  # torch's: a config.json may name a program on the hub that is to compute it
}  # fmt: skip


def load_llm(
    path: str | Path, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> LanguageModel:
    """A frozen OPT or T5 from a folder. No code of the folder's is run.

    Raises UsageError where it holds no such model, or weights are missing from it.
    """
    config = load_config(path, "Give a folder or hub id of an OPT or T5.")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # the tokenizers' errors have no common base
        raise UsageError(f"{path} has no readable tokenizer ({loading_problem(error)}). Add tokenizer.json.") from error
    if config.model_type not in LLMS:
        raise UsageError(f"{path} is a {config.model_type!r}; the language model must be one of {', '.join(LLMS)}.")
    _refuse_projection(path, config)
    if quantised := getattr(config, "quantization_config", None):
        method = clean_for_terminal(str(dict(quantised).get("quant_method", "of a kind not named")))
        raise UsageError(f"{path} is quantised ({method}); give the weights it was made from.")
    _, theirs = LLMS[config.model_type]
    try:
        with _silenced():
            model, info = theirs.from_pretrained(path, dtype=dtype, **_LOADING)
    except MemoryError:
        raise
    except Exception as error:  # of safetensors, pickle, zip and torch, which have no common base
        if Path(path).is_dir():
            for file in find_weights(Path(path)):
                refuse_foreign_weights(file)
        raise UsageError(f"The weights in {path} cannot be loaded ({first_line(error)}). Fetch them again.") from error
    _refuse_other_shapes(str(path), info)
    if info["missing_keys"]:
        names = ", ".join(sorted(info["missing_keys"])[:3])
        raise UsageError(f"{path} lacks {len(info['missing_keys'])} weights of its model, such as {names}.")
    return wrap_llm(model.to(device), tokenizer)


def _refuse_projection(path: str | Path, config: Any) -> None:
    """OPT-350m embeds tokens narrower than it computes; transformers' BLIP-2 has no place for it."""
    narrow = getattr(config, "word_embed_proj_dim", config.hidden_size)
    if narrow != config.hidden_size:
        raise UsageError(
            f"{path} embeds tokens in {narrow} of {config.hidden_size} dimensions; BLIP-2's layout "
            f"wants them equal. Take another size of OPT, such as facebook/opt-125m or facebook/opt-1.3b."
        )


def build_llm(
    config: Any, state: State, tokenizer: Any, device: torch.device, dtype: torch.dtype | None
) -> LanguageModel:
    """A frozen OPT or T5 of a BLIP-2's `language_model.…` weights, their prefix taken off; None keeps their precision.

    As transformers reads it: of a T5 in float16 the matrices that overflow there (`wo`) are float32.

    Raises UsageError for another family, and for weights that are missing, unknown or of other shapes.
    """
    if config.model_type not in LLMS:
        raise UsageError(f"The BLIP-2 holds a {config.model_type!r}; expected one of {', '.join(LLMS)}.")
    _, theirs = LLMS[config.model_type]
    dtype = dtype or next(iter(state.values())).dtype
    with _silenced():
        model, info = theirs.from_pretrained(None, config=config, state_dict=dict(state), dtype=dtype, **_LOADING)
    _refuse_other_shapes("The language model of the BLIP-2", info)
    if odd := sorted(info["missing_keys"] | info["unexpected_keys"]):
        raise UsageError(f"The language model lacks or does not know {len(odd)} weights, such as {odd[0]!r}.")
    return wrap_llm(model.to(device), tokenizer)


def _refuse_other_shapes(what: str, info: dict[str, Any]) -> None:
    for name, found, expected in sorted(info["mismatched_keys"])[:1]:
        raise UsageError(
            f"{what} has {len(info['mismatched_keys'])} weights of other shapes than its config says, such as {name}: "
            f"{tuple(found)}; expected {tuple(expected)}."
        )


@contextmanager
def _silenced() -> Iterator[None]:
    """Without transformers' bars and tables: what is wrong is said by us."""
    logging.disable_progress_bar()
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def llm_for_blip2(llm: LanguageModel, image_token_id: int) -> tuple[Any, State]:
    """Config and weights (tied ones once) of the language model, with a row for <image> and its end token."""
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
