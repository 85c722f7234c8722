"""A BLIP-2 on a CLIP's image encoder: what transformers' BLIP-2 has no room for, beside it and put back into it.

In: our encoder. Out: image_encoder/ in a saved model's folder, which `CLIPVisionModel.from_pretrained` opens: its
`last_hidden_state` are the features before the trained layer norm (the dropped block is not saved). The folder's other
files are those of any BLIP-2, but for `vision_model.…`, of which only the trained norm is there (`post_layernorm`).

`load_blip2_with_clip` gives transformers' own model of such a folder, with the CLIP in the place of its image encoder:

    model = load_blip2_with_clip("stage2")
    processor = AutoProcessor.from_pretrained("stage2")
    tokens = model.generate(**processor(images=image, return_tensors="pt"), max_new_tokens=30)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    CLIPImageProcessor,
    CLIPVisionModel,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import logging

from capfilt.errors import UsageError
from capfilt.models.convert_image_encoders import clip_config, to_clip
from capfilt.weights.image_encoders import CLIP_TOWER_DIR, LAST, LAYER_KEY, ImageEncoder, read_blip2_config
from capfilt.weights.model_files import named_classes, read_config, save_tensors

_CLASSES = {
    "Blip2ForConditionalGeneration": Blip2ForConditionalGeneration,
    "Blip2ForImageTextRetrieval": Blip2ForImageTextRetrieval,
}


class ClipTower(nn.Module):
    """A CLIP's image encoder that answers as transformers' `Blip2VisionModel` does."""

    def __init__(self, clip: CLIPVisionModel, norm: nn.LayerNorm) -> None:
        super().__init__()
        self.clip, self.post_layernorm = clip, norm

    def forward(
        self,
        pixel_values: Tensor,
        interpolate_pos_encoding: bool = False,
        return_dict: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> BaseModelOutputWithPooling:
        """Images (B, 3, H, W), normalised → features (B, 1 + P, D), normed as they were in training.

        Attentions and the blocks' features are not given: ask `.clip` for them.
        """
        found = self.clip(pixel_values=pixel_values, interpolate_pos_encoding=interpolate_pos_encoding)
        normed = self.post_layernorm(found.last_hidden_state.to(self.post_layernorm.weight.dtype))
        return BaseModelOutputWithPooling(last_hidden_state=normed, pooler_output=normed[:, 0])


def save_clip_tower(folder: Path, encoder: ImageEncoder) -> None:
    """Writes a `CLIPVisionModel` folder: config.json, model.safetensors, preprocessor_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    config = clip_config(encoder.vision.config)
    setattr(config, LAYER_KEY, LAST)
    config.save_pretrained(folder)
    state = to_clip(encoder.vision.state_dict(), encoder.vision.config, encoder.norm)
    save_tensors(folder / "model.safetensors", state)
    preparation = encoder.preparation
    side = {"height": preparation.image_size_px, "width": preparation.image_size_px}
    CLIPImageProcessor(
        size=side, do_center_crop=False, image_mean=list(preparation.mean), image_std=list(preparation.std)
    ).save_pretrained(folder)


def load_blip2_with_clip(
    folder: str | Path, *, dtype: torch.dtype = torch.float32
) -> Blip2ForConditionalGeneration | Blip2ForImageTextRetrieval:
    """transformers' BLIP-2 of a folder of ours, with its CLIP as image encoder, in eval mode.

    `generate`, the plain forward and the processor work as with any BLIP-2; `save_pretrained` does not write the CLIP.
    Raises UsageError where the folder has no image_encoder/, and where weights are missing.
    """
    folder = Path(folder).expanduser()
    inner = folder / CLIP_TOWER_DIR
    if not (inner / "config.json").is_file():
        raise UsageError(f"{folder} has no {CLIP_TOWER_DIR}/. Open it with transformers' own class.")
    config, named = read_blip2_config(folder), named_classes(read_config(folder))
    cls = next((_CLASSES[name] for name in named if name in _CLASSES), None)
    if cls is None:
        raise UsageError(f"{folder} holds {', '.join(named) or 'no model'}; expected one of {', '.join(_CLASSES)}.")
    depth = config.vision_config.num_hidden_layers
    config.vision_config.num_hidden_layers = 0  # it is replaced: nothing is drawn for it
    model, info = _quietly(cls, folder, config, dtype)
    odd = [name for name in info["missing_keys"] if not name.startswith("vision_model.embeddings.")]
    odd += [*info["unexpected_keys"], *info["mismatched_keys"]]
    if odd:
        raise UsageError(f"{folder} lacks or does not know {len(odd)} weights, such as {sorted(map(str, odd))[0]}.")
    clip = CLIPVisionModel.from_pretrained(inner, dtype=dtype, attn_implementation=None)
    model.vision_model = ClipTower(clip, model.vision_model.post_layernorm)
    config.vision_config.num_hidden_layers = depth
    return model.eval()


def _quietly(cls: Any, folder: Path, config: Any, dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
    """The model without its image encoder, and what was missing, instead of transformers' report on it."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        return cls.from_pretrained(
            folder, config=config, dtype=dtype, output_loading_info=True, attn_implementation=None
        )
    finally:
        logging.set_verbosity(before)
