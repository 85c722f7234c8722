"""Scores of image-text pairs: CLIP similarity and ITM probability. A scorer never drops.

In: pictures and their texts. Out: a number for each pair, higher is better. A new scorer is a class with
`prepare`, `score` and the attributes of `Scorer`, and an entry in SCORERS.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL.Image import Image
from torch import Tensor

from capfilt.curate.captioner import normalise, to_square
from capfilt.data.captions import clean_caption
from capfilt.data.commit import file_sha256, fingerprint
from capfilt.data.texts import first_line
from capfilt.errors import UsageError
from capfilt.models.clip import Clip
from capfilt.models.matching import match_probabilities
from capfilt.models.med import Filter
from capfilt.models.packed import pack_linears
from capfilt.models.vit import VisionTransformer, count_encoder_bytes
from capfilt.settings import EMBEDDED, FilterSettings, RankSettings
from capfilt.weights.blip import load_blip
from capfilt.weights.devices import choose_batch_size, choose_device, choose_inference_dtype, describe_computing
from capfilt.weights.find import find_embedded, is_offline

ITM_MAX_TOKENS = 35
"""Longest text given to the filter, special tokens included (BLIP's released code: 35)."""
DEFAULT_CLIP_WEIGHTS = "openai"

_CLIP_BYTES_PER_IMAGE = 64 * 2**20
"""Of ViT-L/14 with eleven texts in float32, roughly: features of 300 tokens, 24 blocks' buffers not kept."""
_PADDED_TEXTS_AT_ONCE, _TEXTS_AT_ONCE = 64, 256
_PRECISIONS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_WEIGHT_ENDINGS = (".safetensors", ".bin", ".pt", ".pth")
_OPEN_CLIP_CONFIG = "open_clip_config.json"


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

    def prepare(self, image: Image) -> Tensor:
        """An RGB picture as the model wants it."""
        ...

    def score(self, images: Sequence[Tensor], texts: Sequence[Sequence[str]]) -> list[list[float]]:
        """Scores by image and text, for pictures from `prepare` and the texts of each."""
        ...


class ClipScorer:
    """Cosine similarity of CLIP's image and text embeddings (BLIP-2 §3.4: ViT-L/14); models are open_clip's."""

    def __init__(self, settings: RankSettings) -> None:
        """Load the model. Raises UsageError for an unknown name, and for weights that cannot be had."""
        self.device = choose_device(settings.device)
        self._dtype = choose_inference_dtype(settings.dtype, self.device)
        source = _find_clip(settings)
        self._towers, self._transform, self._tokenize = _load_towers(source, self.device, self._dtype)
        self.batch_size = choose_batch_size(settings.batch_size, self.device, _CLIP_BYTES_PER_IMAGE)
        self.computing = describe_computing(self._dtype, self.device)
        self.fields: dict[str, Any] = {
            "dtype": str(self._dtype).removeprefix("torch."),
            "model": source.digests(),
        }

    def prepare(self, image: Image) -> Tensor:
        """An RGB picture through open_clip's own transform: float32 (3, S, S)."""
        return self._transform(image.convert("RGB"))

    @torch.inference_mode()
    def score(self, images: Sequence[Tensor], texts: Sequence[Sequence[str]]) -> list[list[float]]:
        """Cosine similarities in [-1, 1]; each distinct text of the batch is encoded once."""
        distinct = list(dict.fromkeys(text for own in texts for text in own))
        if not distinct:
            return [[] for _ in texts]
        row = {text: number for number, text in enumerate(distinct)}
        batch = torch.stack(list(images)).to(device=self.device, dtype=self._dtype)
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
        dtype = choose_inference_dtype(settings.dtype, self.device)
        loaded = load_blip(settings.filter_model, "filter", device=self.device, dtype=dtype)
        assert isinstance(loaded.model, Filter)
        self._model, self._tokenizer = loaded.model, loaded.tokenizer
        pack_linears(self._model)
        self.vision, self.vision_digest = loaded.model.vision, loaded.vision_digest
        self._preparation = loaded.preparation
        config = loaded.model.encoder.config
        is_enc = settings.first_token == "enc"
        self._first_token_id = config.enc_token_id if is_enc else self._tokenizer.cls_token_id
        self._max_tokens = min(ITM_MAX_TOKENS, config.max_positions // 8 * 8)
        image_bytes = count_encoder_bytes(
            self.vision.config, dtype.itemsize
        )  # more than its texts and one layer's K, V
        self.batch_size = choose_batch_size(settings.batch_size, self.device, image_bytes)
        self.computing = describe_computing(dtype, self.device)
        self.fields: dict[str, Any] = {
            **{name: getattr(settings, name) for name in settings.fingerprint_fields},
            "max_tokens": self._max_tokens,
            "dtype": str(dtype).removeprefix("torch."),
            "model": loaded.digests,
        }

    def prepare(self, image: Image) -> Tensor:
        """An RGB picture as the model wants it, not yet normalised: uint8 (3, S, S)."""
        return to_square(image, self._preparation.image_size_px)

    @torch.inference_mode()
    def encode(self, images: Sequence[Tensor]) -> Tensor:
        """Image features (B, P + 1, D) of pictures from `prepare`."""
        return self.vision(normalise(images, self._preparation, self.vision.class_embedding))

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


class _ClipSource:
    """What open_clip is asked for: a model's name (or `local-dir:`), weights, and the files behind them."""

    def __init__(self, name: str, weights: str | None, files: list[Path], *, quick_gelu: bool = False) -> None:
        self.name, self.weights, self.files, self.quick_gelu = name, weights, files, quick_gelu

    def digests(self) -> dict[str, str]:
        """File → sha256; for a model that open_clip knows by name, also of its configuration."""
        import open_clip

        found = {file.name: file_sha256(file) for file in self.files}
        if self.weights is not None:
            config = open_clip.get_model_config(self.name) or {}
            found[f"{self.name}.json"] = fingerprint(config | {"quick_gelu": self.quick_gelu})
        return found


def _find_clip(settings: RankSettings) -> _ClipSource:
    """The folder, or the name and weights, that the settings mean."""
    if settings.clip_model == EMBEDDED:
        return _clip_folder(find_embedded("clip"))
    for given in (settings.clip_weights, settings.clip_model):
        if given and (Path(given).expanduser() / _OPEN_CLIP_CONFIG).is_file():
            return _clip_folder(Path(given).expanduser())
    import open_clip

    name, weights = settings.clip_model, settings.clip_weights or DEFAULT_CLIP_WEIGHTS
    if name not in open_clip.list_models():
        raise UsageError(
            f"open_clip has no model {name!r}, and it is no folder with {_OPEN_CLIP_CONFIG}. Give --clip-model "
            f"one of open_clip's names (ViT-L-14, ViT-B-32, ...), a folder, or `{EMBEDDED}`."
        )
    path = Path(weights).expanduser()
    if path.is_file():
        if path.suffix not in _WEIGHT_ENDINGS:
            raise UsageError(f"{path} ends in {path.suffix!r}; expected one of {', '.join(_WEIGHT_ENDINGS)}.")
        return _ClipSource(name, str(path), [path])
    return _clip_tag(name, weights)


def _clip_folder(folder: Path) -> _ClipSource:
    files = sorted(
        file for pattern in ("*.json", "*.txt", "*.safetensors", "*.bin", "*.pth") for file in folder.glob(pattern)
    )
    return _ClipSource(f"local-dir:{folder}", None, files)


def _clip_tag(name: str, tag: str) -> _ClipSource:
    """Weights that open_clip knows by a tag, from the cache or the network."""
    import open_clip

    known = open_clip.list_pretrained_tags_by_model(name)
    if tag not in known:
        raise UsageError(
            f"open_clip has no weights {tag!r} for {name}, and there is no such file. Give --clip-weights a "
            f"file, or one of {', '.join(known) or '(none)'}."
        )
    entry = open_clip.get_pretrained_cfg(name, tag)
    try:
        if is_offline() and not entry.get("hf_hub"):
            raise FileNotFoundError(f"its address {entry.get('url')} is not on the hub, and HF_HUB_OFFLINE is set")
        file = Path(open_clip.download_pretrained(entry))
    except (OSError, RuntimeError, ValueError) as error:
        hub = str(entry.get("hf_hub", "")).rstrip("/")
        raise UsageError(
            f"The weights {tag!r} of {name} could not be had ({error}). Where there is a network, run "
            f"`hf download {hub}`; without one, give --clip-weights the file or folder."
        ) from error
    # open_clip only warns when a tag was trained with QuickGELU and the model's name says otherwise, and then
    # scores wrongly; OpenAI's weights under the plain names are such.
    return _ClipSource(name, tag, [file], quick_gelu=bool(entry.get("quick_gelu")))


def _load_clip(source: _ClipSource, device: torch.device, dtype: torch.dtype) -> tuple[Any, Any, Any]:
    """The model in eval mode, its image transform and its tokenizer."""
    import open_clip

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model, _, transform = open_clip.create_model_and_transforms(
                source.name, pretrained=source.weights, precision=_PRECISIONS[dtype], device=device,
                force_quick_gelu=source.quick_gelu, require_pretrained=True, pretrained_text=False,
            )  # fmt: skip
            tokenizer = open_clip.get_tokenizer(source.name)
    except Exception as error:  # open_clip and torch raise many kinds for files that do not fit
        raise UsageError(
            f"open_clip cannot load {source.name} {source.weights or ''} ({first_line(error)}). Give --clip-model and "
            "--clip-weights that belong together."
        ) from error
    return model.eval().requires_grad_(False), transform, tokenizer


class _OurTowers:
    """OpenAI's CLIP by our own towers: texts are not padded."""

    def __init__(self, clip: Clip, end_token_id: int | None) -> None:
        self._clip, self._end = clip, end_token_id
        self.embed_images: Callable[[Tensor], Tensor] = clip.embed_images

    def embed_texts(self, tokens_NT: Tensor) -> Tensor:
        """(N, T) token ids, padded → (N, E). A text ends where open_clip says: at its largest id, or the end token."""
        ends_NT = tokens_NT if self._end is None else (tokens_NT == self._end).int()
        texts = [row[: end + 1] for row, end in zip(tokens_NT.tolist(), ends_NT.argmax(dim=1).tolist(), strict=True)]
        parts = [
            self._clip.embed_texts(texts[start : start + _TEXTS_AT_ONCE])
            for start in range(0, len(texts), _TEXTS_AT_ONCE)
        ]
        return torch.cat(parts)


class _OpenClipTowers:
    """Any other model of open_clip, as it is."""

    def __init__(self, model: Any, device: torch.device) -> None:
        self._model, self._device = model, device

    def embed_images(self, images_BCHW: Tensor) -> Tensor:
        return self._model.encode_image(images_BCHW, normalize=True)

    def embed_texts(self, tokens_NT: Tensor) -> Tensor:
        parts = [
            self._model.encode_text(tokens_NT[start : start + _PADDED_TEXTS_AT_ONCE].to(self._device), normalize=True)
            for start in range(0, len(tokens_NT), _PADDED_TEXTS_AT_ONCE)
        ]
        return torch.cat(parts)


def _load_towers(
    source: _ClipSource, device: torch.device, dtype: torch.dtype
) -> tuple[_OurTowers | _OpenClipTowers, Any, Any]:
    """The towers, ours where they compute what open_clip's do; the image transform; the tokenizer."""
    from capfilt.models.convert_clip import clip_from_open_clip

    model, transform, tokenizer = _load_clip(source, torch.device("cpu"), torch.float32)
    clip = clip_from_open_clip(model)
    if clip is None:  # open_clip knows which of its layers stay in float32
        if dtype != torch.float32:
            model, _, _ = _load_clip(source, device, dtype)
        return _OpenClipTowers(model.to(device), device), transform, tokenizer
    end_token_id = model.text_eos_id if model.text_pool_type == "eos" else None
    del model  # it would hold the plain weights
    clip = clip.to(device=device, dtype=dtype)
    pack_linears(clip)
    return _OurTowers(clip, end_token_id), transform, tokenizer
