"""Attention of queries to keys and values that are all attended to, by whichever of torch's kernels is fastest.

In: queries, keys and values by head. Out: attended values. torch's fused kernel, but for inference in bfloat16 on a
CPU two batches of matrix products: with an image's 577 keys they take half the time of the fused kernel, which
computes in float32 there. Their scores are rounded to bfloat16 before the softmax, as transformers' plain attention
does and the fused kernel does not.

Legend: B images, H heads, T queries, S keys, d width of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

_SCORES_AT_ONCE = 1 << 22


def attend(query_BHTd: Tensor, key_BHSd: Tensor, value_BHSd: Tensor) -> Tensor:
    """Every query attends to every key: (B, H, T, d)."""
    if gains_by_products(query_BHTd):
        return attend_by_products(query_BHTd, key_BHSd, value_BHSd)
    return F.scaled_dot_product_attention(query_BHTd, key_BHSd, value_BHSd)


def gains_by_products(states: Tensor) -> bool:
    """Whether products are faster for states of this kind; they read keys and values as they lie in memory."""
    return states.dtype == torch.bfloat16 and states.device.type == "cpu" and not torch.is_grad_enabled()


def attend_by_products(query_BHTd: Tensor, key_BHSd: Tensor, value_BHSd: Tensor) -> Tensor:
    """Attention as two batches of matrix products, of as many images at a time as the processor's cache holds."""
    scores_per_image = query_BHTd.shape[1] * query_BHTd.shape[2] * key_BHSd.shape[2]
    num_images = max(1, _SCORES_AT_ONCE // scores_per_image)
    parts = zip(*(states.split(num_images) for states in (query_BHTd, key_BHSd, value_BHSd)), strict=True)
    return torch.cat([_attend_in_products(*part) for part in parts])


def _attend_in_products(*states: Tensor) -> Tensor:
    query, key, value = (by_head.flatten(0, 1) for by_head in states)
    scale = query.shape[-1] ** -0.5
    scores = torch.baddbmm(query.new_empty(1, 1, 1), query, key.transpose(1, 2), beta=0, alpha=scale)
    return torch.bmm(scores.softmax(-1), value).unflatten(0, states[0].shape[:2])
