"""Tokens masked for masked language modelling (BERT §3.1, ALBEF §3.2).

In: token ids and numbers that make the choices. Out: the ids that a model reads, and which of them it is to find.

Of the tokens chosen 80% become [MASK], 10% any token of the vocabulary, 10% stay. Special tokens and padding are never
chosen (ALBEF's released code chooses [SEP] too).

Legend: B texts, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

NUM_DRAWS = 3
"""Numbers that a token takes: whether it is chosen, what becomes of it, which token stands in its place."""
_MASKED, _REPLACED = 0.8, 0.1


@dataclass(frozen=True, kw_only=True)
class MaskingConfig:
    """What is masked, and by what."""

    mask_token_id: int
    """[MASK]."""
    special_token_ids: tuple[int, ...]
    """Never chosen: [CLS], [SEP], [PAD] and the like."""
    vocab_size: int
    """Tokens that may stand in another's place."""
    share: float = 0.15
    """Of the tokens, those chosen (ALBEF §3.2: 15%)."""


def mask_tokens(tokens_BT: Tensor, uniform_3BT: Tensor, config: MaskingConfig) -> tuple[Tensor, Tensor]:
    """Token ids (B, T) to be read, and (B, T) booleans, True where the token is to be found.

    `uniform_3BT` are numbers in [0, 1): the same numbers choose the same tokens.
    """
    choice_BT, change_BT, word_BT = uniform_3BT.to(tokens_BT.device)
    specials = torch.tensor(config.special_token_ids, device=tokens_BT.device)
    is_chosen_BT = (choice_BT < config.share) & ~torch.isin(tokens_BT, specials)
    words_BT = (word_BT * config.vocab_size).long().clamp(max=config.vocab_size - 1)
    is_masked_BT = is_chosen_BT & (change_BT < _MASKED)
    is_replaced_BT = is_chosen_BT & (change_BT >= _MASKED) & (change_BT < _MASKED + _REPLACED)
    read_BT = torch.where(is_replaced_BT, words_BT, tokens_BT).masked_fill(is_masked_BT, config.mask_token_id)
    return read_BT, is_chosen_BT
