"""What `capfilt evaluate filter` reports: scores against labels, all together and by source, and experts' judgments.

In: labelled pairs, or a scorer and Flickr8k's judged pairs. Out: a `FilterReport`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from capfilt.curation.scorers import Scorer
from capfilt.data.annotations import JudgedPair
from capfilt.data.image_sources import ImageSource
from capfilt.errors import UsageError
from capfilt.evaluate.correlation import KendallTau, kendall_tau
from capfilt.evaluate.filter_labels import LabelledPairs
from capfilt.evaluate.labelled_images import LabelledImageText
from capfilt.evaluate.labelled_scores import NUM_BINS, ScoreFigures, measure_scores
from capfilt.evaluate.pair_scores import score_pairs
from capfilt.evaluate.pictures import SourcePictures
from capfilt.progress import Progress
from capfilt.settings.checks import require_one_of

ALL = "all"
"""Name of the group that holds every pair."""
TRUE_FROM = 3.0
"""Mean of the experts' judgments (1 to 4) from which a caption counts as true of an image."""
ITM_THRESHOLD = 0.5
MAX_TEXTS = 64
"""Texts scored at a time with one image; for more it is encoded again."""


@dataclass(frozen=True, kw_only=True)
class FilterOptions:
    """What is measured."""

    score: str = "itm"
    """itm (probabilities) or clip (cosines, which have no threshold of their own and no calibration)."""
    threshold: float | None = None
    """Lowest score kept; None for 0.5 with itm, none with clip."""
    target_precision: float = 0.95
    num_bins: int = NUM_BINS

    def __post_init__(self) -> None:
        require_one_of("score", self.score, ("itm", "clip"))
        if not 0 < self.target_precision <= 1:
            raise UsageError(f"target_precision is {self.target_precision}; expected more than 0, at most 1.")
        if not 1 <= self.num_bins <= 1000:
            raise UsageError(f"num_bins is {self.num_bins}; expected 1 to 1000.")


@dataclass(frozen=True)
class Judgments:
    """Agreement of scores with experts' judgments; every judgment is a row."""

    num_pairs: int
    all: KendallTau
    num_own_captions: int
    """Pairs of an image and one of its own captions."""
    without_own_captions: KendallTau
    """Without these pairs, as the field states it (Hessel et al. 2021)."""


@dataclass(frozen=True)
class FilterReport:
    """Figures by group: `all`, then the sources."""

    score: str
    target_precision: float
    figures: dict[str, ScoreFigures]
    num_unscored: int
    """Labelled pairs without a score."""
    num_unjoined: int
    """Labels of pairs that are not there, left out as asked."""
    num_unlabelled: int
    """Scored pairs without a label."""
    judgments: Judgments | None = None


def report_filter(pairs: LabelledPairs, options: FilterOptions, judgments: Judgments | None = None) -> FilterReport:
    """Figures of labelled pairs. Raises UsageError where no pair has a score, and where all labels are equal."""
    num_true = int(pairs.labels.sum())
    if not len(pairs.labels):
        raise UsageError(
            f"None of the labelled pairs has a {options.score} score ({pairs.num_unscored:,} without). Score the run "
            f"first: `capfilt {'filter' if options.score == 'itm' else 'rank'} RUN`."
        )
    if num_true in (0, len(pairs.labels)):
        raise UsageError(
            f"All {len(pairs.labels):,} labelled pairs with a score are {'true' if num_true else 'false'}; expected "
            "true and false ones. Label some of the other kind."
        )
    is_probability = options.score == "itm"
    threshold = ITM_THRESHOLD if options.threshold is None and is_probability else options.threshold

    def measure(rows: np.ndarray) -> ScoreFigures:
        return measure_scores(
            pairs.scores[rows], pairs.labels[rows], threshold=threshold, target_precision=options.target_precision,
            is_probability=is_probability, num_bins=options.num_bins,
        )  # fmt: skip

    figures = {ALL: measure(np.ones(len(pairs.labels), np.bool_))}
    if pairs.sources is not None:
        if ALL in pairs.sources:
            raise UsageError(f"A source of the pairs is named {ALL!r}, as all of them together are. Rename it.")
        sources = np.array(pairs.sources)
        figures |= {str(source): measure(sources == source) for source in np.unique(sources)[::-1]}
    return FilterReport(
        options.score, options.target_precision, figures, pairs.num_unscored, pairs.num_unjoined,
        pairs.num_unlabelled, judgments,
    )  # fmt: skip


def score_labelled(
    scorer: Scorer, pairs: Sequence[LabelledImageText], progress: Progress | None = None
) -> LabelledPairs:
    """Pairs of any images with the scores of a model."""
    sources = None if all(pair.source is None for pair in pairs) else [pair.source or "unknown" for pair in pairs]
    return LabelledPairs(
        score_in_order(scorer, [(pair.image, pair.text) for pair in pairs], progress),
        np.array([pair.is_true for pair in pairs], np.bool_),
        sources,
    )


def score_judged(
    scorer: Scorer, judged: Sequence[JudgedPair], progress: Progress | None = None
) -> tuple[LabelledPairs, Judgments]:
    """Flickr8k's judged pairs with the scores of a model; true where the mean judgment is at least TRUE_FROM."""
    pairs = [(pair.image, pair.caption) for pair in judged if pair.image is not None]
    assert len(pairs) == len(judged), "the folder of images is given"
    scores = score_in_order(scorer, pairs, progress)
    labels = np.array([np.mean(pair.scores) >= TRUE_FROM for pair in judged], np.bool_)
    return LabelledPairs(scores, labels, None), correlate_judgments(scores, judged)


def correlate_judgments(scores: np.ndarray, judged: Sequence[JudgedPair]) -> Judgments:
    """Kendall's tau between scores and judgments, each expert's a row of its own."""

    def tau(numbers: list[int]) -> KendallTau:
        rows = [(scores[number], judgment) for number in numbers for judgment in judged[number].scores]
        return kendall_tau(np.array([score for score, _ in rows]), np.array([judgment for _, judgment in rows]))

    others = [n for n, pair in enumerate(judged) if pair.caption_id.rpartition("#")[0] != pair.image_id]
    return Judgments(len(judged), tau(list(range(len(judged)))), len(judged) - len(others), tau(others))


def score_in_order(
    scorer: Scorer, pairs: Sequence[tuple[ImageSource, str]], progress: Progress | None = None
) -> np.ndarray:
    """A score for each pair, float64, in their order; texts of one image are scored together, MAX_TEXTS at most."""
    rows_of: dict[ImageSource, list[int]] = {}
    for row, (image, _) in enumerate(pairs):
        rows_of.setdefault(image, []).append(row)
    pieces = [
        (image, rows[start : start + MAX_TEXTS])
        for image, rows in rows_of.items()
        for start in range(0, len(rows), MAX_TEXTS)
    ]
    texts = [[pairs[row][1] for row in rows] for _, rows in pieces]
    found = score_pairs(scorer, SourcePictures([image for image, _ in pieces]), texts, progress)
    scores = np.empty(len(pairs), np.float64)
    for (_, rows), own in zip(pieces, found, strict=True):
        scores[rows] = own
    return scores
