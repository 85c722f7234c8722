"""Retrieval: ITC ranks everything, ITM ranks the best candidates again (BLIP §5.1, BLIP-2 §4.4).

In: a model, pictures, texts, and whose each text is. Out: R@1, R@5 and R@10 both ways, by ITC alone and after ITM.

- the k_test best by ITC cosine are ranked again by the raw ITM match logit + the ITC cosine; what is no candidate keeps
  its ITC place, behind every candidate
- a pair that is a candidate both ways is matched once, and an image's keys and values serve all its texts
- nothing of (images x texts) is held whole: cosines are made, ranked and let go by rows. Images are encoded twice, for
  ITC and for ITM, because their features take far more than anything else (577 x 768 floats each at 384 px: 8.9 GB for
  COCO's 5,000). What is held at the peak, beside the model: embeddings (N·Q + M)·E, the K candidates of both ways and
  the list of their pairs, two batches of prepared pictures, one of features, one step's pairs. For COCO's 5,000 images
  and 25,000 texts with k 256, Q 1 and batches of 64 images that was 0.6 GB (a model that computes nothing, 2026-11-22)

Legend: N images, M texts, K candidates of a query, Q embeddings of an image, E embedding, R pairs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from capfilt.errors import CapfiltError, UsageError
from capfilt.evaluate.pictures import Pictures, prepare_ahead
from capfilt.evaluate.ranking import KS, Recalls, match_ranks, recalls_of
from capfilt.evaluate.retrieval_models import RetrievalModel
from capfilt.progress import NullProgress, Progress
from capfilt.weights.devices import in_parts

TEXTS_AT_ONCE = 256
"""Texts embedded at a time."""
PAIRS_AT_ONCE = 256
"""Pairs that ITM takes at a time."""
COSINES_AT_ONCE = 16_000_000
"""Numbers in one block of cosines: 64 MB."""


@dataclass(frozen=True)
class ScoredPairs:
    """The candidates of both ways, each once, in the order of images and then texts."""

    images: np.ndarray
    """Number of the image, int64."""
    texts: np.ndarray
    """Number of the text, int64."""
    cosines: np.ndarray
    """ITC cosine, float32."""
    logits: np.ndarray
    """ITM match logit, float32."""


@dataclass(frozen=True)
class RetrievalReport:
    """What `evaluate_retrieval` found."""

    num_images: int
    num_texts: int
    num_images_without_text: int
    """Images that stand among the candidates and are no queries themselves."""
    k_test: int
    """Candidates ranked again by ITM; 0 for ITC alone."""
    num_itm_pairs: int
    """Different pairs that ITM scored."""
    itc: Recalls
    """By ITC alone."""
    itm: Recalls | None
    """By ITM match logit + ITC cosine among the candidates; None without ITM."""
    computing: str
    seconds: float


@torch.inference_mode()
def evaluate_retrieval(
    model: RetrievalModel,
    pictures: Pictures,
    texts: Sequence[str],
    *,
    image_of_text: Sequence[int] | None = None,
    k_test: int = 0,
    ks: Sequence[int] = KS,
    pairs_at_once: int = PAIRS_AT_ONCE,
    progress: Progress | None = None,
) -> tuple[RetrievalReport, ScoredPairs | None]:
    """Recalls of a model, and with `k_test` the candidates' scores.

    `image_of_text` gives the image of each text; None pairs them off in order. k_test: 256 for COCO, 128 for
    Flickr30K in the released code. Raises UsageError where there is nothing to find, and what `pictures` raises.
    """
    started, progress = time.monotonic(), progress or NullProgress()
    owners = np.arange(len(texts)) if image_of_text is None else np.asarray(image_of_text, dtype=np.int64)
    _check(len(pictures), len(texts), owners)
    tokens = model.tokenize(texts)
    texts_ME = _embed_texts(model, tokens, progress)
    images_NQE = _embed_images(model, pictures, progress)
    image_labels = torch.arange(len(pictures), device=model.device)
    text_labels = torch.from_numpy(owners).to(model.device)
    by_image = _rank(images_NQE, image_labels, texts_ME, text_labels, _cosines_of_images, k_test)
    by_text = _rank(texts_ME, text_labels, images_NQE, image_labels, _cosines_of_texts, k_test)
    itc, itm, scored = recalls_of(by_image.ranks, by_text.ranks, ks), None, None
    if k_test:
        pairs = _Pairs.of(by_image.candidates, by_text.candidates)
        logits = _match(model, pictures, tokens, pairs, pairs_at_once, progress)
        ranks = [
            _rank_again(ranked, logits[rows], labels, candidate_labels)
            for ranked, rows, labels, candidate_labels in (
                (by_image, pairs.of_image, image_labels, text_labels),
                (by_text, pairs.of_text, text_labels, image_labels),
            )
        ]
        itm = recalls_of(ranks[0], ranks[1], ks)
        scored = pairs.scored(by_image.cosines, by_text.cosines, logits)
    report = RetrievalReport(
        num_images=len(pictures), num_texts=len(texts),
        num_images_without_text=len(pictures) - len(np.unique(owners)),
        k_test=k_test, num_itm_pairs=0 if scored is None else len(scored.logits),
        itc=itc, itm=itm, computing=model.computing, seconds=time.monotonic() - started,
    )  # fmt: skip
    return report, scored


def _check(num_images: int, num_texts: int, owners: np.ndarray) -> None:
    if not num_images or not num_texts:
        raise UsageError(f"{num_images} images and {num_texts} texts: there is nothing to find. Give some of each.")
    if len(owners) != num_texts or owners.min() < 0 or owners.max() >= num_images:
        raise ValueError(f"{len(owners)} owners, {owners.min()} to {owners.max()}, of {num_texts} texts")


# --- ITC ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Ranked:
    """What ITC says of the queries of one way."""

    ranks: Tensor
    """Place of the best match, int64 (queries,)."""
    candidates: np.ndarray
    """Numbers of the K best, int64 (queries, K)."""
    cosines: np.ndarray
    """Their cosines, float32."""


def _embed_texts(model: RetrievalModel, tokens: Sequence[list[int]], progress: Progress) -> Tensor:
    progress.start("texts", len(tokens), "text")
    order = sorted(range(len(tokens)), key=lambda number: len(tokens[number]))  # little padding
    parts = []
    for start in range(0, len(order), TEXTS_AT_ONCE):
        batch = [tokens[number] for number in order[start : start + TEXTS_AT_ONCE]]
        parts.append(model.embed_texts(batch))
        progress.advance(len(batch))
    progress.finish()
    sorted_ME = torch.cat(parts)
    texts_ME = torch.empty_like(sorted_ME)
    texts_ME[torch.tensor(order, device=texts_ME.device)] = sorted_ME
    return texts_ME


def _embed_images(model: RetrievalModel, pictures: Pictures, progress: Progress) -> Tensor:
    progress.start("images", len(pictures), "image")
    parts = []
    for _, features_BPD in _encoded(model, pictures):
        parts.append(model.embed_images(features_BPD))
        progress.advance(len(features_BPD))
    progress.finish()
    return torch.cat(parts)


def _encoded(model: RetrievalModel, pictures: Pictures) -> Iterator[tuple[int, Tensor]]:
    """The first image's number and the features of each batch."""
    for start, prepared in prepare_ahead(pictures, model.prepare, model.image_batch_size):
        parts = in_parts(lambda part, prepared=prepared: model.encode_images(prepared[part]), 0, len(prepared))
        yield start, torch.cat(parts) if len(parts) > 1 else parts[0]


def _cosines_of_images(images_BQE: Tensor, texts_ME: Tensor) -> Tensor:
    """(B, M): an image's best embedding counts."""
    return (images_BQE.flatten(0, 1) @ texts_ME.T).unflatten(0, images_BQE.shape[:2]).amax(dim=1)


def _cosines_of_texts(texts_BE: Tensor, images_NQE: Tensor) -> Tensor:
    """(B, N): an image's best embedding counts."""
    return (texts_BE @ images_NQE.flatten(0, 1).T).unflatten(1, images_NQE.shape[:2]).amax(dim=2)


def _rank(
    queries: Tensor,
    labels: Tensor,
    candidates: Tensor,
    candidate_labels: Tensor,
    cosines: Callable[[Tensor, Tensor], Tensor],
    num_kept: int,
) -> _Ranked:
    """Every query against every candidate, a block of queries at a time; labels are equal where two match."""
    num_embeddings = max(side.shape[1] for side in (queries, candidates) if side.ndim == 3)
    rows = max(1, COSINES_AT_ONCE // (len(candidates) * num_embeddings))
    num_kept = min(num_kept, len(candidates))
    ranks, kept, values = [], [], []
    for block, own in zip(queries.split(rows), labels.split(rows), strict=True):
        scores = cosines(block, candidates)
        _require_finite(scores)
        ranks.append(match_ranks(scores, own[:, None] == candidate_labels).cpu())
        best = scores.topk(num_kept, dim=1)
        kept.append(best.indices.cpu())
        values.append(best.values.cpu())
    return _Ranked(torch.cat(ranks), torch.cat(kept).numpy(), torch.cat(values).numpy())


# --- ITM ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Pairs:
    """The candidates of both ways as different pairs, ordered by image and then text."""

    images: np.ndarray
    texts: np.ndarray
    of_image: np.ndarray
    """Place in the list of each image's candidates, (N, K)."""
    of_text: np.ndarray
    """Place in the list of each text's candidates, (M, K)."""

    @staticmethod
    def of(texts_NK: np.ndarray, images_MK: np.ndarray) -> _Pairs:
        """From each image's best texts and each text's best images."""
        num_images, num_texts = len(texts_NK), len(images_MK)
        by_image = np.arange(num_images)[:, None] * num_texts + texts_NK
        by_text = images_MK * num_texts + np.arange(num_texts)[:, None]
        different, places = np.unique(np.concatenate([by_image.ravel(), by_text.ravel()]), return_inverse=True)
        return _Pairs(
            different // num_texts, different % num_texts,
            places[: by_image.size].reshape(by_image.shape), places[by_image.size :].reshape(by_text.shape),
        )  # fmt: skip

    def scored(self, cosines_NK: np.ndarray, cosines_MK: np.ndarray, logits: np.ndarray) -> ScoredPairs:
        """With the cosines of each way and the logits of the list."""
        cosines = np.empty(len(self.images), np.float32)
        cosines[self.of_text], cosines[self.of_image] = cosines_MK, cosines_NK
        return ScoredPairs(self.images, self.texts, cosines, logits)


def _match(
    model: RetrievalModel,
    pictures: Pictures,
    tokens: Sequence[list[int]],
    pairs: _Pairs,
    pairs_at_once: int,
    progress: Progress,
) -> np.ndarray:
    """ITM's match logits of all pairs, float32, image after image."""
    logits = np.empty(len(pairs.images), np.float32)
    progress.start("matching", len(logits), "pair")
    for first, features_BPD in _encoded(model, pictures):
        start, end = np.searchsorted(pairs.images, [first, first + len(features_BPD)])

        def score(part: slice, first: int = first, features_BPD: Tensor = features_BPD) -> Tensor:
            involved, images = np.unique(pairs.images[part] - first, return_inverse=True)
            own_features = features_BPD[torch.from_numpy(involved).to(features_BPD.device)]
            return model.itm_logits(own_features, images.tolist(), [tokens[n] for n in pairs.texts[part]])

        for begin in range(int(start), int(end), pairs_at_once):
            part = slice(begin, min(begin + pairs_at_once, int(end)))
            found = torch.cat(in_parts(score, part.start, part.stop))
            _require_finite(found)
            logits[part] = found.cpu().numpy()
            progress.advance(part.stop - part.start)
    progress.finish()
    return logits


def _rank_again(ranked: _Ranked, logits: np.ndarray, labels: Tensor, candidate_labels: Tensor) -> Tensor:
    """Places by ITM match logit + ITC cosine; a query whose match is no candidate keeps its place by ITC.

    That place is behind all candidates, which is where such a match stands.
    """
    scores = torch.from_numpy(ranked.cosines + logits)
    labels_of_candidates = candidate_labels.cpu()[torch.from_numpy(ranked.candidates)]
    places = match_ranks(scores, labels.cpu()[:, None] == labels_of_candidates)
    return torch.where(places > 0, places, ranked.ranks)


def _require_finite(scores: Tensor) -> None:
    if not bool(torch.isfinite(scores).all()):
        raise CapfiltError(
            "The model gives scores that are no numbers (NaN or infinite). Try --dtype float32; where that does not "
            "help, its weights are damaged."
        )
