"""Recall of a ranking: the place of the best match of each query, and the share of queries where it is among the first.

In: scores and which of the candidates match. Out: ranks, and recalls in percent.

Ties count against: a candidate that scores as high as the best match stands before it unless it matches too, so equal
scores gain nothing, and a model that gives every pair one score has a recall of 0.

Legend: Q queries, C candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

KS = (1, 5, 10)
"""Places that recall is stated for (BLIP Table 5, BLIP-2 Table 5)."""


def match_ranks(scores_QC: Tensor, is_match_QC: Tensor) -> Tensor:
    """Place of each query's best match, int64 (Q,): 1 is the first, 0 stands for a query without a match."""
    best_Q = scores_QC.masked_fill(~is_match_QC, float("-inf")).amax(dim=1, keepdim=True)
    ahead_Q = ((scores_QC >= best_Q) & ~is_match_QC).sum(dim=1)
    return torch.where(is_match_QC.any(dim=1), ahead_Q + 1, 0)


def recall_at(ranks_Q: Tensor, k: int) -> float:
    """Percent of the queries that have a match whose best one is among the first k; 0 where none has any."""
    ranks_Q = ranks_Q[ranks_Q > 0]
    return 100.0 * float((ranks_Q <= k).double().mean()) if len(ranks_Q) else 0.0


@dataclass(frozen=True)
class Recalls:
    """Recalls both ways in percent, by k, and their mean."""

    image_to_text: dict[int, float]
    """An image counts when any of its captions is among the first k texts."""
    text_to_image: dict[int, float]
    """A caption counts when its image is among the first k images."""
    mean: float
    """Of all figures of both ways (six, for k = 1, 5 and 10)."""


def recalls_of(image_ranks: Tensor, text_ranks: Tensor, ks: Sequence[int] = KS) -> Recalls:
    """Recalls from the ranks of both ways' queries."""
    ways = [{k: recall_at(ranks, k) for k in ks} for ranks in (image_ranks, text_ranks)]
    figures = [value for way in ways for value in way.values()]
    return Recalls(ways[0], ways[1], sum(figures) / len(figures))
