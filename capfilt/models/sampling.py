"""Choosing the next token: nucleus, top-k, greedy; temperature, repetition penalty, lengths.

In: next-token logits of rows of text and the tokens written so far. Out: one token a row. The rules and their
order are those of transformers' generate, which BLIP's released code calls: repetition penalty over every
token so far, prompt included; no end before min_length tokens, prompt included; temperature; top_k; top_p of
what top_k left.

- a draw is a pure function of (seed, key, caption index, step): a counter-based uniform and the inverse of
  the cumulated distribution, tokens in order of their ids, in float64. It does not depend on the batch.
- no sort of the vocabulary: the largest logits come first, and more are looked at only where they do not
  decide the draw. The result is exactly that of a full sort.
- tokens of equal logits: top_k keeps all that equal the k-th, as transformers does; top_p the lower ids

Legend: R rows, V vocabulary, T tokens, K candidates.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
import torch
from torch import Tensor

from capfilt.settings import CaptionSettings

_FIRST_CANDIDATES = 64
"""Logits looked at before more are: transformers' top_k of 50 and a few that may equal the 50th."""
_DRAWS_PER_DIGEST = 8  # 64-bit numbers in one blake2b digest


def uniforms(seed: int, key: str, caption_index: int, num_steps: int) -> np.ndarray:
    """Uniform numbers in [0, 1), float64 (num_steps,), for the steps of one caption.

    The digits of blake2b(seed, caption index, block of eight steps, key); a longer series begins with the
    shorter one.
    """
    digests = b"".join(
        hashlib.blake2b(f"{seed}/{caption_index}/{block}/{key}".encode()).digest()
        for block in range(math.ceil(num_steps / _DRAWS_PER_DIGEST))
    )
    return (np.frombuffer(digests, dtype="<u8")[:num_steps] >> np.uint64(11)) * 2.0**-53


def adjust_logits(
    logits_RV: Tensor, tokens_RT: Tensor, *, end_token_id: int, repetition_penalty: float, min_length: int
) -> Tensor:
    """Apply the repetition penalty and the shortest length, in place, to float32 logits of the next token.

    A token written before has its logit divided by the penalty, or multiplied where the logit is negative
    (Keskar et al. 2019). The end is impossible while the text has fewer than `min_length` tokens.
    """
    if repetition_penalty != 1.0:
        seen_RT = logits_RV.gather(1, tokens_RT)
        seen_RT = torch.where(seen_RT < 0, seen_RT * repetition_penalty, seen_RT / repetition_penalty)
        logits_RV.scatter_(1, tokens_RT, seen_RT)
    if tokens_RT.shape[1] < min_length:
        logits_RV[:, end_token_id] = -torch.inf
    return logits_RV


def choose_tokens(logits_RV: Tensor, uniforms_R: Tensor, settings: CaptionSettings) -> Tensor:
    """The next token of each row (R,), from adjusted logits; -1 for a row with NaN or +inf, or -inf alone.

    Greedy takes the largest logit, the first of equals. Nucleus applies top_k and top_p, top-k applies top_k
    alone; each draws with the row's uniform number (float64).
    """
    if settings.decoding == "greedy":
        largest_R, ids_R = logits_RV.max(dim=1)
        return ids_R.where(largest_R.isfinite(), -1)
    top_p = settings.top_p if settings.decoding == "nucleus" else 1.0
    logits_RV = logits_RV / settings.temperature if settings.temperature != 1.0 else logits_RV
    ids_RK, weights_RK = candidates(logits_RV, top_k=settings.top_k, top_p=top_p)
    return _draw(ids_RK, weights_RK, uniforms_R)


def candidates(logits_RV: Tensor, *, top_k: int, top_p: float) -> tuple[Tensor, Tensor]:
    """Tokens that can be drawn, by ascending id (R, K), and their weights, not normalised, float64 (R, K).

    Weight 0 marks a token that top_k or top_p excludes. `top_k` 0 and `top_p` 1 exclude nothing.
    """
    vocab_size = logits_RV.shape[1]
    if not 0 < top_k < vocab_size and top_p >= 1.0:
        return torch.arange(vocab_size, device=logits_RV.device).expand_as(logits_RV), _weights(logits_RV)
    num = min(vocab_size, max(_FIRST_CANDIDATES, top_k + 14))
    while True:
        values_RK, ids_RK = torch.topk(logits_RV, num)
        if 0 < top_k < vocab_size:
            lowest_R = values_RK[:, top_k - 1]
        else:
            lowest_R = values_RK.masked_fill(~_kept(logits_RV, values_RK, top_k, top_p), torch.inf).amin(dim=1)
        # What is not among the candidates is below the lowest that counts when the last candidate is.
        if num == vocab_size or bool((values_RK[:, -1] < lowest_R).all()):
            break
        num = min(vocab_size, 4 * num)
    ids_RK, order = ids_RK.sort(dim=1)
    values_RK = values_RK.gather(1, order)
    return ids_RK, _weights(values_RK).masked_fill(~_kept(logits_RV, values_RK, top_k, top_p), 0.0)


def _kept(logits_RV: Tensor, values_RK: Tensor, top_k: int, top_p: float) -> Tensor:
    """Which of the candidates, in any order, top_k and then top_p keep, as if they were all that matters."""
    sorted_RK, order = values_RK.sort(dim=1, descending=True, stable=True)
    kept_RK = torch.ones_like(sorted_RK, dtype=torch.bool)
    if 0 < top_k < logits_RV.shape[1]:
        kept_RK = sorted_RK >= sorted_RK[:, top_k - 1 : top_k]
    if top_p < 1.0:
        weights_RK = _weights(sorted_RK).masked_fill(~kept_RK, 0.0)
        if 0 < top_k < logits_RV.shape[1]:
            total_R1 = weights_RK.sum(dim=1, keepdim=True)
        else:  # of the whole vocabulary, relative to the largest logit as the weights are
            total_R1 = (logits_RV.logsumexp(dim=1, keepdim=True) - sorted_RK[:, :1]).double().exp()
        before_RK = weights_RK.cumsum(dim=1) - weights_RK
        kept_RK = kept_RK & (before_RK < top_p * total_R1)
    return torch.zeros_like(kept_RK).scatter(1, order, kept_RK)


def _weights(logits_RK: Tensor) -> Tensor:
    """exp of the logits, relative to the row's largest, in float64."""
    return (logits_RK.double() - logits_RK.amax(dim=1, keepdim=True).double()).exp()


def _draw(ids_RK: Tensor, weights_RK: Tensor, uniforms_R: Tensor) -> Tensor:
    """The first token whose cumulated weight exceeds the uniform number's share of the total.

    -1 where the total is 0 or not finite.
    """
    cumulated_RK = weights_RK.cumsum(dim=1)
    total_R1 = cumulated_RK[:, -1:]
    # The product may round up to the total, which nothing exceeds.
    below_total = torch.nextafter(total_R1, torch.zeros_like(total_R1))
    share_R1 = torch.minimum(uniforms_R[:, None] * total_R1, below_total)
    place_R1 = torch.searchsorted(cumulated_RK, share_R1, right=True).clamp(max=ids_RK.shape[1] - 1)
    return ids_RK.gather(1, place_R1).where((total_R1 > 0) & total_R1.isfinite(), -1)[:, 0]
