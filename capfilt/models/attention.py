"""Scaled dot-product attention as the models here call it (Vaswani et al. 2017, §3.2.1).

In: queries, keys and values by head. Out: attended values. bfloat16 is computed in float32 on a CPU: torch's own
bfloat16 kernel takes twice as long there, and rounds more often.

Legend: B batch, H heads, T queries, S attended tokens, d width of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def attend(
    query_BHTd: Tensor, key_BHSd: Tensor, value_BHSd: Tensor, mask: Tensor | None = None, *, is_causal: bool = False
) -> Tensor:
    """(B, H, T, d) in the dtype of the queries; mask is boolean, True where attended."""
    query, key, value = (for_attention(states) for states in (query_BHTd, key_BHSd, value_BHSd))
    attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=is_causal)
    return attended.to(query_BHTd.dtype)


def for_attention(states: Tensor) -> Tensor:
    """What `attend` computes with: done once, for keys and values that are attended to again and again."""
    return states.float() if states.dtype == torch.bfloat16 and states.device.type == "cpu" else states
