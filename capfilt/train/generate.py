"""Captions and answers from a trained BLIP-2 (stage 2).

In: a model folder, images, prompts. Out: texts. capfilt/evaluate/writers.py streams any number of images through it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from capfilt.models.blip2 import Stage2
from capfilt.settings import DTYPES
from capfilt.train.batches import normalise, to_square
from capfilt.train.saved import load_stage2
from capfilt.weights.devices import choose_device, choose_dtype
from capfilt.weights.find import find_model_dir
from capfilt.weights.image_encoders import ImageEncoder
from capfilt.weights.llms import load_llm
from capfilt.weights.model_files import ImagePreparation

BATCH_SIZE = 64
"""Images described at a time."""

Picture = Image.Image | np.ndarray
"""An RGB image, or uint8 (H, W, 3)."""


def prepare_images(images: Sequence[Picture], preparation: ImagePreparation) -> Tensor:
    """float32 (B, 3, S, S), squared and normalised as the encoder wants it."""
    size_px = preparation.image_size_px
    pictures = [Image.fromarray(image) if isinstance(image, np.ndarray) else image for image in images]
    pixels = np.stack([to_square(picture.convert("RGB"), size_px) for picture in pictures])
    return normalise(pixels, preparation.mean, preparation.std)


@dataclass(frozen=True)
class Generator:
    """A stage-2 model, ready to describe images and to answer questions."""

    encoder: ImageEncoder
    stage: Stage2
    device: torch.device

    @torch.no_grad()
    def generate(
        self,
        images: Sequence[Picture],
        prompts: Sequence[str] | None = None,
        max_new_tokens: int = 30,
        num_beams: int = 1,
        **options: Any,
    ) -> list[str]:
        """A text for each image that continues (OPT) or answers (T5) its prompt; without one, a caption.

        Further options are those of transformers' GenerationConfig (min_new_tokens, length_penalty, …).
        """
        prompts = [""] * len(images) if prompts is None else prompts
        if len(prompts) != len(images):
            raise ValueError(f"{len(prompts)} prompts for {len(images)} images")
        texts: list[str] = []
        for first in range(0, len(images), BATCH_SIZE):
            part = slice(first, first + BATCH_SIZE)
            # An image that several prompts are about is encoded once.
            different = list({id(image): image for image in images[part]}.values())
            number_of = {id(image): number for number, image in enumerate(different)}
            pixels = prepare_images(different, self.encoder.preparation).to(self.device)
            visual = self.stage.visual_prompts(self.encoder.vision(pixels))
            visual = visual[[number_of[id(image)] for image in images[part]]]
            texts += self.stage.llm.generate(
                visual, prompts[part], max_new_tokens=max_new_tokens, num_beams=num_beams, **options
            )
        return texts

    def answer(self, images: Sequence[Picture], questions: Sequence[str], **options: Any) -> list[str]:
        """Short answers (BLIP-2 §4.1: the model's frame, beam 5, length penalty -1, at most 10 tokens)."""
        frame = self.stage.llm.question_prompt
        chosen = {"max_new_tokens": 10, "num_beams": 5, "length_penalty": -1.0, **options}
        return self.generate(images, [frame.format(question) for question in questions], **chosen)


def load_generator(
    model_dir: str | Path, device: str = "auto", dtype: str = "auto", llm: str = "", image_encoder: str = ""
) -> Generator:
    """A stage-2 folder of ours or any `Blip2ForConditionalGeneration` with OPT or T5, by folder or hub id, or LAVIS's.

    `dtype` is the frozen parts': auto keeps the saved one for the language model, and takes the one that is fast here
    for the image encoder. A .pth of LAVIS's wants its `llm` named, and its `image_encoder` where it was saved without.
    UsageError where the folder is something else.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r}; expected one of {', '.join(DTYPES)}")
    chosen = choose_device(device)
    llm_dtype = None if dtype == "auto" else choose_dtype(dtype, chosen)
    language = None
    if llm:
        folder = find_model_dir(llm, "language model", embedded=None)
        language = load_llm(folder, dtype=choose_dtype(dtype, chosen), device=chosen)
    saved = load_stage2(
        model_dir, chosen, llm_dtype, llm=language, image_encoder=image_encoder, dtype=choose_dtype(dtype, chosen)
    )
    return Generator(saved.encoder, saved.stage.eval(), chosen)
