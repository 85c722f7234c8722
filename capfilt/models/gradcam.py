"""Grad-CAM of cross-attention: where in a picture the words of a text are seen (Selvaraju et al. 2017; ALBEF §6.3).

In: a filter, a captioner or a stage-1 model, image features, token ids, the tokens of each word, a layer. Out: a map
over the patches for each word, and one for the text as a whole.

- a map is ReLU(gradient of the score with respect to a cross-attention map) x that attention map, averaged over
  heads; the patch of [CLS] is left out
- layers are counted from 0, as in the list of layers. BLIP's released code takes 7, the eighth, of 12 (LAVIS'
  example for BLIP-large; its function's own default is 6, the seventh)
- the models' attention is fused and keeps no maps: `kept_map` lets one layer compute its own plainly for as long as
  it is needed, and nothing else changes

Not for models whose linear layers are packed (`models.packed`): no gradient goes through those.

Legend: B images, H heads, Q queries, P patches with [CLS] first, T tokens, S attended places, d width of a head,
D width, W words; I x J rows and columns of patches without [CLS].
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from capfilt.models.attention import KeyValue
from capfilt.models.blip2 import Stage1, Texts
from capfilt.models.med import Attention, Captioner, Filter, TextLayer, TextTransformer
from capfilt.models.qformer import QFormerLayer
from capfilt.models.text_layout import TextLayout

RELEASED_LAYER, RELEASED_DEPTH = 7, 12
"""The layer that BLIP's released code explains, counted from 0, and how many its text encoder has."""

Words = Sequence[Sequence[int]]
"""By word, the places of its pieces in the text, the first token being 0."""


@dataclass(frozen=True)
class WordMaps:
    """What a model sees of a text in a picture; tensors on the CPU, float32, none below 0."""

    probability: float
    """Of a match, in [0, 1]; of a captioner the geometric mean of its words' pieces' probabilities."""
    average: Tensor
    """(I, J): the text as a whole. The mean over the words' pieces, or over the queries of a Q-Former."""
    words: Tensor
    """(W, I, J): each word, the mean over its pieces."""
    word_probabilities: Tensor | None = None
    """(W,) of a captioner: each word's probability after those before it."""


def default_layer(layers: Sequence[int], depth: int) -> int:
    """Of layers that can be explained the last that lies no deeper than BLIP's released choice, 7 of 12."""
    wanted = RELEASED_LAYER * depth // RELEASED_DEPTH
    return max((layer for layer in layers if layer <= wanted), default=min(layers))


def filter_layers(model: Filter) -> list[int]:
    """Layers whose maps of words reach the match logit: all but the last, which [ENC] alone leaves for the head."""
    return list(range(max(len(model.encoder.layers) - 1, 1)))


def captioner_layers(model: Captioner) -> list[int]:
    """All layers of the decoder."""
    return list(range(len(model.decoder.layers)))


def stage1_layers(stage: Stage1) -> list[int]:
    """The Q-Former's layers that attend to the image."""
    config = stage.qformer.config
    return [layer for layer in range(config.depth) if config.attends_to_image(layer)]


@contextmanager
def kept_map(attention: Attention) -> Iterator[list[Tensor]]:
    """While open, the attention computes plainly, and each call adds its map (B, H, T, S) to the list.

    Outputs are the same but for rounding; gradients of what is computed of them reach the map. Closing it, in an
    error too, gives the attention its own way back.
    """
    maps: list[Tensor] = []

    def attend_plainly(
        hidden_BTD: Tensor,
        key_value: KeyValue,
        mask: Tensor | None = None,
        *,
        is_causal: bool = False,
        layout: TextLayout | None = None,
    ) -> Tensor:
        query_BTD = attention.query(hidden_BTD)
        if layout is not None:
            query_BTD = layout.by_image(query_BTD)
        query_BHTd = query_BTD.unflatten(2, (attention.num_heads, -1)).transpose(1, 2)
        scores_BHTS = query_BHTd @ key_value[0].transpose(2, 3) * query_BHTd.shape[3] ** -0.5
        if is_causal:
            mask = torch.ones_like(scores_BHTS[0, 0], dtype=torch.bool).tril()
        if mask is not None:
            scores_BHTS = scores_BHTS.masked_fill(~mask, -math.inf)
        map_BHTS = scores_BHTS.softmax(dim=3)
        if torch.is_grad_enabled() and not map_BHTS.requires_grad:
            map_BHTS.requires_grad_()
        maps.append(map_BHTS)
        attended_BTD = (map_BHTS @ key_value[1]).transpose(1, 2).flatten(2)
        return attention.output(attended_BTD if layout is None else layout.by_row(attended_BTD))

    before = attention.__dict__.get("forward")
    attention.__dict__["forward"] = attend_plainly
    try:
        yield maps
    finally:
        if before is None:
            del attention.__dict__["forward"]
        else:
            attention.__dict__["forward"] = before


def explain_match(model: Filter, features_1PD: Tensor, tokens: Sequence[int], words: Words, layer: int) -> WordMaps:
    """Maps of the image-grounded text encoder: what ITM's match logit owes to each word's look at the picture.

    Args:
        model: in eval mode.
        features_1PD: of one image, from `model.vision`; made without inference mode.
        tokens: ids of one text, [ENC] first, [SEP] last.
        words: of which the maps are wanted; special tokens belong to none.
        layer: one of `filter_layers`. The last of several gives maps of zeros.
    """
    tokens_1T = torch.tensor([tokens], device=features_1PD.device)
    with torch.enable_grad(), kept_map(_cross_attention(model.encoder, layer)) as maps:
        logits_12 = model.itm_logits(features_1PD, tokens_1T, torch.ones_like(tokens_1T, dtype=torch.bool))
    gradients = torch.autograd.grad(logits_12[0, 1], maps)
    tokens_TIJ = _on_patches(_weighted(maps[0], gradients[0]))
    average_IJ = tokens_TIJ[[place for word in words for place in word]].mean(dim=0)
    return WordMaps(_match_probability(logits_12), average_IJ, _of_words(tokens_TIJ, words))


def explain_stage1_match(
    stage: Stage1, features_1PD: Tensor, tokens: Sequence[int], words: Words, layer: int
) -> WordMaps:
    """Maps of a Q-Former, whose text never attends to the image itself: the queries do, and they read the text.

    One layer attends first among queries and text, then from the queries to the image. Both maps are weighted by
    their gradients as in the module's docstring. The second gives a map of the image for each query; their mean is
    `average`. The first says how much each query took from each token just before it looked at the image; each
    query's map is divided among the tokens in these proportions. So the maps of all tokens, special ones included,
    add up to `average`, but for queries that took from no token.

    Deviation from BLIP-2: none of its papers or released code explains the Q-Former. BLIP's Grad-CAM takes a
    token's own row of the cross-attention, which does not exist here. What a query knew of the text from earlier
    layers is not counted, so maps of words say less than those of BLIP: in a small model of the miniature world,
    400 steps old, `average` lay on the objects three times as much as by chance in layer 0 and no more than by
    chance in the last, and in neither did words tell two objects apart.

    Args: as `explain_match`; features from the frozen encoder, before the stage's layer norm, and tokens with [CLS]
    first; layer one of `stage1_layers`.
    """
    tokens_1T = torch.tensor([tokens], device=features_1PD.device)
    texts = Texts(tokens=tokens_1T, mask=torch.ones_like(tokens_1T, dtype=torch.bool))
    block = cast(QFormerLayer, stage.qformer.layers[layer])
    assert block.cross_attention is not None, f"layer {layer} does not attend to the image"
    with (
        torch.enable_grad(),
        kept_map(block.self_attention) as read_maps,
        kept_map(block.cross_attention) as image_maps,
    ):
        logits_12 = stage.itm_logits(stage.image_key_values(features_1PD), texts)
    maps = [*read_maps, *image_maps]
    read, seen_QP = (_weighted(*both) for both in zip(maps, torch.autograd.grad(logits_12[0, 1], maps), strict=True))
    num_queries = len(seen_QP)
    read_QT = read[:num_queries, num_queries:]
    share_QT = read_QT / read_QT.sum(dim=1, keepdim=True).clamp(min=torch.finfo(read_QT.dtype).tiny)
    tokens_TIJ = _on_patches(share_QT.T @ seen_QP / num_queries)
    average_IJ = _on_patches(seen_QP).mean(dim=0)
    return WordMaps(_match_probability(logits_12), average_IJ, _of_words(tokens_TIJ, words))


def explain_caption(
    model: Captioner, features_1PD: Tensor, tokens: Sequence[int], words: Words, layer: int
) -> WordMaps:
    """Maps of the captioner: what the log-probability of each word owes to the look at the picture that wrote it.

    A piece is written by the place before it: the gradient of the piece's log-probability there with respect to
    that place's row of the cross-attention.

    Args: as `explain_match`; tokens with [DEC] first, then the prompt; layer one of `captioner_layers`.
    """
    tokens_1T = torch.tensor([tokens], device=features_1PD.device)
    with torch.enable_grad(), kept_map(_cross_attention(model.decoder, layer)) as maps:
        image = model.decoder.image_key_values(features_1PD)
        logits_TV = model.head(model.decoder(tokens_1T[:, :-1], image=image))[0]
        log_probabilities_T = logits_TV.log_softmax(dim=1).gather(1, tokens_1T[0, 1:, None])[:, 0]
    places = [place for word in words for place in word]
    rows = []
    for place in places:
        gradients = torch.autograd.grad(log_probabilities_T[place - 1], maps, retain_graph=True)
        rows.append(_weighted(maps[0], gradients[0])[place - 1])
    pieces_NIJ = _on_patches(torch.stack(rows))
    row_of_place = {place: row for row, place in enumerate(places)}
    by_row = [[row_of_place[place] for place in word] for word in words]
    known_T = log_probabilities_T.detach().float().cpu()
    return WordMaps(
        math.exp(float(known_T[[place - 1 for place in places]].mean())),
        pieces_NIJ.mean(dim=0),
        _of_words(pieces_NIJ, by_row),
        torch.stack([known_T[[place - 1 for place in word]].sum() for word in words]).exp(),
    )


def _cross_attention(transformer: TextTransformer, layer: int) -> Attention:
    return cast(TextLayer, transformer.layers[layer]).cross_attention


def _match_probability(logits_12: Tensor) -> float:
    return float(logits_12.detach().float().softmax(dim=1)[0, 1])


def _weighted(map_1HTS: Tensor, gradient_1HTS: Tensor) -> Tensor:
    """ReLU(gradient x map), which is ReLU(gradient) x map, averaged over heads: (T, S), float32, on the CPU."""
    return (map_1HTS.detach() * gradient_1HTS).clamp(min=0).mean(dim=1)[0].float().cpu()


def _on_patches(weighted_TP: Tensor) -> Tensor:
    """(T, P) → (T, I, J) without [CLS]'s patch."""
    side = math.isqrt(weighted_TP.shape[1] - 1)
    return weighted_TP[:, 1:].unflatten(1, (side, side))


def _of_words(tokens_TIJ: Tensor, words: Words) -> Tensor:
    """Each word's mean over its pieces: (W, I, J)."""
    return torch.stack([tokens_TIJ[list(word)].mean(dim=0) for word in words])
