"""Scores that a model gives to pairs of images and texts, as `capfilt rank` and `capfilt filter` give them.

In: a scorer, images, and the texts of each. Out: a score for each text.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from capfilt.curation.scorers import Scorer
from capfilt.data.texts import clean_for_terminal
from capfilt.errors import CapfiltError
from capfilt.evaluate.pictures import Pictures, prepare_ahead
from capfilt.progress import NullProgress, Progress
from capfilt.weights.devices import in_parts

PairScores = list[list[float]]
"""By picture and text."""


def score_pairs(
    scorer: Scorer,
    pictures: Pictures,
    texts: Sequence[Sequence[str]],
    progress: Progress | None = None,
) -> PairScores:
    """Scores by picture and text; an image is decoded and encoded once for all its texts.

    Raises CapfiltError for a score that is no number, and what `pictures` raises.
    """
    progress = progress or NullProgress()
    progress.start("scores", sum(map(len, texts)), "pair")
    all_scores: PairScores = []
    for start, prepared in prepare_ahead(pictures, scorer.prepare, scorer.batch_size):
        own = texts[start : start + len(prepared)]

        def score(part: slice, prepared: list[Tensor] = prepared, own: Sequence[Sequence[str]] = own) -> PairScores:
            return scorer.score(prepared[part], own[part])

        found = [scores for part in in_parts(score, 0, len(prepared)) for scores in part]
        for some_texts, some_scores in zip(own, found, strict=True):
            _require_numbers(some_texts, some_scores)
        all_scores += found
        progress.advance(sum(map(len, found)))
    progress.finish()
    return all_scores


def _require_numbers(texts: Sequence[str], scores: Sequence[float]) -> None:
    for text, score in zip(texts, scores, strict=True):
        if not math.isfinite(score):
            raise CapfiltError(
                f"The model gives {clean_for_terminal(text)!r} the score {score}, which is no number. Try --dtype "
                "float32; where that does not help, its weights are damaged."
            )
