"""What the captions and the manifest of a shard add up to.

In: rows of the stages `captions` and `manifest`. Out: a `CaptionSums`, and a `PairSums` for each source.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from capfilt.report.histogram import Histogram, counts_of
from capfilt.report.words import WordCounts, count_words, distinct, plain_texts

THRESHOLDS = tuple(number / 100 for number in range(101))
"""ITM thresholds at which the kept rate is stated."""
CLIP_BINS, ITM_BINS = 100, 20


@dataclass
class CaptionSums:
    """Synthetic captions as they were written."""

    num_captions: int = 0
    distinct: Counter[int] = field(default_factory=Counter)
    """Different captions of an image → images."""
    sample: list[list[str]] = field(default_factory=list)
    """The captions of a few images, as plain texts."""

    def add(self, rows: pa.Table, num_sampled: int) -> None:
        """Count the captions of a shard; those of `num_sampled` of its images, evenly spread, are kept."""
        self.num_captions += rows.num_rows
        of_image, num_images = _images_of(rows["key"])
        text = rows["text"].combine_chunks().dictionary_encode()
        pairs = of_image * max(len(text.dictionary), 1) + text.indices.to_numpy()
        different = np.bincount(distinct(pairs) // max(len(text.dictionary), 1))
        times = np.bincount(different)
        self.distinct.update({int(number): int(times[number]) for number in times.nonzero()[0]})
        chosen = np.arange(num_images)[:: max(1, -(-num_images // max(num_sampled, 1)))]
        is_taken = np.zeros(num_images, bool)
        is_taken[chosen] = True
        is_chosen = is_taken[of_image]
        captions: dict[int, list[str]] = {int(number): [] for number in chosen}
        texts = plain_texts(rows["text"].filter(pa.array(is_chosen))).to_pylist()
        for number, caption in zip(of_image[is_chosen].tolist(), texts, strict=True):
            captions[number].append(caption)
        self.sample += captions.values()

    def merge(self, other: CaptionSums) -> None:
        """Add another shard's."""
        self.num_captions += other.num_captions
        self.distinct.update(other.distinct)
        self.sample += other.sample


@dataclass
class PairSums:
    """Pairs of one source in the manifest."""

    num_pairs: int = 0
    num_kept: int = 0
    drop_reasons: Counter[str] = field(default_factory=Counter)
    lengths: Counter[int] = field(default_factory=Counter)
    """Words of a caption → captions."""
    words: WordCounts = field(default_factory=WordCounts)
    """Of the kept captions."""
    clip_score: Histogram = field(default_factory=lambda: Histogram.even(-1, 1, CLIP_BINS))
    itm_score: Histogram = field(default_factory=lambda: Histogram.even(0, 1, ITM_BINS))
    num_candidates: int = 0
    """Pairs that nothing but the threshold drops."""
    num_chosen: int = 0
    """Of them, those that are kept."""
    num_passing: np.ndarray = field(default_factory=lambda: np.zeros(len(THRESHOLDS), np.int64))
    """Of them, those that each of THRESHOLDS keeps."""

    def add(self, rows: pa.Table) -> None:
        """Count rows of a manifest that have this source."""
        self.num_pairs += rows.num_rows
        self.num_kept += pc.sum(rows["kept"]).as_py() or 0
        self.drop_reasons.update(counts_of(rows["drop_reason"]))
        plain = plain_texts(rows["text"])
        lengths = np.bincount(count_words(plain))
        self.lengths.update({int(words): int(lengths[words]) for words in lengths.nonzero()[0]})
        self.words.add(plain.filter(rows["kept"].combine_chunks()))
        self.clip_score.add(pc.drop_null(rows["clip_score"]).to_numpy())
        self.itm_score.add(pc.drop_null(rows["itm_score"]).to_numpy())
        only_threshold = pc.or_(pc.is_null(rows["drop_reason"]), pc.equal(rows["drop_reason"], "low_itm"))
        scores = pc.drop_null(pc.filter(rows["itm_score"], pc.fill_null(only_threshold, True))).to_numpy()
        self.num_chosen += pc.sum(pc.and_(rows["kept"], pc.is_valid(rows["itm_score"]))).as_py() or 0
        self.num_passing += _num_passing(scores)
        self.num_candidates += len(scores)

    def leave_out(self, scores: np.ndarray) -> None:
        """Take pairs with these ITM scores, which no threshold keeps, from the candidates."""
        self.num_passing -= _num_passing(scores)
        self.num_candidates -= len(scores)

    def merge(self, other: PairSums) -> None:
        """Add another shard's."""
        self.num_pairs += other.num_pairs
        self.num_kept += other.num_kept
        self.drop_reasons.update(other.drop_reasons)
        self.lengths.update(other.lengths)
        self.words.merge(other.words)
        self.clip_score.merge(other.clip_score)
        self.itm_score.merge(other.itm_score)
        self.num_chosen += other.num_chosen
        self.num_passing += other.num_passing
        self.num_candidates += other.num_candidates


@dataclass
class ImageSums:
    """Images with their captions side by side."""

    num_images: int = 0
    num_kept: int = 0
    """Images with at least one kept pair."""
    num_compared: int = 0
    """Images whose web caption and a synthetic one have CLIP scores."""
    num_synthetic_first: int = 0
    """Of them, those where a synthetic caption has the best score of all."""

    def add(self, rows: pa.Table) -> None:
        """Count the images of a manifest's rows."""
        codes, num = _images_of(rows["key"])
        self.num_images += num
        kept = rows["kept"].to_numpy()
        self.num_kept += int(np.count_nonzero(np.bincount(codes[kept], minlength=1)))
        scores = rows["clip_score"].to_numpy()
        is_web = pc.equal(rows["source"], "web").to_numpy()
        web, synthetic = (_best(codes, scores, where, num) for where in (is_web, ~is_web))
        both = np.isfinite(web) & np.isfinite(synthetic)
        self.num_compared += int(both.sum())
        self.num_synthetic_first += int((synthetic > web)[both].sum())

    def merge(self, other: ImageSums) -> None:
        """Add another shard's."""
        self.num_images += other.num_images
        self.num_kept += other.num_kept
        self.num_compared += other.num_compared
        self.num_synthetic_first += other.num_synthetic_first


def scores_of_repeats(rows: pa.Table) -> np.ndarray:
    """ITM scores of the synthetic captions below the threshold that read as their image's web caption, (N,).

    Above it they would be duplicates (`curation.selection`): no threshold keeps them.
    """
    low = rows.filter(pc.fill_null(pc.equal(rows["drop_reason"], "low_itm"), False))
    web, synthetic = (low.filter(pc.equal(low["source"], source)) for source in ("web", "synthetic"))
    if not web.num_rows or not synthetic.num_rows:
        return np.zeros(0, np.float32)
    text = web["text"].take(pc.index_in(synthetic["key"], web["key"].combine_chunks()))
    repeats = pc.fill_null(pc.equal(synthetic["text"], text), False)
    return pc.drop_null(pc.filter(synthetic["itm_score"], repeats)).to_numpy()


def _images_of(keys: pa.ChunkedArray) -> tuple[np.ndarray, int]:
    """(number of each row's image, (N,); how many images). Rows of an image stand together, as every stage has them."""
    array = keys.combine_chunks()
    if not len(array):
        return np.zeros(0, np.int64), 0
    begins = pc.not_equal(array.slice(1), array.slice(0, len(array) - 1)).to_numpy(zero_copy_only=False)
    codes = np.concatenate([[0], np.cumsum(begins)])
    return codes, int(codes[-1]) + 1


def _best(codes: np.ndarray, scores: np.ndarray, where: np.ndarray, num: int) -> np.ndarray:
    """The best score of each image, (num,); minus infinity where there is none."""
    has_score = where & ~np.isnan(scores)
    best = np.full(num, -np.inf)
    np.maximum.at(best, codes[has_score], scores[has_score])
    return best


def _num_passing(scores: np.ndarray) -> np.ndarray:
    """Scores at or above each threshold, compared in float64 as the selection does."""
    num_reached = np.searchsorted(THRESHOLDS, scores.astype(np.float64), side="right")
    below_or_at = np.bincount(num_reached, minlength=len(THRESHOLDS) + 1)
    return below_or_at[::-1].cumsum()[::-1][1:]
