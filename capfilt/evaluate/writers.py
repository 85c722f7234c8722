"""Models that write texts of images, behind one form: a stage-2 BLIP-2, or a BLIP captioner, whichever a folder holds.

In: a model's name, a task and settings. Out: a writer: pictures, keys and prompts in, texts out.

What is not set is as the papers have it:

| | stage 2 | captioner |
|---|---|---|
| describe | one beam, at most 30 tokens, no prompt | one beam, 5 to 20 tokens with the model's prompt (BLIP's demo) |
| caption | "a photo of", 5 beams, 8 to 30 tokens (BLIP-2 §4.2) | 3 beams, 5 to 20 tokens with its prompt (BLIP §5.2) |
| answer | the model's frame, 5 beams, length penalty -1, at most 10 tokens (BLIP-2 §4.1) | none |
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor

from capfilt.curation.captioner import BlipCaptioner
from capfilt.errors import UsageError
from capfilt.evaluate.streaming import TextWriter
from capfilt.settings import CaptionSettings, GenerationSettings
from capfilt.train.batches import to_square
from capfilt.train.blip2_files import is_blip2_file
from capfilt.train.generate import Generator, load_generator
from capfilt.weights.devices import name_dtype
from capfilt.weights.find import find_model_dir
from capfilt.weights.model_files import named_classes, read_config

Task = Literal["describe", "caption", "answer"]

STAGE2_BATCH_SIZE = 16
STAGE2_DEFAULTS: dict[Task, dict[str, Any]] = {
    "describe": {"num_beams": 1, "max_new_tokens": 30},
    "caption": {"num_beams": 5, "min_new_tokens": 8, "max_new_tokens": 30},
    "answer": {"num_beams": 5, "max_new_tokens": 10, "length_penalty": -1.0},
}
STAGE2_CAPTION_PROMPT = "a photo of"
CAPTIONER_BEAMS: dict[Task, int] = {"describe": 1, "caption": 3}
CAPTIONER_LENGTHS = (5, 20)
"""Shortest and longest text in tokens, prompt included."""
BEAM_REPETITION_PENALTY = 1.0
"""BLIP's released code: 1.1 when it draws, none when it searches."""


class Stage2Writer:
    """A stage-2 BLIP-2 (OPT or T5)."""

    def __init__(self, model: str | Path, task: Task, settings: GenerationSettings) -> None:
        """Raises UsageError where the model cannot be had, or a question's frame lacks its place."""
        self._generator: Generator = load_generator(
            model, settings.device, settings.dtype, settings.llm, settings.image_encoder
        )
        self._task, self._settings = task, settings
        self.batch_size = settings.batch_size or STAGE2_BATCH_SIZE
        self.prompt = self._own_prompt(settings.prompt)
        self._options = dict(STAGE2_DEFAULTS[task])
        if settings.top_p is not None:
            drawing = {"do_sample": True, "top_p": settings.top_p, "top_k": settings.top_k}
            self._options |= {**drawing, "temperature": settings.temperature, "num_beams": 1}
            self._options.pop("length_penalty", None)
        for name in ("num_beams", "min_new_tokens", "max_new_tokens", "length_penalty"):
            if (given := getattr(settings, name)) is not None:
                self._options[name] = given
        least, most = self._options.get("min_new_tokens", 0), self._options["max_new_tokens"]
        if least > most:
            raise UsageError(f"min_new_tokens is {least}; expected at most max_new_tokens, {most}.")
        seed = {"seed": settings.seed} if settings.top_p is not None else {}
        self.fields = {
            "model": str(model), "task": task, "prompt": self.prompt, **self._options, **seed,
            **{name: value for name in ("llm", "image_encoder") if (value := getattr(settings, name))},
            "encoder_dtype": name_dtype(self._generator.encoder.dtype),
            "llm_dtype": name_dtype(self._generator.stage.llm.model.dtype),
        }  # fmt: skip

    def prepare(self, image: Image) -> np.ndarray:
        """uint8 (S, S, 3)."""
        return to_square(image.convert("RGB"), self._generator.encoder.preparation.image_size_px)

    def write(self, pictures: Sequence[np.ndarray], keys: Sequence[str], prompts: Sequence[str]) -> list[str | None]:
        """Texts; with drawing a function of the seed and of what is in the batch."""
        if self._task == "answer":
            texts = [self.prompt.replace("{}", question) for question in prompts]
        else:
            texts = [prompt or self.prompt for prompt in prompts]
        device = self._generator.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(_seed_of(self._settings.seed, keys))
            return list(self._generator.generate(list(pictures), texts, **self._options))

    def _own_prompt(self, prompt: str | None) -> str:
        if self._task == "answer":
            frame = self._generator.stage.llm.question_prompt if prompt is None else prompt
            if "{}" not in frame:
                raise UsageError(f"The prompt {frame!r} has no place for the question. Put {{}} there.")
            return frame
        return (STAGE2_CAPTION_PROMPT if self._task == "caption" else "") if prompt is None else prompt


class CaptionerWriter:
    """A BLIP captioner."""

    def __init__(self, model: str | Path, task: Task, settings: GenerationSettings) -> None:
        """Raises UsageError where the model cannot be had, or what is asked for is not in it."""
        if task == "answer":
            raise UsageError(f"{model} is a BLIP captioner, which answers no questions. Give a stage-2 model.")
        if settings.llm or settings.image_encoder:
            raise UsageError(f"{model} is a BLIP captioner, whole as it is. Leave --llm and --image-encoder out.")
        if settings.length_penalty is not None:
            raise UsageError("A BLIP captioner's beam search has no length penalty. Leave --length-penalty out.")
        num_beams = CAPTIONER_BEAMS[task] if settings.num_beams is None else settings.num_beams
        draws = settings.top_p is not None
        chosen = CaptionSettings(
            captioner=str(model),
            num_captions=1,
            decoding="nucleus" if draws else "beam" if num_beams > 1 else "greedy",
            top_p=settings.top_p or CaptionSettings.top_p,
            top_k=settings.top_k,
            temperature=settings.temperature,
            repetition_penalty=CaptionSettings.repetition_penalty if draws else BEAM_REPETITION_PENALTY,
            num_beams=num_beams,
            min_length=CAPTIONER_LENGTHS[0],
            max_length=CAPTIONER_LENGTHS[1],
            prompt=settings.prompt,
            seed=settings.seed,
            batch_size=settings.batch_size,
            device=settings.device,
            dtype=settings.dtype,
        )
        self._captioner = BlipCaptioner(chosen)
        self.batch_size, self.prompt = self._captioner.batch_size, self._captioner.prompt
        self._lengths = self._new_tokens(settings)
        self.fields: dict[str, Any] = {"model": str(model), "task": task, "prompt": self.prompt}
        self.fields |= {name: getattr(chosen, name) for name in ("decoding", "repetition_penalty")}
        if draws:
            self.fields |= {name: getattr(chosen, name) for name in ("top_p", "top_k", "temperature", "seed")}
        else:
            self.fields["num_beams"] = num_beams
        least, most = self._lengths or CAPTIONER_LENGTHS
        new = "new_tokens" if self._lengths else "length"
        self.fields |= {f"min_{new}": least, f"max_{new}": most, "dtype": self._captioner.fields["dtype"]}

    def prepare(self, image: Image) -> Tensor:
        """uint8 (3, S, S)."""
        return self._captioner.prepare(image)

    def write(self, pictures: Sequence[Tensor], keys: Sequence[str], prompts: Sequence[str]) -> list[str | None]:
        """Captions without their prompt; with drawing a function of the seed and the key alone."""
        different = list({id(picture): picture for picture in pictures}.values())
        number_of = {id(picture): number for number, picture in enumerate(different)}
        features = self._captioner.encode(different)
        texts: list[str | None] = [None] * len(pictures)
        for prompt in dict.fromkeys(prompts):
            rows = [row for row, own in enumerate(prompts) if own == prompt]
            written = self._captioner.caption_features(
                features[[number_of[id(pictures[row])] for row in rows]],
                [keys[row].encode("utf-8", "backslashreplace").decode() for row in rows],
                prompt=prompt or None,
                lengths=self._lengths,
            )
            for row, captions in zip(rows, written, strict=True):
                texts[row] = captions[0] if captions else None
        return texts

    def _new_tokens(self, settings: GenerationSettings) -> tuple[int, int] | None:
        """Lengths without the prompt, where one is given; the other is then the default, less the prompt."""
        if settings.min_new_tokens is None and settings.max_new_tokens is None:
            return None
        num_prompt = self._captioner.num_prompt_tokens
        least, most = (max(1, length - num_prompt) for length in CAPTIONER_LENGTHS)
        if settings.max_new_tokens is not None:
            most, least = settings.max_new_tokens, min(least, settings.max_new_tokens)
        if settings.min_new_tokens is not None:
            least = settings.min_new_tokens
        if least > most:
            raise UsageError(f"min_new_tokens is {least}; expected at most max_new_tokens, {most}.")
        return least, most


def load_writer(model: str | Path, task: Task, settings: GenerationSettings) -> TextWriter:
    """The writer of a model: a stage-2 folder of ours, a `Blip2ForConditionalGeneration`, LAVIS's .pth or a captioner.

    Raises UsageError where `model` is none of them, or cannot be had.
    """
    path = Path(model).expanduser()
    if path.is_file() and path.suffix in (".pth", ".pt"):
        return (Stage2Writer if is_blip2_file(path) else CaptionerWriter)(path, task, settings)
    give = "what `capfilt train stage2` or `capfilt train captioner` saved, or a hub id (owner/name)"
    folder = find_model_dir(str(model), "model", embedded="captioner", give=give)
    architectures = named_classes(read_config(folder))
    for architecture, kind in WRITERS.items():
        if architecture in architectures:
            return kind(folder, task, settings)
    raise UsageError(
        f"{folder} holds {', '.join(architectures) or 'no model'}; expected {' or '.join(WRITERS)}. "
        "Make one: `capfilt train stage2 RUN --output DIR`."
    )


WRITERS: dict[str, type[Stage2Writer] | type[CaptionerWriter]] = {
    "Blip2ForConditionalGeneration": Stage2Writer,
    "BlipForConditionalGeneration": CaptionerWriter,
}
"""Architecture in config.json → its writer."""


def _seed_of(seed: int, keys: Sequence[str]) -> int:
    """Of the draws of a batch."""
    digest = hashlib.blake2b("\0".join([str(seed), *keys]).encode("utf-8", "surrogatepass"), digest_size=7)
    return int.from_bytes(digest.digest(), "big")
