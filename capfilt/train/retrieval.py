"""Retrieval with a stage-1 model: ITC over all pairs, then ITM on the best candidates (BLIP-2 §4.4).

In: a model folder, images and texts. Out: R@1, R@5 and R@10, in percent, image → text and text → image.

Legend: N images, M texts, K candidates, Q queries, E embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from capfilt.models.blip2 import Texts
from capfilt.train.generate import Picture, prepare_images
from capfilt.train.saved import SavedStage1, encode_texts, load_stage1
from capfilt.weights.devices import choose_device

BATCH_SIZE = 128
"""Images, texts or pairs at a time."""
MAX_TEXT_TOKENS = 32


@dataclass(frozen=True)
class RetrievalRecall:
    """Percent of queries whose match is among the first k."""

    image_to_text: dict[int, float]
    text_to_image: dict[int, float]


def retrieval_recall(
    model_dir: str | Path,
    images: Sequence[Picture],
    texts: Sequence[str],
    *,
    image_of_text: Sequence[int] | None = None,
    num_candidates: int = 0,
    ks: tuple[int, ...] = (1, 5, 10),
    device: str = "auto",
) -> RetrievalRecall:
    """Recall of a stage-1 model.

    `image_of_text` gives the image of each text; None pairs them off in order. With `num_candidates` > 0 the
    best so many by ITC are ranked again by the ITM match logit + the ITC cosine (256 for COCO, 128 for
    Flickr30K in the released code); without, ITC alone ranks.
    """
    saved = load_stage1(model_dir, choose_device(device))
    owners = np.arange(len(texts)) if image_of_text is None else np.asarray(image_of_text)
    scores = score_pairs(saved, images, texts, num_candidates=num_candidates)
    matches = torch.from_numpy(owners)[None, :] == torch.arange(len(images))[:, None]
    return RetrievalRecall(
        {k: _recall(scores[0], matches, k) for k in ks}, {k: _recall(scores[1].T, matches.T, k) for k in ks}
    )


@torch.no_grad()
def score_pairs(
    saved: SavedStage1, images: Sequence[Picture], texts: Sequence[str], *, num_candidates: int = 0
) -> tuple[Tensor, Tensor]:
    """Scores (N, M) for ranking texts of an image, and for ranking images of a text.

    Pairs that are no candidates keep their cosine and rank behind every candidate.
    """
    stage = saved.stage.eval()
    device = stage.temperature.device
    pixels = prepare_images(images, saved.encoder.preparation)
    features = torch.cat([saved.encoder.vision(part.to(device)) for part in pixels.split(BATCH_SIZE)])
    encoded = encode_texts(saved.tokenizer, list(texts), MAX_TEXT_TOKENS, device)
    queries = torch.cat([
        stage.embed_queries(stage.qformer.encode_queries(stage.image_key_values(part))[0])
        for part in features.split(BATCH_SIZE)
    ])  # fmt: skip
    embedded = torch.cat([
        stage.embed_texts(Texts(tokens=tokens, mask=mask))
        for tokens, mask in zip(encoded.tokens.split(BATCH_SIZE), encoded.mask.split(BATCH_SIZE), strict=True)
    ])  # fmt: skip
    cosines = torch.stack([(image_QE @ embedded.T).amax(dim=0) for image_QE in queries]).cpu()
    if not num_candidates:
        return cosines, cosines
    by_image = _candidates(cosines, num_candidates)
    by_text = _candidates(cosines.T, num_candidates).T
    logits = _match_logits(saved, features, encoded, by_image | by_text)
    ahead = cosines + logits - logits[by_image | by_text].min() + 3.0  # above any cosine
    return torch.where(by_image, ahead, cosines), torch.where(by_text, ahead, cosines)


def _candidates(scores: Tensor, num_candidates: int) -> Tensor:
    """True at the best of each row."""
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    return chosen.scatter_(1, scores.topk(min(num_candidates, scores.shape[1])).indices, True)


def _match_logits(saved: SavedStage1, features: Tensor, texts: Texts, wanted: Tensor) -> Tensor:
    """ITM's match logits (N, M) of the wanted pairs, 0 elsewhere."""
    logits = torch.zeros(wanted.shape)
    for part in wanted.nonzero().split(BATCH_SIZE):
        image = saved.stage.image_key_values(features[part[:, 0]])
        pair_texts = Texts(tokens=texts.tokens[part[:, 1]], mask=texts.mask[part[:, 1]])
        logits[part[:, 0], part[:, 1]] = saved.stage.itm_logits(image, pair_texts)[:, 1].cpu()
    return logits


def _recall(scores: Tensor, matches: Tensor, k: int) -> float:
    """Percent of rows that have a match among their k best columns."""
    best = scores.topk(min(k, scores.shape[1])).indices
    return 100.0 * float(matches.gather(1, best).any(dim=1).float().mean())
