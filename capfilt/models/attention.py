"""Attention of queries to keys and values that are all attended to, by whichever of torch's kernels is fastest.

In: queries, keys and values by head. Out: attended values. torch's fused kernel, but for inference in bfloat16 on a
CPU two batches of matrix products: with an image's 577 keys they take half the time of the fused kernel, which
computes in float32 there. Their scores are rounded to bfloat16 before the softmax, as transformers' plain attention
does and the fused kernel does not.

Legend: B images, H heads, R = B·H, T queries, S keys, d width of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from capfilt.models.packed import multiplies_bfloat16

KeyValue = tuple[Tensor, Tensor]
"""Keys and values, each (B, H, S, d)."""

_SCORES_AT_ONCE = 1 << 22
"""Of a product: 8 MiB in bfloat16, which stay in the cache of a server's processor."""


def attend(query_BHTd: Tensor, key_BHSd: Tensor, value_BHSd: Tensor) -> Tensor:
    """Every query attends to every key: (B, H, T, d)."""
    if gains_by_products(query_BHTd):
        return attend_by_products(query_BHTd, key_BHSd, value_BHSd)
    return F.scaled_dot_product_attention(query_BHTd, key_BHSd, value_BHSd)


def gains_by_products(states: Tensor) -> bool:
    """Whether products are faster for states of this kind.

    Keep keys and values that are used again contiguous for them: others are copied at every call.
    """
    is_inference = states.device.type == "cpu" and not torch.is_grad_enabled()
    return is_inference and states.dtype == torch.bfloat16 and multiplies_bfloat16()


def attend_by_products(query_BHTd: Tensor, key_BHSd: Tensor, value_BHSd: Tensor) -> Tensor:
    """Attention as two batches of matrix products, of as many images at a time as the processor's cache holds."""
    scores_per_image = query_BHTd.shape[1] * query_BHTd.shape[2] * key_BHSd.shape[2]
    num_images = max(1, _SCORES_AT_ONCE // scores_per_image)
    parts = zip(*(states.split(num_images) for states in (query_BHTd, key_BHSd, value_BHSd)), strict=True)
    return torch.cat([_attend_in_products(*part) for part in parts])


def _attend_in_products(query_BHTd: Tensor, key_BHSd: Tensor, value_BHSd: Tensor) -> Tensor:
    query_RTd, key_RSd, value_RSd = (states.flatten(0, 1) for states in (query_BHTd, key_BHSd, value_BHSd))
    nothing, scale = query_RTd.new_empty(1, 1, 1), query_RTd.shape[2] ** -0.5
    scores_RTS = torch.baddbmm(nothing, query_RTd, key_RSd.transpose(1, 2), beta=0, alpha=scale)
    return torch.bmm(scores_RTS.softmax(-1), value_RSd).unflatten(0, query_BHTd.shape[:2])
