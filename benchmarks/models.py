"""Models of the released sizes with random weights, on disk: what both sides of a comparison load.

Out: a folder with BLIP captioners and ITM filters (base and large) in transformers' layout, and open_clip's ViT-L-14.
Captions are nonsense; shapes, files, vocabulary and the work they make are the real ones. `ends.json` says what to
add to a captioner's [SEP] bias for captions about as long as people's; `features-SIZE.safetensors` holds image
features to decode from.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from capfilt.curation.pictures import normalise, to_square
from capfilt.models.decoding import write_captions
from capfilt.models.med import Captioner
from capfilt.models.packed import pack_linears
from capfilt.settings import CaptionSettings
from capfilt.weights.blip import load_blip
from tests import full_size

PROMPT_IDS = [30522, 1037, 3861, 1997]
"""[DEC] a picture of."""
MAX_LENGTH = 24
"""20 tokens after the prompt."""
MEAN_NEW_TOKENS = 8.5
"""Mean length of a caption after the prompt where captions end by themselves, [SEP] included; from
MIN_NEW_TOKENS on each token may be the last, so that of eighty captions the longest has about 16."""
MIN_NEW_TOKENS = 5
"""Shortest such caption, [SEP] not included."""
NUM_PICTURES = 8


def make_models(folder: Path, size: str) -> None:
    """Write what is not there yet: `captioner-SIZE`, `filter-SIZE`, `clip.safetensors`; SIZE is base or large."""
    for name, save in (("captioner", full_size.save_captioner), ("filter", full_size.save_filter)):
        target = folder / f"{name}-{size}"
        if not target.exists():
            partial = folder / f"{name}-{size}.partial"
            save(partial, size)
            partial.rename(target)
    if not (folder / "clip.safetensors").exists():
        full_size.save_clip(folder / "clip.partial")
        (folder / "clip.partial").rename(folder / "clip.safetensors")
    ends = folder / f"captioner-{size}" / "ends.json"
    if not ends.exists():
        features, bias = _measure_captioner(folder / f"captioner-{size}")
        save_file({"features": features}, folder / f"features-{size}.safetensors")
        ends.write_text(json.dumps({"bias": bias}))


def draw_pictures(num: int = NUM_PICTURES) -> list[Image.Image]:
    """Random pictures of the size of a small photograph, always the same."""
    generator = np.random.default_rng(0)
    coarse = [generator.integers(0, 256, (6, 8, 3), dtype=np.uint8) for _ in range(num)]
    return [Image.fromarray(pixels).resize((500, 375), Image.Resampling.BICUBIC) for pixels in coarse]


def write_pictures(folder: Path, num: int) -> Path:
    """The random pictures as .png, for a side that reads files; gives back the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, picture in enumerate(draw_pictures(num)):
        picture.save(folder / f"{number:02}.png")
    return folder


def read_end_bias(captioner_dir: Path) -> float:
    """What to add to the bias of [SEP] for captions of realistic length."""
    return float(json.loads((captioner_dir / "ends.json").read_text())["bias"])


@torch.inference_mode()
def _measure_captioner(captioner_dir: Path) -> tuple[Tensor, float]:
    """Features of the random pictures, and the bias of [SEP] that gives realistic lengths, by bisection."""
    loaded = load_blip(str(captioner_dir), "captioner", device=torch.device("cpu"), dtype=torch.float32)
    model = loaded.model
    assert isinstance(model, Captioner)
    pack_linears(model.vision)
    side = model.vision.config.image_size_px
    prepared = [to_square(picture, side) for picture in draw_pictures()]
    features = model.vision(normalise(prepared, loaded.preparation, model.vision.class_embedding))
    bias = model.head.vocabulary.bias
    start, end = bias.clone(), model.decoder.config.sep_token_id
    pack_linears(model.decoder)
    keys = [str(number) for number in range(len(features))]
    settings = CaptionSettings(captioner="", max_length=MAX_LENGTH, min_length=len(PROMPT_IDS) + MIN_NEW_TOKENS)
    low, high, middle = -40.0, 40.0, 0.0
    for _ in range(12):
        middle = (low + high) / 2
        bias.copy_(start)
        bias[end] += middle
        texts = [text for own in write_captions(model, features, keys, PROMPT_IDS, settings) for text in own]
        mean = sum(min(len(text) + 1, MAX_LENGTH - len(PROMPT_IDS)) for text in texts) / len(texts)
        low, high = (middle, high) if mean > MEAN_NEW_TOKENS else (low, middle)
    return features, middle
