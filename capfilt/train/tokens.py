"""Texts as a model reads them in training: token ids that begin with [CLS] and end with [SEP], padded.

In: a BERT-style tokenizer and texts. Out: ids and mask.

Legend: B texts, T tokens.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from capfilt.errors import UsageError


def tokenise(
    tokenizer: Any, texts: list[str], max_tokens: int, *, to_the_longest: bool = True
) -> tuple[Tensor, Tensor]:
    """Token ids and mask (B, T) of texts, cut at `max_tokens`, padded to the longest of them or to `max_tokens`."""
    padding = "longest" if to_the_longest else "max_length"
    encoded = tokenizer(texts, padding=padding, truncation=True, max_length=max_tokens, return_tensors="pt")
    return encoded.input_ids, encoded.attention_mask.bool()


def refuse_longer_texts(max_text_tokens: int, num_positions: int) -> None:
    """UsageError where texts may be longer than a model has positions for."""
    if max_text_tokens > num_positions:
        raise UsageError(
            f"max_text_tokens is {max_text_tokens}; expected at most {num_positions}, the positions of the model. "
            "Lower --max-text-tokens."
        )
