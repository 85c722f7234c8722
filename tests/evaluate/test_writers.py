"""Writers: the papers' settings as transformers has them, on the same folders and pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import (
    AutoProcessor,
    AutoTokenizer,
    Blip2ForConditionalGeneration,
    BlipForConditionalGeneration,
    BlipImageProcessor,
    BlipProcessor,
)

from capfilt.errors import UsageError
from capfilt.evaluate.streaming import TextWriter
from capfilt.evaluate.writers import load_writer
from capfilt.settings import GenerationSettings
from capfilt.train.generate import load_generator, prepare_images
from tests import factories
from tests.train import small_models

PICTURES = [factories.draw_picture(seed, width_px=40 + seed, height_px=50) for seed in range(5)]
KEYS = [str(number) for number in range(len(PICTURES))]


def load(folder: Path, task: Any, **settings: Any) -> TextWriter:
    return load_writer(folder, task, GenerationSettings(**{"device": "cpu", "dtype": "float32", **settings}))


def write(writer: TextWriter, prompts: list[str] | None = None, rows: list[int] | None = None) -> list[str | None]:
    rows = list(range(len(PICTURES))) if rows is None else rows
    pictures = [writer.prepare(PICTURES[row]) for row in rows]
    return writer.write(pictures, [KEYS[row] for row in rows], prompts or [""] * len(rows))


def by_transformers(folder: Path, prompt: str, **options: Any) -> list[str]:
    """What plain transformers writes of each picture alone, the prompt left out, which OPT repeats."""
    model = Blip2ForConditionalGeneration.from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder)
    preparation = load_generator(folder, "cpu").encoder.preparation
    texts = []
    for picture in PICTURES:
        inputs = processor(images=[picture], text=[prompt], return_tensors="pt")
        pixels = prepare_images([picture], preparation)  # resized by Pillow, as it was for training
        tokens = model.generate(**{**inputs, "pixel_values": pixels}, do_sample=False, **options)
        texts.append(processor.batch_decode(tokens, skip_special_tokens=True)[0].strip())
    if model.config.text_config.model_type == "t5":
        return texts
    start = processor.tokenizer.decode(processor.tokenizer(prompt).input_ids, skip_special_tokens=True)
    return [text.removeprefix(start).strip() for text in texts]


@pytest.mark.parametrize("family", ["opt", "t5"])
def test_stage2_captions_and_answers_by_the_papers_settings(writers_dir: Path, family: str) -> None:
    folder = writers_dir / family
    captions = write(load(folder, "caption"))
    expected = by_transformers(folder, "a photo of", num_beams=5, min_new_tokens=8, max_new_tokens=30)
    assert captions == expected
    assert len(set(captions)) > 2
    frame = {"opt": "Question: what color Answer:", "t5": "Question: what color Short answer:"}[family]
    expected = by_transformers(folder, frame, num_beams=5, max_new_tokens=10, length_penalty=-1.0)
    assert write(load(folder, "answer"), ["what color"] * len(PICTURES)) == expected
    framed = load(folder, "answer", prompt="what color {} here", num_beams=1, length_penalty=0.0)
    assert write(framed, ["is"] * 5) == by_transformers(folder, "what color is here", max_new_tokens=10)


@pytest.mark.parametrize("family", ["opt", "t5"])
def test_one_picture_with_several_prompts(writers_dir: Path, family: str) -> None:
    """A picture is encoded once, and gets what it would get alone."""
    writer = load(writers_dir / family, "describe")
    pictures = [writer.prepare(picture) for picture in PICTURES[:2]]
    order = [0, 1, 0, 0]
    prompts = ["a red", "question : what color ? answer :", "", "the square is on the"]
    together = writer.write([pictures[n] for n in order], ["x"] * 4, prompts)
    alone = [writer.write([pictures[n]], ["x"], [prompt])[0] for n, prompt in zip(order, prompts, strict=True)]
    assert together == alone
    assert len(set(together)) > 2


def test_a_long_question_is_not_cut(writers_dir: Path) -> None:
    """33 words and the frame, where captions are trained on 32 tokens at most."""
    question = " ".join(["what color is the square on the left"] * 4 + ["here"])
    folder = writers_dir / "t5"
    expected = by_transformers(folder, f"Question: {question} Short answer:", num_beams=1, max_new_tokens=10)
    assert write(load(folder, "answer", num_beams=1, length_penalty=1.0), [question] * 5) == expected


def test_a_prompt_longer_than_the_language_model_takes(writers_dir: Path) -> None:
    with pytest.raises(UsageError, match="has 101 tokens; with 34 for image and text the language model takes 96"):
        write(load(writers_dir / "opt", "describe", prompt="a " * 100))


@pytest.mark.parametrize(
    ("task", "options", "lengths"),
    [
        ("caption", {}, {"num_beams": 3, "min_length": 5, "max_length": 20}),
        ("describe", {}, {"num_beams": 1, "min_length": 5, "max_length": 20}),
        ("caption", {"max_new_tokens": 4, "min_new_tokens": 3}, {"num_beams": 3, "min_length": 7, "max_length": 8}),
        ("caption", {"prompt": "a photo of", "num_beams": 2}, {"num_beams": 2, "min_length": 5, "max_length": 20}),
    ],
)
def test_captions_of_blip_by_its_settings(writers_dir: Path, task: str, options: dict, lengths: dict) -> None:
    folder = writers_dir / "captioner"
    model = BlipForConditionalGeneration.from_pretrained(folder).eval()
    processor = BlipProcessor(BlipImageProcessor.from_pretrained(folder), AutoTokenizer.from_pretrained(folder))
    prompt = options.get("prompt", "a picture of ")
    inputs = processor(PICTURES, text=[prompt] * len(PICTURES), return_tensors="pt")
    outputs = model.generate(**inputs, do_sample=False, **lengths)
    num_prompt = len(processor.tokenizer(prompt).input_ids) - 1
    expected = [processor.decode(row[num_prompt:], skip_special_tokens=True).removeprefix("##") for row in outputs]
    assert write(load(folder, task, **options)) == expected
    assert len(set(expected)) > 2


def test_prompts_of_its_own_for_each_picture(writers_dir: Path) -> None:
    folder = writers_dir / "captioner"
    prompts = ["", "a red", "a photo of", "a red", ""]
    found = write(load(folder, "describe"), prompts)
    for row, prompt in enumerate(prompts):
        own = load(folder, "describe", prompt=prompt or None)
        assert found[row] == write(own, rows=[row])[0]


@pytest.mark.parametrize("kind", ["opt", "t5", "captioner"])
def test_draws_are_fixed_by_the_seed(writers_dir: Path, kind: str) -> None:
    drawing = {"top_p": 0.95, "temperature": 1.5}
    torch.manual_seed(1)
    first = write(load(writers_dir / kind, "describe", **drawing))
    after = torch.rand(1)
    torch.manual_seed(1)
    writer = load(writers_dir / kind, "describe", **drawing)
    assert torch.rand(1) == after  # torch's own generator is left alone
    assert write(writer) == first
    assert write(load(writers_dir / kind, "describe", **drawing, seed=1)) != first
    assert write(load(writers_dir / kind, "describe")) != first
    narrow = load(writers_dir / kind, "describe", top_p=1e-9, max_new_tokens=8)
    greedy = {"top_p": None, "max_new_tokens": 8}
    if kind != "captioner":  # whose draws have BLIP's repetition penalty
        assert write(narrow) == write(load(writers_dir / kind, "describe", **greedy))


def test_a_captioners_draws_do_not_depend_on_the_batch(writers_dir: Path) -> None:
    writer = load(writers_dir / "captioner", "describe", top_p=0.9)
    whole = write(writer)
    assert [write(writer, rows=[row])[0] for row in (3, 0)] == [whole[3], whole[0]]


def test_fields_say_what_is_done(writers_dir: Path) -> None:
    caption = load(writers_dir / "opt", "caption").fields
    assert caption == {
        "model": str(writers_dir / "opt"), "task": "caption", "prompt": "a photo of", "num_beams": 5,
        "min_new_tokens": 8, "max_new_tokens": 30, "encoder_dtype": "float32", "llm_dtype": "float32",
    }  # fmt: skip
    assert load(writers_dir / "captioner", "caption", dtype="bfloat16").fields["dtype"] == "bfloat16"
    drawn = load(writers_dir / "captioner", "describe", top_p=0.9).fields
    assert (drawn["decoding"], drawn["top_k"], drawn["min_length"], drawn["max_length"]) == ("nucleus", 50, 5, 20)


@pytest.mark.parametrize(
    ("kind", "task", "options", "said"),
    [
        ("captioner", "answer", {}, "which answers no questions"),
        ("captioner", "caption", {"length_penalty": 0.5}, "no length penalty"),
        ("captioner", "caption", {"llm": "embedded-opt"}, "whole as it is. Leave --llm and --image-encoder out"),
        ("captioner", "caption", {"max_new_tokens": 99}, "at most 64, the model's"),
        ("captioner", "caption", {"min_new_tokens": 30}, "min_new_tokens is 30; expected at most"),
        ("opt", "caption", {"max_new_tokens": 5}, "min_new_tokens is 8; expected at most max_new_tokens, 5"),
        ("opt", "answer", {"prompt": "Question:"}, "no place for the question"),
        ("opt", "describe", {"top_p": 0.9, "num_beams": 2}, "num_beams is 2; expected no beams with top_p"),
        ("opt", "describe", {"temperature": 0.7}, "temperature is 0.7; expected 1 without top_p"),
        ("opt-parts/blip", "caption", {}, "expected Blip2ForConditionalGeneration or BlipForConditionalGeneration"),
        ("none", "caption", {}, "no model"),
    ],
)
def test_what_is_refused(writers_dir: Path, kind: str, task: str, options: dict, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        write(load(writers_dir / kind, task, **options))


def test_embedded_names_the_captioner_of_the_package() -> None:
    writer = load(Path("embedded"), "caption")
    picture = Image.fromarray(small_models.draw_square("red", "left", 1))
    assert writer.write([writer.prepare(picture)], ["x"], [""])[0]
