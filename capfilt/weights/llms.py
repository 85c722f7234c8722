"""Language models for stage 2, read from disk or the hub in transformers' layout. Frozen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer
from transformers.utils import logging

from capfilt.errors import UsageError
from capfilt.models.llms import LLMS, LanguageModel, wrap_llm


def load_llm(
    path: str | Path, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> LanguageModel:
    """A frozen OPT or T5 from a folder. No code of the folder's is run.

    Raises UsageError where it holds no such model, or weights are missing from it.
    """
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UsageError(f"No language model at {path} ({error}). Give a folder or hub id of an OPT or T5.") from error
    if config.model_type not in LLMS:
        raise UsageError(f"{path} is a {config.model_type!r}; the language model must be one of {', '.join(LLMS)}.")
    _refuse_projection(path, config)
    _, theirs = LLMS[config.model_type]
    logging.disable_progress_bar()  # transformers' own; ours is shown
    model, info = theirs.from_pretrained(path, dtype=dtype, output_loading_info=True)
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
