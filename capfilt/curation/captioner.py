"""Synthetic captions: BLIP's captioner from a checkpoint, pictures in, texts out.

In: RGB pictures and the keys of their samples. Out: captions, prompt left out. The same picture, key and
settings give the same captions, whatever else is in the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from capfilt.curation.pictures import normalise, pinned, to_square
from capfilt.errors import UsageError
from capfilt.models.decoding import write_captions
from capfilt.models.med import Captioner, count_image_bytes, count_row_bytes
from capfilt.models.packed import pack_linears
from capfilt.models.static_rows import DecodingSteps
from capfilt.settings import CaptionSettings
from capfilt.weights.blip import load_blip
from capfilt.weights.devices import (
    choose_batch_size,
    choose_device,
    choose_fast_dtype,
    describe_computing,
    name_dtype,
)


class BlipCaptioner:
    """A BLIP captioner (BLIP §3.1) with its tokenizer and image preparation."""

    def __init__(self, settings: CaptionSettings) -> None:
        """Load `settings.captioner`. Raises UsageError where it cannot be had, or the prompt is too long."""
        self.settings = settings
        self.device = choose_device(settings.device)
        dtype = choose_fast_dtype(settings.dtype, self.device)
        loaded = load_blip(settings.captioner, "captioner", device=self.device, dtype=dtype, resizer=settings.resizer)
        assert isinstance(loaded.model, Captioner)
        self._model, self._tokenizer = loaded.model, loaded.tokenizer
        pack_linears(self._model)
        self._steps = DecodingSteps(loaded.model) if self.device.type == "cuda" else None
        self.vision, self.vision_digest = loaded.model.vision, loaded.vision_digest
        self.preparation = loaded.preparation
        self.prompt = loaded.prompt if settings.prompt is None else settings.prompt
        config = loaded.model.decoder.config
        self._prompt_ids = self._encode_prompt(self.prompt)
        self._check_lengths(self._prompt_ids, self.prompt, settings.max_length)
        image_bytes = count_image_bytes(self.vision.config, config, dtype.itemsize)
        num_rows = settings.num_beams if settings.decoding == "beam" else settings.num_captions
        row_bytes = count_row_bytes(config, settings.max_length, dtype.itemsize) * num_rows
        self.batch_size = choose_batch_size(settings.batch_size, self.device, image_bytes + row_bytes)
        self.computing = describe_computing(dtype, self.device)
        self.fields: dict[str, Any] = {
            **{name: getattr(settings, name) for name in settings.fingerprint_fields},
            "prompt": self.prompt,
            "dtype": name_dtype(dtype),
            "model": loaded.digests,
        }

    def prepare(self, image: Image) -> Tensor:
        """An RGB picture as the model wants it, not yet normalised: uint8 (3, S, S)."""
        return pinned(to_square(image, self.preparation), self.device)

    def caption(self, images: Sequence[Image], keys: Sequence[str]) -> list[list[str]]:
        """Captions of RGB pictures, `settings.num_captions` of each; none where the logits are not finite."""
        return self.caption_features(self.encode([self.prepare(image) for image in images]), keys)

    def release(self) -> None:
        """Let go of the buffers that are kept from batch to batch."""
        if self._steps is not None:
            self._steps.clear()

    @torch.inference_mode()
    def encode(self, images: Sequence[Tensor]) -> Tensor:
        """Image features (B, P + 1, D) of pictures from `prepare`."""
        return self.vision(normalise(images, self.preparation, self.vision.class_embedding))

    def caption_features(
        self,
        features_BPD: Tensor,
        keys: Sequence[str],
        *,
        prompt: str | None = None,
        lengths: tuple[int, int] | None = None,
    ) -> list[list[str]]:
        """Captions of pictures that `encode` has seen, by the settings unless another prompt or lengths are given.

        `lengths` are the shortest and longest text in tokens without the prompt, which the settings' count in.
        Raises UsageError where prompt and text are longer than the model takes.
        """
        prompt_ids, settings = self._prompt_ids, self.settings
        if prompt is not None or lengths is not None:
            prompt_ids = prompt_ids if prompt is None else self._encode_prompt(prompt)
            if lengths is not None:
                shortest, longest = (len(prompt_ids) + num for num in lengths)
                settings = replace(settings, min_length=shortest, max_length=longest)
            self._check_lengths(prompt_ids, self.prompt if prompt is None else prompt, settings.max_length)
        written = write_captions(self._model, features_BPD, keys, prompt_ids, settings, self._steps)
        return [[self._decode(tokens) for tokens in texts] for texts in written]

    @property
    def num_prompt_tokens(self) -> int:
        """Of the settings' prompt, [DEC] included."""
        return len(self._prompt_ids)

    def _encode_prompt(self, prompt: str) -> list[int]:
        """As BLIP's code does: the first token becomes [DEC], the closing [SEP] is dropped."""
        return [self._model.decoder.config.dec_token_id, *self._tokenizer(prompt).input_ids[1:-1]]

    def _check_lengths(self, prompt_ids: Sequence[int], prompt: str, max_length: int) -> None:
        most = self._model.decoder.config.max_positions
        if not len(prompt_ids) < max_length <= most:
            raise UsageError(
                f"max_length is {max_length}; expected more than {len(prompt_ids)}, the tokens of the prompt "
                f"{prompt!r}, and at most {most}, the model's. Give --max-length (or --max-new-tokens)."
            )

    def _decode(self, tokens: list[int]) -> str:
        known = [token for token in tokens if token < len(self._tokenizer)]
        return self._tokenizer.decode(known, skip_special_tokens=True).removeprefix("##").strip()
