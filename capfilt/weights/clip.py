"""CLIP models as open_clip knows them: found, loaded, and run by our own towers where these compute the same.

In: settings. Out: what embeds images and texts, the image transform, the tokenizer. UsageError names what cannot be had
or does not fit.

Legend: B images, C channels, H and W their sides, N texts, T tokens, E embedding.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from capfilt.data.commit import file_sha256, fingerprint
from capfilt.data.texts import first_line
from capfilt.errors import UsageError
from capfilt.models.clip import ClipImageTower, ClipTextTower
from capfilt.models.packed import pack_linears
from capfilt.settings import EMBEDDED, RankSettings
from capfilt.weights.find import find_embedded, is_offline
from capfilt.weights.model_files import read_json, read_safetensors, refuse_foreign_weights

_DEFAULT_WEIGHTS = "openai"
_PADDED_TEXTS_AT_ONCE, _TEXTS_AT_ONCE = 64, 256
_PRECISIONS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_WEIGHT_ENDINGS = (".safetensors", ".bin", ".pt", ".pth")
_TOKENIZER_OPTIONS = {"clean", "context_length", "language", "strip_sep_token"}
"""Of open_clip's own; it hands all others to transformers."""
_OPEN_CLIP_CONFIG, _OPEN_CLIP_WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"


class ClipSource:
    """What open_clip is asked for: a model's name (or `local-dir:`), weights, and the files behind them."""

    def __init__(self, name: str, weights: str | None, files: list[Path], *, quick_gelu: bool = False) -> None:
        self.name, self.weights, self.files, self.quick_gelu = name, weights, files, quick_gelu

    def find_weights(self) -> Path | None:
        """The file of the weights; None where it is open_clip's to choose one of several."""
        files = [file for file in self.files if file.suffix in _WEIGHT_ENDINGS]
        preferred = [file for file in files if file.name == _OPEN_CLIP_WEIGHTS]
        return (preferred or files)[0] if preferred or len(files) == 1 else None

    def digests(self) -> dict[str, str]:
        """File → sha256; for a model that open_clip knows by name, also of its configuration."""
        import open_clip

        found = {file.name: file_sha256(file) for file in self.files}
        if self.weights is not None:
            config = open_clip.get_model_config(self.name) or {}
            found[f"{self.name}.json"] = fingerprint(config | {"quick_gelu": self.quick_gelu})
        return found


def find_clip(settings: RankSettings) -> ClipSource:
    """The folder, or the name and weights, that the settings mean."""
    if settings.clip_model == EMBEDDED:
        return _clip_folder(find_embedded("clip"))
    for given in (settings.clip_weights, settings.clip_model):
        if given and (Path(given).expanduser() / _OPEN_CLIP_CONFIG).is_file():
            return _clip_folder(Path(given).expanduser())
    import open_clip

    name, weights = settings.clip_model, settings.clip_weights or _DEFAULT_WEIGHTS
    if name not in open_clip.list_models():
        raise UsageError(
            f"open_clip has no model {name!r}, and it is no folder with {_OPEN_CLIP_CONFIG}. Give --clip-model "
            f"one of open_clip's names (ViT-L-14, ViT-B-32, ...), a folder, or `{EMBEDDED}`."
        )
    path = Path(weights).expanduser()
    if path.is_file():
        if path.suffix not in _WEIGHT_ENDINGS:
            raise UsageError(f"{path} ends in {path.suffix!r}; expected one of {', '.join(_WEIGHT_ENDINGS)}.")
        return ClipSource(name, str(path), [path])
    return _clip_tag(name, weights)


def _clip_folder(folder: Path) -> ClipSource:
    _refuse_code(folder)
    files = sorted(
        file for pattern in ("*.json", "*.txt", "*.safetensors", "*.bin", "*.pth") for file in folder.glob(pattern)
    )
    return ClipSource(f"local-dir:{folder}", None, files)


def _refuse_code(folder: Path) -> None:
    """UsageError where a folder's configuration would have transformers run a program that lies in it.

    open_clip hands what the configuration says of the tokenizer to transformers, trust_remote_code too.
    """
    options: Any = read_json(folder / _OPEN_CLIP_CONFIG)
    for name in ("model_cfg", "text_cfg", "tokenizer_kwargs"):
        options = options.get(name) or {}
        if not isinstance(options, dict):
            raise UsageError(f"{folder / _OPEN_CLIP_CONFIG} has {name} {str(options)[:60]!r}; expected an object.")
    if unknown := sorted(set(options) - _TOKENIZER_OPTIONS):
        raise UsageError(
            f"{folder / _OPEN_CLIP_CONFIG} sets {', '.join(unknown)} for its tokenizer; expected only "
            f"{', '.join(sorted(_TOKENIZER_OPTIONS))}: others may run a program. Remove them."
        )
    for name in ("config.json", "tokenizer_config.json"):
        if (folder / name).is_file() and "auto_map" in read_json(folder / name):
            raise UsageError(f"{folder / name} wants a program of its own, its auto_map; none is run. Give another.")


def _clip_tag(name: str, tag: str) -> ClipSource:
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
    return ClipSource(name, tag, [file], quick_gelu=bool(entry.get("quick_gelu")))


class UnpaddedTexts:
    """Texts by our own tower, none of them padded."""

    def __init__(self, tower: ClipTextTower, end_token_id: int | None) -> None:
        self._tower, self._end = tower, end_token_id

    def __call__(self, tokens_NT: Tensor) -> Tensor:
        """(N, T) token ids, padded → (N, E). A text ends where open_clip says: at its largest id, or the end token."""
        ends_NT = tokens_NT if self._end is None else (tokens_NT == self._end).int()
        texts = [row[: end + 1] for row, end in zip(tokens_NT.tolist(), ends_NT.argmax(dim=1).tolist(), strict=True)]
        return torch.cat([
            self._tower(texts[start : start + _TEXTS_AT_ONCE]) for start in range(0, len(texts), _TEXTS_AT_ONCE)
        ])  # fmt: skip


class PaddedTexts:
    """Texts by any other text tower, as open_clip runs it."""

    def __init__(self, model: Any, device: torch.device) -> None:
        self._model, self._device = model, device

    def __call__(self, tokens_NT: Tensor) -> Tensor:
        """(N, T) token ids, padded → (N, E)."""
        return torch.cat([
            self._model.encode_text(part_NT.to(self._device), normalize=True)
            for part_NT in tokens_NT.split(_PADDED_TEXTS_AT_ONCE)
        ])  # fmt: skip


@dataclass(frozen=True)
class Towers:
    """What embeds images and texts; each tower is ours where it is known to compute what open_clip's does."""

    embed_images: Callable[[Tensor], Tensor]
    """(B, 3, H, W) normalised → (B, E) of unit length."""
    embed_texts: Callable[[Tensor], Tensor]
    """(N, T) token ids, padded → (N, E) of unit length."""


def load_clip(source: ClipSource, device: torch.device, dtype: torch.dtype) -> tuple[Towers, Any, Any]:
    """The towers, the image transform, the tokenizer."""
    import open_clip

    tokenizer = _try(source, lambda: open_clip.get_tokenizer(source.name))
    images, texts, transform = _load_our_towers(source, device, dtype)
    if images is None or texts is None:
        # open_clip knows which of its layers stay in float32.
        options = {"precision": _PRECISIONS[dtype], "device": device, "require_pretrained": True}
        model, _, transform = _try(source, lambda: _create(source, **options))
        model.eval().requires_grad_(False)
        if images is not None:
            del model.visual
        if texts is not None:
            del model.transformer, model.token_embedding
        images = images or functools.partial(model.encode_image, normalize=True)
        texts = texts or PaddedTexts(model, device)
    return Towers(images, texts), transform, tokenizer


def load_image_tower(source: ClipSource) -> tuple[ClipImageTower, dict[str, Any]]:
    """Our image tower in float32, not packed, and how open_clip prepares its images (mean, std, interpolation).

    Raises UsageError where the image encoder is no plain ViT, and as `load_clip` does.
    """
    from open_clip.model import get_model_preprocess_cfg

    from capfilt.models import convert_clip as convert

    empty = _build_empty(source)
    if empty is None or not convert.has_plain_image_tower(empty[0]):
        raise UsageError(
            f"The image encoder of {source.name} is no plain ViT, which is what BLIP-2 takes. Give another: ViT-L-14."
        )
    model = _with_weights(source, empty[0])
    return convert.image_tower_from_open_clip(model), get_model_preprocess_cfg(model)


def _load_our_towers(
    source: ClipSource, device: torch.device, dtype: torch.dtype
) -> tuple[ClipImageTower | None, UnpaddedTexts | None, Any]:
    """Image tower, text tower, image transform; None where ours does not compute what open_clip's does.

    Also where open_clip's model cannot be built on the meta device, which is where it is looked at.
    """
    from capfilt.models import convert_clip as convert

    empty = _build_empty(source)
    if empty is None:
        return None, None, None
    model, transform = empty
    has_images, has_texts = convert.has_plain_image_tower(model), convert.has_plain_text_tower(model)
    if not (has_images or has_texts):
        return None, None, None
    del empty  # with `model` it would hold the plain weights
    model = _with_weights(source, model)
    images = convert.image_tower_from_open_clip(model, dtype).to(device) if has_images else None
    del model.visual
    if images is not None:
        pack_linears(images)  # lets go of the plain weights one by one, which nothing else holds now
    if not has_texts:
        return images, None, transform
    end_token_id = model.text_eos_id if model.text_pool_type == "eos" else None
    text_tower = convert.text_tower_from_open_clip(model, dtype).to(device)
    del model
    pack_linears(text_tower)
    return images, UnpaddedTexts(text_tower, end_token_id), transform


def _with_weights(source: ClipSource, empty: Any) -> Any:
    """The model with its weights as the file holds them; no random ones are made before, where one file is meant."""
    weights = source.find_weights()
    if weights is None:
        return _try(source, lambda: _create(source, precision="fp32", require_pretrained=True))[0]
    _try(source, lambda: _fill(empty, weights))
    return empty


def _build_empty(source: ClipSource) -> tuple[Any, Any] | None:
    """open_clip's model on torch's meta device, and its image transform; None where it cannot be built there."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)  # open_clip's, that the model has no weights
    try:
        with torch.device("meta"):
            model, _, transform = _create(source, precision="fp32", device="meta", load_weights=False)
    except Exception:  # whatever other libraries' models raise; where it is a fault, the usual way names it
        return None
    finally:
        logging.disable(before)
    return model, transform


def _fill(model: Any, weights: Path) -> None:
    """Give an empty model the weights of a file."""
    import open_clip

    if weights.suffix == ".safetensors":
        with contextlib.suppress(RuntimeError):  # other names or sizes: open_clip may know how to bring them to these
            model.load_state_dict(read_safetensors(weights), assign=True)
            return
    model.load_state_dict = functools.partial(model.load_state_dict, assign=True)
    try:
        open_clip.load_checkpoint(model, str(weights))
    except Exception:
        refuse_foreign_weights(weights)
        raise
    finally:
        del model.load_state_dict  # by which the model would hold itself


def _create(source: ClipSource, **options: Any) -> Any:
    import open_clip

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return open_clip.create_model_and_transforms(
            source.name, pretrained=source.weights, force_quick_gelu=source.quick_gelu, pretrained_text=False, **options
        )


def _try(source: ClipSource, load: Callable[[], Any]) -> Any:
    """What `load` gives. Raises UsageError, naming the source, for whatever open_clip and torch raise."""
    try:
        return load()
    except UsageError:
        raise
    except Exception as error:
        raise UsageError(
            f"open_clip cannot load {source.name} {source.weights or ''} ({first_line(error)}). Give --clip-model and "
            "--clip-weights that belong together."
        ) from error
