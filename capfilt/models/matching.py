"""ITM probabilities of many texts for each of several images (BLIP §3.1, image-grounded text encoder).

In: image features and token ids. Out: a probability of a match for each text.

- an image's cross-attention keys and values are computed once and shared by its texts
- a text is padded to the next multiple of eight tokens, whatever its neighbours; texts of one padded length
  go together. In float32 on a CPU a score does not depend on the batch around it, to the bit.

Legend: B images, R texts, T tokens, P patches, D width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from capfilt.models.decoding import filled
from capfilt.models.med import Filter, KeyValue, TextLayout

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
    places = [(image, index) for image, own in enumerate(texts) for index in range(len(own))]
    by_length: dict[int, list[tuple[int, int]]] = {}
    for image, index in places:
        padded = -(-len(texts[image][index]) // _TOKENS_MULTIPLE) * _TOKENS_MULTIPLE
        by_length.setdefault(padded, []).append((image, index))
    key_values = model.encoder.image_key_values(features_BPD) if places else []
    scores = [[0.0] * len(own) for own in texts]
    for padded, group in by_length.items():
        rows = [texts[image][index] for image, index in group]
        found = _match_rows(model, key_values, rows, [image for image, _ in group], padded)
        for (image, index), score in zip(group, found, strict=True):
            scores[image][index] = score
    return scores


def _match_rows(
    model: Filter, key_values: list[KeyValue], rows: list[Sequence[int]], images: list[int], padded: int
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
