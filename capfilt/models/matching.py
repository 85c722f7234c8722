"""ITM probabilities of many texts for each of several images (BLIP §3.1, image-grounded text encoder).

In: image features and token ids. Out: a probability of a match for each text.

- an image's cross-attention keys and values are computed once and shared by its texts; equal texts of an image
  are scored once
- a text is padded to the next multiple of eight tokens, whatever its neighbours; texts of one padded length
  go together. In float32 on a CPU a score does not depend on the batch around it, to the bit.

Legend: B images, R texts, T tokens, P patches, D width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from capfilt.models.med import Filter, KeyValue, TextLayout
from capfilt.models.rows import filled

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
    pairs = dict.fromkeys((image, tuple(text)) for image, own in enumerate(texts) for text in own)
    by_length: dict[int, list[tuple[int, tuple[int, ...]]]] = {}
    for image, text in pairs:
        padded = -(-len(text) // _TOKENS_MULTIPLE) * _TOKENS_MULTIPLE
        by_length.setdefault(padded, []).append((image, text))
    key_values = model.encoder.image_key_values(features_BPD) if pairs else []
    scores: dict[tuple[int, tuple[int, ...]], float] = {}
    for padded, group in by_length.items():
        rows, images = [text for _, text in group], [image for image, _ in group]
        scores |= zip(group, _match_rows(model, key_values, rows, images, padded), strict=True)
    return [[scores[image, tuple(text)] for text in own] for image, own in enumerate(texts)]


def _match_rows(
    model: Filter, key_values: list[KeyValue], rows: Sequence[Sequence[int]], images: list[int], padded: int
) -> list[float]:
    """Probabilities of texts that are padded to one length."""
    device = key_values[0][0].device
    tokens_RT = torch.full((len(rows), padded), model.encoder.config.pad_token_id)
    for number, row in enumerate(rows):
        tokens_RT[number, : len(row)] = torch.tensor(row)
    lengths_R = torch.tensor([len(row) for row in rows])
    mask_RT = torch.arange(padded) < lengths_R[:, None]
    layout = TextLayout(torch.tensor(images, device=device), num_images=key_values[0][0].shape[0], num_tokens=padded)
    hidden_RTD = model.encoder(tokens_RT.to(device), mask_BT=mask_RT.to(device), image=key_values, layout=layout)
    logits_R2 = model.itm_head(filled(hidden_RTD[:, 0]))[: len(rows)]
    return logits_R2.float().softmax(dim=1)[:, 1].tolist()
