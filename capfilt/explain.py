"""Where a model sees the words of a text in a picture: Grad-CAM with any of the models that `capfilt` reads.

In: a model's name, an RGB picture, texts. Out: for each text a probability, a map over the picture's patches for the
text as a whole and for each word, and each word's share of them.

    filter      ITM's match logit of a BLIP filter
    captioner   each word's log-probability with a BLIP captioner
    stage1      ITM's match logit of a BLIP-2 stage-1 model (Q-Former)

What exactly a map is stands in `models.gradcam`. All is computed in float32.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL.Image import Image, fromarray
from torch import Tensor

from capfilt.curation.pictures import normalise, to_square
from capfilt.curation.scorers import ITM_MAX_TOKENS
from capfilt.data.captions import clean_caption
from capfilt.errors import UsageError
from capfilt.models.gradcam import (
    WordMaps,
    Words,
    captioner_layers,
    default_layer,
    explain_caption,
    explain_match,
    explain_stage1_match,
    filter_layers,
    stage1_layers,
)
from capfilt.models.med import Captioner, Filter
from capfilt.models.vit import VisionTransformer, change_image_size
from capfilt.report.gradcam import overlay
from capfilt.settings import EMBEDDED, Stage1Settings
from capfilt.train.blip2_files import is_blip2_file
from capfilt.train.generate import prepare_images
from capfilt.train.saved import load_stage1
from capfilt.weights.blip import LoadedBlip, load_blip
from capfilt.weights.devices import choose_device
from capfilt.weights.find import find_model_dir
from capfilt.weights.model_files import ImagePreparation, read_config, read_tensors

STAGE1_MAX_TOKENS = Stage1Settings.max_text_tokens
"""Longest text of a stage-1 model, as in its training."""

ModelKind = Literal["filter", "captioner", "stage1"]

CAPTIONER_MAX_TOKENS = 40
"""Longest text given to the captioner, prompt and special tokens included (BLIP's fine-tuning: 40)."""

_KIND_OF_ARCHITECTURE: dict[str, ModelKind] = {
    "BlipForImageTextRetrieval": "filter",
    "BlipForConditionalGeneration": "captioner",
    "Blip2ForImageTextRetrieval": "stage1",
}
_GIVE = "a BLIP filter's or captioner's or a stage-1 model's folder or hub id (owner/name), an original .pth"
_ANY_LENGTH = 1 << 60


@dataclass(frozen=True)
class Explanation:
    """What a model sees of one text in one picture; I x J rows and columns of patches."""

    text: str
    """As the model read it: in lower case, without markup and punctuation."""
    probability: float
    """Of a match; of a captioner the geometric mean of its words' pieces' probabilities."""
    average: NDArray[np.float32]
    """(I, J), the text as a whole."""
    words: tuple[str, ...]
    maps: NDArray[np.float32]
    """(W, I, J), in the words' order."""
    shares: tuple[float, ...]
    """Each word's part of the sum of all words' maps; 0 for all where every map is zero."""
    word_probabilities: tuple[float, ...] | None
    """Of a captioner: of each word after those before it."""
    cut: str
    """The end of the text, for which the model has no room; empty where all was read."""


@dataclass(frozen=True)
class ExplainableModel:
    """A model ready to be asked; made by `load_explainable`."""

    kind: ModelKind
    layers: tuple[int, ...]
    """That can be explained, counted from 0."""
    depth: int
    layer: int
    """The one explained unless another is named."""
    image_size_px: int
    tokenizer: Any
    first_token_id: int
    prompt: str
    """Goes before every text."""
    max_tokens: int
    encode: Callable[[Image], Tensor]
    """RGB picture → image features."""
    word_maps: Callable[[Tensor, Sequence[int], Words, int], WordMaps]
    """(features, tokens, words, layer) → maps."""

    def explain(self, image: Image, texts: Sequence[str], layer: int | None = None) -> list[Explanation]:
        """Explanations of texts about one RGB picture. Raises UsageError for a text without words, and for a layer
        that has no maps."""
        layer = self.layer if layer is None else layer
        self.check_layer(layer)
        read = [read_text(self, text) for text in texts]
        with torch.no_grad():
            features_1PD = self.encode(image)
        return [self._explain(text, features_1PD, layer) for text in read]

    def check_layer(self, layer: int) -> None:
        """Raises UsageError for a layer that cannot be explained."""
        if layer in self.layers:
            return
        known = f"{self.layers[0]} to {self.layers[-1]}" if self.kind != "stage1" else _listed(self.layers)
        why = f"expected {known}"
        if 0 <= layer < self.depth:
            why = {
                "filter": f"in the last one no word's look at the picture reaches the match logit any more; {why}",
                "stage1": f"that one does not attend to the picture; {why}",
                "captioner": why,
            }[self.kind]
        raise UsageError(f"--layer is {layer}, counted from 0 to {self.depth - 1}: {why}.")

    def _explain(self, text: ReadText, features_1PD: Tensor, layer: int) -> Explanation:
        found = self.word_maps(features_1PD, text.tokens, text.places, layer)
        sums = found.words.sum(dim=(1, 2)).double()
        shares = (sums / sums.sum()).tolist() if sums.sum() > 0 else [0.0] * len(sums)
        known = found.word_probabilities
        return Explanation(
            text=text.shown,
            probability=found.probability,
            average=found.average.numpy(),
            words=text.words,
            maps=found.words.numpy(),
            shares=tuple(shares),
            word_probabilities=None if known is None else tuple(known.tolist()),
            cut=text.cut,
        )


@dataclass(frozen=True)
class ReadText:
    """A text as a model reads it."""

    shown: str
    tokens: list[int]
    words: tuple[str, ...]
    places: list[list[int]]
    """By word, the places of its pieces among the tokens."""
    cut: str


def read_text(model: ExplainableModel, text: str) -> ReadText:
    """Tokens and words of a text, which is prepared as for training (`clean_caption`) and put after the prompt.

    Words are what stands between spaces. Raises UsageError where there is none.
    """
    cleaned = clean_caption(text, max_words=_ANY_LENGTH)
    whole = model.prompt + cleaned.removeprefix(model.prompt)
    encoded = model.tokenizer(whole, return_offsets_mapping=True, return_special_tokens_mask=True, verbose=False)
    ids, end = encoded.input_ids, min(len(encoded.input_ids), model.max_tokens) - 1
    spans = [match.span() for match in re.finditer(r"\S+", whole) if match.end() > len(model.prompt)]
    starts = [start for start, _ in spans]
    places: dict[int, list[int]] = {}
    first_cut = len(whole)
    for place, ((start, stop), is_special) in enumerate(
        zip(encoded.offset_mapping, encoded.special_tokens_mask, strict=True)
    ):
        if is_special or start == stop or start < len(model.prompt):
            continue
        if place < end:
            places.setdefault(bisect_right(starts, start) - 1, []).append(place)
        else:
            first_cut = min(first_cut, start)
    if not places:
        raise UsageError(f"The text {text!r} holds no words that the model could read. Give words to look for.")
    return ReadText(
        shown=whole[len(model.prompt) : first_cut].strip(),
        tokens=[model.first_token_id, *ids[1:end], ids[-1]],
        words=tuple(whole[max(spans[number][0], len(model.prompt)) : spans[number][1]] for number in places),
        places=list(places.values()),
        cut=whole[first_cut:],
    )


def load_explainable(name: str, *, device: str = "auto", image_size_px: int | None = None) -> ExplainableModel:
    """Read a model to explain it.

    Args:
        name: a BLIP filter's or captioner's folder, hub id or original .pth, `embedded` (the filter),
            `embedded-captioner`, or the folder of a stage-1 model.
        image_size_px: of the square that pictures are resized to; the model's own unless given, else its positions
            are interpolated.

    Raises UsageError for what is no such model, and for a size that is no multiple of the model's patch.
    """
    where = choose_device(device)
    path = Path(name).expanduser()
    if path.is_file() and path.suffix in (".pth", ".pt"):
        return _LOADERS[_kind_of_original(path)](name, where, image_size_px)
    folder = find_model_dir(name, "model to explain", embedded="filter", give=_GIVE)
    return _LOADERS[_kind_of_folder(folder)](str(folder), where, image_size_px)


def overlay_drawer(model: ExplainableModel) -> Callable[[Image, str], tuple[str, Image]]:
    """(picture, text) → what is said of it, and the average map over the picture; the picture itself for no words."""

    def draw(picture: Image, text: str) -> tuple[str, Image]:
        try:
            found = model.explain(picture, [text])[0]
        except UsageError:
            return "no words", picture
        name = "probability per token" if model.kind == "captioner" else "match probability"
        return f"{name} {found.probability:.3f}: {found.text}", fromarray(overlay(picture, found.average))

    return draw


def _kind_of_folder(folder: Path) -> ModelKind:
    found = read_config(folder).get("architectures") or ["nothing by name"]
    if found[0] not in _KIND_OF_ARCHITECTURE:
        raise UsageError(
            f"{folder} holds {found[0]}; expected one of {', '.join(_KIND_OF_ARCHITECTURE)}. Give {_GIVE}, or "
            f"`{EMBEDDED}`."
        )
    return _KIND_OF_ARCHITECTURE[found[0]]


def _kind_of_original(path: Path) -> ModelKind:
    """BLIP's captioner has no ITM head; its pre-trained models have one and a decoder."""
    if is_blip2_file(path):
        return "stage1"
    state = read_tensors(path)
    is_captioner = "itm_head.weight" not in state and any(str(key).startswith("text_decoder.") for key in state)
    return "captioner" if is_captioner else "filter"


def _load_filter(name: str, device: torch.device, image_size_px: int | None) -> ExplainableModel:
    loaded = load_blip(name, "filter", device=device, dtype=torch.float32)
    model = loaded.model
    assert isinstance(model, Filter)
    config, layers = model.encoder.config, filter_layers(model)
    return ExplainableModel(
        kind="filter",
        layers=tuple(layers),
        depth=config.depth,
        layer=default_layer(layers, config.depth),
        image_size_px=image_size_px or loaded.preparation.image_size_px,
        tokenizer=loaded.tokenizer,
        first_token_id=config.enc_token_id,
        prompt="",
        max_tokens=min(ITM_MAX_TOKENS, config.max_positions),
        encode=_encoder_of(loaded, image_size_px),
        word_maps=partial(explain_match, model),
    )


def _load_captioner(name: str, device: torch.device, image_size_px: int | None) -> ExplainableModel:
    loaded = load_blip(name, "captioner", device=device, dtype=torch.float32)
    model = loaded.model
    assert isinstance(model, Captioner)
    config, layers = model.decoder.config, captioner_layers(model)
    return ExplainableModel(
        kind="captioner",
        layers=tuple(layers),
        depth=config.depth,
        layer=layers[-1],  # nobody released a choice; of the embedded captioner's the last is the best by far
        image_size_px=image_size_px or loaded.preparation.image_size_px,
        tokenizer=loaded.tokenizer,
        first_token_id=config.dec_token_id,
        prompt=loaded.prompt,
        max_tokens=min(CAPTIONER_MAX_TOKENS, config.max_positions),
        encode=_encoder_of(loaded, image_size_px),
        word_maps=partial(explain_caption, model),
    )


def _load_stage1(name: str, device: torch.device, image_size_px: int | None) -> ExplainableModel:
    saved = load_stage1(name, device)
    stage, config, layers = saved.stage.eval(), saved.stage.qformer.config, stage1_layers(saved.stage)
    preparation = _resized(saved.encoder.vision, saved.encoder.preparation, image_size_px)

    def encode(image: Image) -> Tensor:
        return saved.encoder.vision(prepare_images([image], preparation).to(device))

    return ExplainableModel(
        kind="stage1",
        layers=tuple(layers),
        depth=config.depth,
        layer=default_layer(layers, config.depth),
        image_size_px=preparation.image_size_px,
        tokenizer=saved.tokenizer,
        first_token_id=saved.tokenizer.cls_token_id,
        prompt="",
        max_tokens=min(STAGE1_MAX_TOKENS, config.max_positions),
        encode=encode,
        word_maps=partial(explain_stage1_match, stage),
    )


_LOADERS: dict[ModelKind, Callable[[str, torch.device, int | None], ExplainableModel]] = {
    "filter": _load_filter,
    "captioner": _load_captioner,
    "stage1": _load_stage1,
}


def _encoder_of(loaded: LoadedBlip, image_size_px: int | None) -> Callable[[Image], Tensor]:
    vision = loaded.model.vision
    preparation = _resized(vision, loaded.preparation, image_size_px)

    def encode(image: Image) -> Tensor:
        return vision(normalise([to_square(image, preparation)], preparation, vision.class_embedding))

    return encode


def _resized(vision: VisionTransformer, preparation: ImagePreparation, image_size_px: int | None) -> ImagePreparation:
    """The preparation for pictures of another size, which the encoder is changed to take."""
    if image_size_px is None:
        return preparation
    patch = vision.config.patch_size_px
    if image_size_px < patch or image_size_px % patch:
        below = max(image_size_px // patch, 1) * patch
        raise UsageError(
            f"--image-size is {image_size_px}; expected a multiple of {patch}, the side of the model's patches in "
            f"pixels, such as {below} or {below + patch}."
        )
    change_image_size(vision, image_size_px)
    return replace(preparation, image_size_px=image_size_px)


def _listed(numbers: Sequence[int]) -> str:
    return f"one of {', '.join(map(str, numbers))}" if len(numbers) > 1 else str(numbers[0])
