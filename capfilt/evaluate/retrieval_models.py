"""Models that find images by text and texts by image: ITC embeddings of both, and ITM logits of pairs.

In: the name of a model. Out: an object that fills `RetrievalModel`. A new kind of model is a class with these methods
and a `load`, an entry of RETRIEVAL_MODELS, and what tells its files from others' in `kind_of`.

Legend: B images, R pairs, M texts, P patches, D width, Q embeddings of an image, E their width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL.Image import Image
from torch import Tensor

from capfilt.curation.pictures import normalise, pinned, to_square
from capfilt.curation.scorers import ITM_MAX_TOKENS
from capfilt.data.captions import clean_caption
from capfilt.errors import UsageError
from capfilt.models.blip2 import Texts
from capfilt.models.matching import pair_logits
from capfilt.models.med import Filter
from capfilt.models.packed import pack_linears
from capfilt.models.text_layout import TextLayout
from capfilt.models.vit import VisionTransformer, count_encoder_bytes
from capfilt.train.blip2_files import is_blip2_file
from capfilt.train.saved import SavedStage1, load_stage1
from capfilt.weights.albef import is_original_albef, load_albef
from capfilt.weights.blip import load_blip
from capfilt.weights.devices import (
    choose_batch_size,
    choose_device,
    choose_fast_dtype,
    describe_computing,
)
from capfilt.weights.find import find_model_dir
from capfilt.weights.model_files import ImagePreparation, read_config

STAGE1_MAX_TOKENS = 32
"""Longest text given to a stage-1 model, special tokens included (BLIP-2's released code: 32)."""

ALBEF_MAX_TOKENS = 30
"""Longest text given to an ALBEF, special tokens included (ALBEF's released code: 30)."""


@dataclass(frozen=True, kw_only=True)
class RetrievalOptions:
    """How a retrieval model is run."""

    device: str = "auto"
    """auto, cpu, cuda or mps."""
    dtype: str = "float32"
    """float32, bfloat16, float16 or auto. Reduced precision rounds scores: close candidates change places."""
    resizer: str | None = None
    """torchvision or pillow; None for what the kind of model is trained and curated with: torchvision for BLIP and
    ALBEF, pillow for stage 1."""
    first_token: str = "enc"
    """BLIP's first token in ITM: enc ([ENC], as trained) or cls (as transformers feeds it)."""
    image_batch_size: int | None = None
    """Images encoded at a time. None: 32, with CUDA as many as fit into a part of its free memory."""


class RetrievalModel(Protocol):
    """What `capfilt.evaluate.retrieval` asks of a model. Embeddings and logits are float32, on `device`."""

    device: torch.device
    """Where it computes."""
    computing: str
    """Precision and device, for people."""
    image_batch_size: int
    """Images encoded at a time."""

    def prepare(self, picture: Image) -> Tensor:
        """An RGB picture as the model wants it; called in threads."""
        ...

    def encode_images(self, prepared: Sequence[Tensor]) -> Tensor:
        """Features (B, P, D) of prepared pictures, which embeddings and ITM start from."""
        ...

    def embed_images(self, features_BPD: Tensor) -> Tensor:
        """ITC embeddings (B, Q, E) of unit length; the best of an image's Q counts."""
        ...

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text."""
        ...

    def embed_texts(self, tokens: Sequence[Sequence[int]]) -> Tensor:
        """ITC embeddings (M, E) of unit length."""
        ...

    def itm_logits(self, features_BPD: Tensor, images: Sequence[int], tokens: Sequence[Sequence[int]]) -> Tensor:
        """Match logits (R,) of R pairs: a text and the number of its image, 0 to B - 1, in ascending order."""
        ...


class _TwoEncoders:
    """What BLIP's filter and ALBEF do alike: images and texts are encoded, one embedding each."""

    _max_tokens: int
    """Longest text; the subclass's."""

    def __init__(self, model: Any, tokenizer: Any, preparation: ImagePreparation, options: RetrievalOptions) -> None:
        self._model, self._tokenizer, self._preparation = model, tokenizer, preparation
        embedding = model.vision.class_embedding
        self.device, dtype = embedding.device, embedding.dtype
        self.image_batch_size = _image_batch_size(options, self.device, model.vision, dtype)
        self.computing = describe_computing(dtype, self.device)

    def prepare(self, picture: Image) -> Tensor:
        return pinned(to_square(picture, self._preparation), self.device)

    @torch.inference_mode()
    def encode_images(self, prepared: Sequence[Tensor]) -> Tensor:
        return self._model.vision(normalise(prepared, self._preparation, self._model.vision.class_embedding))

    @torch.inference_mode()
    def embed_images(self, features_BPD: Tensor) -> Tensor:
        return self._model.embed_images(features_BPD)[:, None].float()

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        return _tokenize(self._tokenizer, texts, self._max_tokens)


class BlipRetrieval(_TwoEncoders):
    """A BLIP filter: ITC from [CLS], ITM from [ENC] (BLIP §3.2)."""

    def __init__(self, name: str, options: RetrievalOptions) -> None:
        """Load it. Raises UsageError where it cannot be had."""
        device = choose_device(options.device)
        loaded = load_blip(
            name, "filter", device=device, dtype=choose_fast_dtype(options.dtype, device),
            resizer=options.resizer or ImagePreparation.resizer,
        )  # fmt: skip
        assert isinstance(loaded.model, Filter)
        super().__init__(loaded.model, loaded.tokenizer, loaded.preparation, options)
        pack_linears(loaded.model)
        config = loaded.model.encoder.config
        is_enc = options.first_token == "enc"
        self._first_itm_token = config.enc_token_id if is_enc else self._tokenizer.cls_token_id
        self._max_tokens = min(ITM_MAX_TOKENS, config.max_positions // 8 * 8)

    @torch.inference_mode()
    def embed_texts(self, tokens: Sequence[Sequence[int]]) -> Tensor:
        tokens_BT, mask_BT = _padded(tokens, self._model.encoder.config.pad_token_id, self.device)
        return self._model.embed_texts(tokens_BT, mask_BT).float()

    def itm_logits(self, features_BPD: Tensor, images: Sequence[int], tokens: Sequence[Sequence[int]]) -> Tensor:
        pairs = [(image, [self._first_itm_token, *text[1:]]) for image, text in zip(images, tokens, strict=True)]
        return pair_logits(self._model, features_BPD, pairs)[:, 1]


class Stage1Retrieval:
    """A BLIP-2 stage-1 model: an image's best query counts in ITC; ITM averages the queries' logits (BLIP-2 §3.2)."""

    def __init__(self, name: str | Path, options: RetrievalOptions) -> None:
        """Load it. Raises UsageError where it cannot be had."""
        self.device = choose_device(options.device)
        self._dtype = choose_fast_dtype(options.dtype, self.device)
        saved: SavedStage1 = load_stage1(name, self.device)
        self._encoder, self._stage, self._tokenizer = saved.encoder, saved.stage.eval(), saved.tokenizer
        self._preparation = replace(saved.encoder.preparation, resizer=options.resizer or "pillow")
        self._max_tokens = min(STAGE1_MAX_TOKENS, self._stage.qformer.config.max_positions)
        self.image_batch_size = _image_batch_size(options, self.device, saved.encoder.vision, self._dtype)
        self.computing = describe_computing(self._dtype, self.device)

    def prepare(self, picture: Image) -> Tensor:
        return pinned(to_square(picture, self._preparation), self.device)

    @torch.inference_mode()
    def encode_images(self, prepared: Sequence[Tensor]) -> Tensor:
        with self._precision():
            return self._encoder.vision(normalise(prepared, self._preparation, self._stage.temperature))

    @torch.inference_mode()
    def embed_images(self, features_BPD: Tensor) -> Tensor:
        with self._precision():
            queries, _ = self._stage.qformer.encode_queries(self._stage.image_key_values(features_BPD))
            return self._stage.embed_queries(queries).float()

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        return _tokenize(self._tokenizer, texts, self._max_tokens)

    @torch.inference_mode()
    def embed_texts(self, tokens: Sequence[Sequence[int]]) -> Tensor:
        with self._precision():
            return self._stage.embed_texts(self._texts(tokens)).float()

    @torch.inference_mode()
    def itm_logits(self, features_BPD: Tensor, images: Sequence[int], tokens: Sequence[Sequence[int]]) -> Tensor:
        num_queries = self._stage.qformer.config.num_queries
        image_of_row = torch.tensor(images, device=self.device)
        layout = TextLayout(image_of_row, num_images=len(features_BPD), num_tokens=num_queries)
        with self._precision():
            image = self._stage.image_key_values(features_BPD)
            return self._stage.itm_logits(image, self._texts(tokens), layout=layout)[:, 1].float()

    def _texts(self, tokens: Sequence[Sequence[int]]) -> Texts:
        tokens_BT, mask_BT = _padded(tokens, self._stage.qformer.config.pad_token_id, self.device)
        return Texts(tokens=tokens_BT, mask=mask_BT)

    def _precision(self) -> torch.autocast:
        return torch.autocast(self.device.type, self._dtype, enabled=self._dtype != torch.float32)


class AlbefRetrieval(_TwoEncoders):
    """An ALBEF: ITC from the text encoder's [CLS], ITM from the fusion encoder's (ALBEF §3.2)."""

    def __init__(self, name: str, options: RetrievalOptions) -> None:
        """Load it. Raises UsageError where it cannot be had."""
        device = choose_device(options.device)
        loaded = load_albef(
            name, device=device, dtype=choose_fast_dtype(options.dtype, device),
            resizer=options.resizer or ImagePreparation.resizer,
        )  # fmt: skip
        super().__init__(loaded.model, loaded.tokenizer, loaded.preparation, options)
        self._max_tokens = min(ALBEF_MAX_TOKENS, self._model.config.max_positions)

    @torch.inference_mode()
    def embed_texts(self, tokens: Sequence[Sequence[int]]) -> Tensor:
        tokens_BT, mask_BT = _padded(tokens, self._model.config.pad_token_id, self.device)
        return self._model.embed_texts(self._model.text.encode(tokens_BT, mask_BT)).float()

    @torch.inference_mode()
    def itm_logits(self, features_BPD: Tensor, images: Sequence[int], tokens: Sequence[Sequence[int]]) -> Tensor:
        tokens_RT, mask_RT = _padded(tokens, self._model.config.pad_token_id, self.device)
        image_of_row = torch.tensor(images, device=self.device)
        layout = TextLayout(image_of_row, num_images=len(features_BPD), num_tokens=tokens_RT.shape[1])
        return self._model.itm_logits(features_BPD, tokens_RT, mask_RT, layout=layout)[:, 1].float()


RETRIEVAL_MODELS: dict[str, Callable[[str, RetrievalOptions], RetrievalModel]] = {
    "blip": BlipRetrieval,
    "blip-2": Stage1Retrieval,
    "albef": AlbefRetrieval,
}
"""`model_type` in config.json → the class that runs such a model."""


def load_retrieval_model(name: str, options: RetrievalOptions) -> RetrievalModel:
    """The model of a folder, a hub id or an original .pth; UsageError where it is of no kind that is known here."""
    kind = kind_of(name)
    if kind != "blip" and options.first_token != RetrievalOptions.first_token:
        raise UsageError(f"{name} is no BLIP filter, whose first token --first-token chooses. Leave it out.")
    return RETRIEVAL_MODELS[kind](name, options)


def kind_of(name: str) -> str:
    """The entry of RETRIEVAL_MODELS that a model's files ask for. Raises UsageError for others."""
    path = Path(name).expanduser()
    if path.is_file():  # an original .pth, which names no kind; its reader says what it expects
        return "blip-2" if is_blip2_file(path) else "albef" if is_original_albef(path) else "blip"
    folder = find_model_dir(
        name, "retrieval model", embedded="filter", give="a folder, a hub id (owner/name), an original .pth"
    )
    kind = str(read_config(folder).get("model_type"))
    if kind not in RETRIEVAL_MODELS:
        known = ", ".join(repr(known) for known in RETRIEVAL_MODELS)
        raise UsageError(
            f"{folder} is a {kind!r} model; expected one of {known}. Give a BLIP filter (`capfilt train filter`), a "
            "stage-1 model (`capfilt train stage1`) or an ALBEF (`capfilt train albef`)."
        )
    return kind


def _image_batch_size(
    options: RetrievalOptions, device: torch.device, vision: VisionTransformer, dtype: torch.dtype
) -> int:
    return choose_batch_size(options.image_batch_size, device, count_encoder_bytes(vision.config, dtype.itemsize))


def _tokenize(tokenizer: Any, texts: Sequence[str], max_tokens: int) -> list[list[int]]:
    """[CLS] … [SEP] of each text, prepared as in training (`clean_caption`: 50 words; BLIP's and ALBEF's released codes
    cut at 30 here, which the longest text in tokens does about as well).
    """
    cleaned = [clean_caption(text) for text in texts]
    return tokenizer(cleaned, truncation=True, max_length=max_tokens).input_ids if cleaned else []


def _padded(tokens: Sequence[Sequence[int]], pad_token_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids (B, T), padded to the longest, and their mask."""
    longest = max(len(text) for text in tokens)
    tokens_BT = torch.tensor([[*text, *[pad_token_id] * (longest - len(text))] for text in tokens])
    mask_BT = torch.arange(longest) < torch.tensor([len(text) for text in tokens])[:, None]
    return tokens_BT.to(device), mask_BT.to(device)
