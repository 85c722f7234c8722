"""ITM of many texts for each of several images (BLIP §3.1, image-grounded text encoder).

In: image features and token ids. Out: logits or a probability of a match for each text.

- an image's cross-attention keys and values are computed once, layer by layer, and shared by its texts; equal texts
  of an image are scored once
- a text is padded to the next multiple of eight tokens, whatever its neighbours; texts of one padded length
  go together. In float32 on a CPU a score does not depend on the batch around it, to the bit.

Legend: B images, R texts, T tokens, P patches, D width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from capfilt.models.med import Filter
from capfilt.models.rows import filled
from capfilt.models.text_layout import TextGroup, TextLayout

_TOKENS_MULTIPLE = 8


@torch.inference_mode()
def match_probabilities(
    model: Filter, features_BPD: Tensor, texts: Sequence[Sequence[Sequence[int]]]
) -> list[list[float]]:
    """softmax(ITM logits)[1] of every text of every image.

    Args:
        model: in eval mode.
        features_BPD: (B, P + 1, D) from `model.vision`.
        texts: token ids by image and text, [ENC] first (or [CLS], as transformers feeds it), [SEP] last.

    Returns:
        Probabilities in [0, 1] by image and text.
    """
    pairs = list(dict.fromkeys((image, tuple(text)) for image, own in enumerate(texts) for text in own))
    if not pairs:
        return [[] for _ in texts]
    probabilities = pair_logits(model, features_BPD, pairs).softmax(dim=1)[:, 1].tolist()
    scores = dict(zip(pairs, probabilities, strict=True))
    return [[scores[image, tuple(text)] for text in own] for image, own in enumerate(texts)]


@torch.inference_mode()
def pair_logits(model: Filter, features_BPD: Tensor, pairs: Sequence[tuple[int, Sequence[int]]]) -> Tensor:
    """ITM logits (R, 2), float32, of R pairs; index 1 is "match".

    Args:
        model: in eval mode.
        features_BPD: (B, P + 1, D) from `model.vision`.
        pairs: an image's number, 0 to B - 1, and the token ids of a text, as `match_probabilities` takes them. Texts
            of an image share its keys and values wherever they stand.
    """
    rows_by_length: dict[int, list[int]] = {}
    for row, (_, text) in enumerate(pairs):
        rows_by_length.setdefault(-(-len(text) // _TOKENS_MULTIPLE) * _TOKENS_MULTIPLE, []).append(row)
    groups = [
        _group(model, [pairs[row] for row in rows], padded, features_BPD) for padded, rows in rows_by_length.items()
    ]
    logits_R2 = features_BPD.new_empty(len(pairs), 2, dtype=torch.float32)
    for rows, hidden_RTD in zip(
        rows_by_length.values(), model.encoder.forward_groups(features_BPD, groups), strict=True
    ):
        logits_R2[rows] = model.itm_head(filled(hidden_RTD[:, 0]))[: len(rows)].float()
    return logits_R2


def _group(model: Filter, own: Sequence[tuple[int, Sequence[int]]], padded: int, features_BPD: Tensor) -> TextGroup:
    """Texts, each with its image's number, padded to one length."""
    tokens_RT = torch.full((len(own), padded), model.encoder.config.pad_token_id)
    for row, (_, text) in enumerate(own):
        tokens_RT[row, : len(text)] = torch.tensor(text)
    mask_RT = torch.arange(padded) < torch.tensor([len(text) for _, text in own])[:, None]
    device, images = features_BPD.device, torch.tensor([image for image, _ in own])
    layout = TextLayout(images.to(device), num_images=len(features_BPD), num_tokens=padded)
    return TextGroup(tokens_RT.to(device), mask_RT.to(device), layout)
