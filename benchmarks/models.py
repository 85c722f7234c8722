"""Models of the released sizes with random weights, on disk: what both sides of a comparison load.

Out: a folder with BLIP captioners and ITM filters (base and large) in transformers' layout, and open_clip's ViT-L-14.
Captions are nonsense; shapes, files, vocabulary and the work they make are the real ones. `ends.json` says what to
add to a captioner's [SEP] bias for captions of MEAN_NEW_TOKENS, as people's are.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from capfilt.models.decoding import write_captions
from capfilt.models.med import Captioner
from capfilt.models.packed import pack_linears
from capfilt.settings import CaptionSettings
from capfilt.weights.blip import load_blip
from tests import full_size

MEAN_NEW_TOKENS = 8.5
"""Mean length of a caption after the prompt in realistic captions, [SEP] included."""
PROMPT_IDS = [30522, 1037, 3861, 1997]
"""[DEC] a picture of."""
MAX_LENGTH = 24
"""20 tokens after the prompt."""

_CALIBRATION_IMAGES = 4


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
        ends.write_text(json.dumps({"bias": _find_end_bias(folder / f"captioner-{size}")}))


def read_end_bias(captioner_dir: Path) -> float:
    """What to add to the bias of [SEP] for captions of realistic length."""
    return float(json.loads((captioner_dir / "ends.json").read_text())["bias"])


@torch.inference_mode()
def _find_end_bias(captioner_dir: Path) -> float:
    """By bisection, on captions of random pictures."""
    loaded = load_blip(str(captioner_dir), "captioner", device=torch.device("cpu"), dtype=torch.float32)
    model = loaded.model
    assert isinstance(model, Captioner)
    bias = model.head.vocabulary.bias
    start, end = bias.clone(), model.decoder.config.sep_token_id
    torch.manual_seed(0)
    side = model.vision.config.image_size_px
    features = model.vision(torch.randn(_CALIBRATION_IMAGES, 3, side, side))
    keys = [str(number) for number in range(_CALIBRATION_IMAGES)]
    settings = CaptionSettings(captioner="", max_length=MAX_LENGTH, min_length=len(PROMPT_IDS) + 2)
    pack_linears(model.decoder)
    low, high = -40.0, 40.0
    for _ in range(12):
        middle = (low + high) / 2
        bias.copy_(start)
        bias[end] += middle
        texts = [text for own in write_captions(model, features, keys, PROMPT_IDS, settings) for text in own]
        mean = sum(min(len(text) + 1, MAX_LENGTH - len(PROMPT_IDS)) for text in texts) / len(texts)
        low, high = (middle, high) if mean > MEAN_NEW_TOKENS else (low, middle)
    return middle
