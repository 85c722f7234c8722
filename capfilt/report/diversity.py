"""How much the captions of one image differ: distinct-n and self-BLEU.

In: the captions of some images. Out: figures between 0 and 1. Words are those of `words.plain_texts`.

    distinct-n  different n-grams over all n-grams, image by image, averaged (Li et al. 2016, "A Diversity-Promoting
                Objective Function for Neural Conversation Models", §5.2)
    self-BLEU   BLEU-4 of each caption with the image's others as references, averaged; the lower, the more they differ
                (Zhu et al. 2018, "Texygen", §3.2). Where a caption shares no n-gram of a length with the others, 0.1 of
                one stands for it (Chen and Cherry 2014, smoothing 1)
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

MAX_ORDER = 4
_ALMOST_NONE = 0.1

Grams = Counter[tuple[str, ...]]


@dataclass
class Diversity:
    """Averages over the images that have at least two captions with words."""

    num_images: int
    distinct_1: float
    distinct_2: float
    self_bleu: float


def diversity_of(images: Iterable[Sequence[str]]) -> Diversity | None:
    """Of the captions of each image, as plain texts; None where no image has two."""
    sums, num = [0.0, 0.0, 0.0], 0
    for captions in images:
        texts = [words for words in (caption.split() for caption in captions) if words]
        if len(texts) > 1:
            num += 1
            for place, value in enumerate((distinct_n(texts, 1), distinct_n(texts, 2), self_bleu(texts))):
                sums[place] += value
    return Diversity(num, *(value / num for value in sums)) if num else None


def distinct_n(texts: Sequence[Sequence[str]], order: int) -> float:
    """Different n-grams over all n-grams of one image's captions; 0 where there is none."""
    grams = Counter[tuple[str, ...]]()
    for words in texts:
        grams.update(_grams(words, order))
    return len(grams) / grams.total() if grams else 0.0


def self_bleu(texts: Sequence[Sequence[str]]) -> float:
    """The mean over one image's captions, of which there are two or more."""
    counted = [[_grams(words, order) for words in texts] for order in range(1, MAX_ORDER + 1)]
    shared = [_shared(grams) for grams in counted]
    lengths = [len(words) for words in texts]
    scores = [
        _bleu(
            [shared[order][number] for order in range(MAX_ORDER)],
            [counted[order][number].total() for order in range(MAX_ORDER)],
            lengths[number],
            min(lengths[:number] + lengths[number + 1 :], key=lambda other: (abs(other - lengths[number]), other)),
        )
        for number in range(len(texts))
    ]
    return sum(scores) / len(scores)


def _grams(words: Sequence[str], order: int) -> Grams:
    return Counter(zip(*(words[start:] for start in range(order)), strict=False))


def _shared(grams: Sequence[Grams]) -> list[int]:
    """Of each caption: its n-grams that another caption has too, each as often as that one has it at most."""
    most: dict[tuple[str, ...], tuple[int, int, int]] = {}  # largest count, whose it is, and the largest of others
    for number, counts in enumerate(grams):
        for gram, times in counts.items():
            first, owner, second = most.get(gram, (0, -1, 0))
            most[gram] = (times, number, first) if times > first else (first, owner, max(second, times))
    found = []
    for number, counts in enumerate(grams):
        total = 0
        for gram, times in counts.items():
            first, owner, second = most[gram]
            total += min(times, second if owner == number else first)
        found.append(total)
    return found


def _bleu(matches: Sequence[int], totals: Sequence[int], length: int, reference: int) -> float:
    """BLEU of one caption with uniform weights; orders longer than the caption count as one n-gram of it."""
    if not matches[0]:
        return 0.0
    logs = [math.log((match or _ALMOST_NONE) / max(total, 1)) for match, total in zip(matches, totals, strict=True)]
    brevity = 1.0 if length > reference else math.exp(1 - reference / length)
    return brevity * math.exp(sum(logs) / MAX_ORDER)
