"""Scores of image-text pairs: CLIP similarity and ITM probability. A scorer never drops.

In: pictures and their texts. Out: a number for each pair, higher is better. A new scorer is a class with
`prepare`, `score` and the attributes of `Scorer`, and an entry in SCORERS.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from PIL.Image import Image
from torch import Tensor

from capfilt.curation.pictures import normalise, pinned, stacked, to_square
from capfilt.data.captions import clean_caption
from capfilt.models.matching import match_probabilities
from capfilt.models.med import Filter
from capfilt.models.packed import pack_linears
from capfilt.models.vit import VisionTransformer, count_encoder_bytes
from capfilt.settings import FilterSettings, RankSettings
from capfilt.weights.blip import load_blip
from capfilt.weights.clip import find_clip, load_clip
from capfilt.weights.devices import (
    choose_batch_size,
    choose_device,
    choose_fast_dtype,
    describe_computing,
    name_dtype,
)
from capfilt.weights.model_files import ImagePreparation

ITM_MAX_TOKENS = 35
"""Longest text given to the filter, special tokens included (BLIP's released code: 35)."""

_CLIP_BYTES_PER_IMAGE = 64 * 2**20
"""Of ViT-L/14 with eleven texts in float32, roughly: features of 300 tokens, 24 blocks' buffers not kept."""


class Scorer(Protocol):
    """What the shard loop asks of a scorer."""

    device: torch.device
    """Where it computes."""
    batch_size: int
    """Images scored at a time; becomes smaller where memory does not hold them."""
    computing: str
    """Precision and device, for people."""
    fields: dict[str, Any]
    """What changes the scores, for the fingerprint."""

    @property
    def preparation(self) -> ImagePreparation | None:
        """All that `prepare` does, and then a picture is prepared once for models of equal preparation; None where it
        does something of its own."""
        ...

    def prepare(self, image: Image) -> Tensor:
        """An RGB picture as the model wants it."""
        ...

    def score(self, images: Sequence[Tensor], texts: Sequence[Sequence[str]]) -> list[list[float]]:
        """Scores by image and text, for pictures from `prepare` and the texts of each."""
        ...


class ClipScorer:
    """Cosine similarity of CLIP's image and text embeddings (BLIP-2 §3.4: ViT-L/14); models are open_clip's."""

    preparation: ImagePreparation | None = None

    def __init__(self, settings: RankSettings) -> None:
        """Load the model. Raises UsageError for an unknown name, and for weights that cannot be had."""
        self.device = choose_device(settings.device)
        self._dtype = choose_fast_dtype(settings.dtype, self.device)
        source = find_clip(settings)
        self._towers, self._transform, self._tokenize = load_clip(source, self.device, self._dtype)
        self.batch_size = choose_batch_size(settings.batch_size, self.device, _CLIP_BYTES_PER_IMAGE)
        self.computing = describe_computing(self._dtype, self.device)
        self.fields: dict[str, Any] = {
            "dtype": name_dtype(self._dtype),
            "model": source.digests(),
        }

    def prepare(self, image: Image) -> Tensor:
        """An RGB picture through open_clip's own transform: float32 (3, S, S)."""
        return pinned(self._transform(image.convert("RGB")), self.device)

    @torch.inference_mode()
    def score(self, images: Sequence[Tensor], texts: Sequence[Sequence[str]]) -> list[list[float]]:
        """Cosine similarities in [-1, 1]; each distinct text of the batch is encoded once."""
        distinct = list(dict.fromkeys(text for own in texts for text in own))
        if not distinct:
            return [[] for _ in texts]
        row = {text: number for number, text in enumerate(distinct)}
        batch = stacked(images, self.device).to(self._dtype)
        image_BE = self._towers.embed_images(batch).float()
        text_NE = self._towers.embed_texts(self._tokenize(distinct)).float()
        return [
            (text_NE[[row[text] for text in own]] * image_E).sum(dim=1).clamp(-1, 1).tolist() if own else []
            for own, image_E in zip(texts, image_BE, strict=True)
        ]


class ItmScorer:
    """Probability that a text describes an image, by BLIP's ITM head (BLIP §3.3)."""

    def __init__(self, settings: FilterSettings) -> None:
        """Load `settings.filter_model`. Raises UsageError where it cannot be had."""
        self.device = choose_device(settings.device)
        dtype = choose_fast_dtype(settings.dtype, self.device)
        loaded = load_blip(settings.filter_model, "filter", device=self.device, dtype=dtype, resizer=settings.resizer)
        assert isinstance(loaded.model, Filter)
        self._model, self._tokenizer = loaded.model, loaded.tokenizer
        pack_linears(self._model)
        self.vision, self.vision_digest = loaded.model.vision, loaded.vision_digest
        self.preparation = loaded.preparation
        config = loaded.model.encoder.config
        is_enc = settings.first_token == "enc"
        self._first_token_id = config.enc_token_id if is_enc else self._tokenizer.cls_token_id
        self._max_tokens = min(ITM_MAX_TOKENS, config.max_positions // 8 * 8)
        # A block of the image encoder takes more than the texts, and the keys and values of one layer.
        image_bytes = count_encoder_bytes(self.vision.config, dtype.itemsize)
        self.batch_size = choose_batch_size(settings.batch_size, self.device, image_bytes)
        self.computing = describe_computing(dtype, self.device)
        self.fields: dict[str, Any] = {
            **{name: getattr(settings, name) for name in settings.fingerprint_fields},
            "max_tokens": self._max_tokens,
            "dtype": name_dtype(dtype),
            "model": loaded.digests,
        }

    def prepare(self, image: Image) -> Tensor:
        """An RGB picture as the model wants it, not yet normalised: uint8 (3, S, S)."""
        return pinned(to_square(image, self.preparation), self.device)

    @torch.inference_mode()
    def encode(self, images: Sequence[Tensor]) -> Tensor:
        """Image features (B, P + 1, D) of pictures from `prepare`."""
        return self.vision(normalise(images, self.preparation, self.vision.class_embedding))

    def score(self, images: Sequence[Tensor], texts: Sequence[Sequence[str]]) -> list[list[float]]:
        """softmax(ITM logits)[1] in [0, 1]. Texts are prepared as in BLIP's training (`clean_caption`)."""
        return self.score_features(list(self.encode(images)), texts)

    def score_features(self, features: Sequence[Tensor], texts: Sequence[Sequence[str]]) -> list[list[float]]:
        """`score` of image features (P + 1, D) by `encode`, or by a captioner of the same `vision_digest`."""
        tokens = [[self._tokens(text) for text in own] for own in texts]
        return match_probabilities(self._model, torch.stack(list(features)), tokens)

    def use_vision(self, vision: VisionTransformer) -> None:
        """Encode with another model's image encoder, which must have the same `vision_digest`; ours is let go."""
        self.vision = self._model.vision = vision

    def _tokens(self, text: str) -> list[int]:
        encoded = self._tokenizer(clean_caption(text), truncation=True, max_length=self._max_tokens).input_ids
        return [self._first_token_id, *encoded[1:]]


SCORERS = {"clip": ClipScorer, "itm": ItmScorer}
"""Stage → the scorer that fills it."""
