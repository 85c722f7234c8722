"""The losses of BLIP, ALBEF and BLIP-2 as pure functions; nothing here needs a process group.

In: embeddings, logits, token ids. Out: scalar losses, indices of hard negatives.

Gathering across ranks is the caller's (`models.ranks`): pass similarities to the gathered embeddings, and the place
of the rank's first row among all as `offset`.

Legend: B pairs on this rank, A pairs on all ranks, K columns contrasted with (A, and a queue's), E embedding width,
T tokens, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from capfilt.models.ranks import ALONE, Ranks


def cosines(own_BE: Tensor, others_AE: Tensor) -> Tensor:
    """Cosines (B, A) of embeddings of unit length, float32 under autocast too.

    In bfloat16 logits of ITC are off by up to 0.1, and with them its targets and the hard negatives drawn.
    """
    with torch.autocast(own_BE.device.type, enabled=False):
        return own_BE.float() @ others_AE.float().T


def itc_loss(
    similarity_i2t_BA: Tensor,
    similarity_t2i_BA: Tensor,
    *,
    offset: int = 0,
    label_smoothing: float = 0.0,
    same_image_BA: Tensor | None = None,
) -> Tensor:
    """Image-text contrastive loss (ALBEF §3.2, BLIP §3.2, BLIP-2 §3.1).

    Args:
        similarity_i2t_BA: (B, A) similarities over temperature of this rank's images to all texts.
        similarity_t2i_BA: (B, A) the same for this rank's texts to all images.
        offset: column of this rank's first pair.
        label_smoothing: share of the target spread over all pairs (BLIP-2's released code: 0.1).
        same_image_BA: (B, A) booleans, True at all pairs of the row's image; they share the target. None: an image has
            no other pair.
    """
    rows = len(similarity_i2t_BA)
    target = torch.arange(offset, offset + rows, device=similarity_i2t_BA.device)
    if same_image_BA is not None:
        target = matching_pairs(same_image_BA)
    i2t = F.cross_entropy(similarity_i2t_BA, target, label_smoothing=label_smoothing)
    t2i = F.cross_entropy(similarity_t2i_BA, target, label_smoothing=label_smoothing)
    return (i2t + t2i) / 2


def matching_pairs(same_image_BK: Tensor) -> Tensor:
    """Targets (B, K) of ITC where an image has several pairs: each has an equal share (BLIP's code for retrieval)."""
    same_BK = same_image_BK.float()
    return same_BK / same_BK.sum(dim=1, keepdim=True)


def soft_targets(
    momentum_similarity_BK: Tensor,
    alpha: Tensor | float,
    *,
    offset: int = 0,
    same_image_BK: Tensor | None = None,
) -> Tensor:
    """Targets (B, K) of ITC: alpha · softmax(similarities of the momentum encoders) + (1 - alpha) · one-hot.

    ALBEF §3.3, equation 6, as BLIP §3.2 takes them over; `offset` is the column of this rank's first pair.
    With `same_image_BK` `matching_pairs` takes the place of one-hot.
    """
    rows = torch.arange(offset, offset + len(momentum_similarity_BK), device=momentum_similarity_BK.device)
    hard_BK = F.one_hot(rows, momentum_similarity_BK.shape[1])
    if same_image_BK is not None:
        hard_BK = matching_pairs(same_image_BK)
    return alpha * momentum_similarity_BK.detach().float().softmax(dim=1) + (1 - alpha) * hard_BK


def soft_itc_loss(similarity_i2t_BK: Tensor, similarity_t2i_BK: Tensor, targets: tuple[Tensor, Tensor]) -> Tensor:
    """Image-text contrastive loss against soft targets, of images to texts and of texts to images."""
    i2t = F.cross_entropy(similarity_i2t_BK.float(), targets[0])
    t2i = F.cross_entropy(similarity_t2i_BK.float(), targets[1])
    return (i2t + t2i) / 2


@torch.no_grad()
def draw_hard_negatives(
    similarity_BA: Tensor, excluded_BA: Tensor, uniform_B: Tensor | None = None, *, offset: int = 0
) -> Tensor:
    """Draw for each row another column, with probability softmax(similarity) (ALBEF §3.2, BLIP-2 §3.2).

    Args:
        similarity_BA: (B, A) similarities over temperature.
        excluded_BA: (B, A) boolean, True where a column is no negative: an equal text, another pair of the same image.
            The released codes exclude the pair itself alone, which is excluded here in any case.
        uniform_B: (B,) numbers in [0, 1) that make the choice (inverse distribution function), so that a draw does
            not depend on what was drawn before; None takes torch's generator.
        offset: column of this rank's first pair.

    Returns:
        (B,) column indices. A row whose columns are all excluded, as where every text of the batch is the same, gets
        one of them, but never its own pair unless there is no other.
    """
    rows = torch.arange(len(similarity_BA), device=similarity_BA.device)
    own_BA = F.one_hot(rows + offset, similarity_BA.shape[1]).bool()
    excluded_BA = excluded_BA | own_BA
    excluded_BA = torch.where(excluded_BA.all(dim=1, keepdim=True), own_BA, excluded_BA)
    lowest = torch.finfo(torch.float32).min  # not -inf: a pair that is alone is drawn, not NaN
    weights_BA = similarity_BA.float().masked_fill(excluded_BA, lowest).softmax(dim=1)
    if uniform_B is None:
        uniform_B = torch.rand(len(rows), device=rows.device)
    cumulated_BA = weights_BA.cumsum(dim=1)
    threshold_B1 = (1.0 - uniform_B.to(cumulated_BA)[:, None]) * cumulated_BA[:, -1:]  # more than 0, at most the sum
    drawn_B = (cumulated_BA < threshold_B1).sum(dim=1).clamp(max=similarity_BA.shape[1] - 1)
    # Sums in parallel, as a GPU's, need not rise everywhere by the last bit: what has no weight might come out.
    is_excluded_B = excluded_BA.gather(1, drawn_B[:, None])[:, 0]
    return torch.where(is_excluded_B, weights_BA.argmax(dim=1), drawn_B)


def itm_loss(match_logits_B2: Tensor, mismatch_logits_N2: Tensor) -> Tensor:
    """Image-text matching loss: two-class cross-entropy over positives and negatives (ALBEF §3.2)."""
    logits = torch.cat([match_logits_B2, mismatch_logits_N2])
    target = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
    target[: len(match_logits_B2)] = 1
    return F.cross_entropy(logits.float(), target)


def lm_loss(logits_NV: Tensor, target_N: Tensor, *, label_smoothing: float = 0.1, ranks: Ranks = ALONE) -> Tensor:
    """Language modelling loss, the mean over the positions that count (BLIP §3.2: label smoothing 0.1).

    With several ranks, averaged over them, it is the mean over the positions of all.
    """
    total = F.cross_entropy(logits_NV.float(), target_N, label_smoothing=label_smoothing, reduction="sum")
    return _mean_over_all(total, len(target_N), ranks)


def mlm_loss(
    logits_NV: Tensor,
    target_N: Tensor,
    momentum_logits_NV: Tensor | None = None,
    *,
    alpha: Tensor | float = 0.0,
    ranks: Ranks = ALONE,
) -> Tensor:
    """Masked language modelling loss with momentum pseudo-labels (ALBEF §3.2, §3.3).

    (1 - alpha) · cross-entropy with the masked tokens + alpha · cross-entropy with the softmax of what the momentum
    model says of them, the mean over the masked tokens. ALBEF's equation 7 has the KL divergence for the latter, whose
    gradients are the same; its released code has the cross-entropy. Without momentum logits alpha counts as 0.

    With several ranks, averaged over them, it is the mean over the masked tokens of all.
    """
    total = F.cross_entropy(logits_NV.float(), target_N, reduction="sum")
    if momentum_logits_NV is not None:
        soft_NV = momentum_logits_NV.detach().float().softmax(dim=1)
        total = (1 - alpha) * total + alpha * F.cross_entropy(logits_NV.float(), soft_NV, reduction="sum")
    return _mean_over_all(total, len(target_N), ranks)


def _mean_over_all(total: Tensor, count: int, ranks: Ranks) -> Tensor:
    """A sum over this rank's tokens as a part of the mean over those of all ranks; 0 where there are none."""
    return total / ranks.mean(torch.tensor(float(count), device=total.device)).clamp(min=1.0)
