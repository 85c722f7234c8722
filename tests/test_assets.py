"""The models shipped in the package: what their cards say, and what plain transformers and open_clip make of them."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoProcessor,
    AutoTokenizer,
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
)

from capfilt.assets import EMBEDDED_DIR
from capfilt.curate.captioner import BlipCaptioner
from capfilt.curate.scorers import ItmScorer
from capfilt.figures import measure_captioner, measure_clip, measure_filter, measure_llm, picture
from capfilt.settings import CaptionSettings, FilterSettings
from capfilt.world.language import caption
from capfilt.world.measure import unseen_scenes

NAMES = ("blip-captioner", "blip-filter", "clip", "opt", "t5")
NUM_SCENES = 100


def card_figures(name: str) -> dict[str, float]:
    card = (EMBEDDED_DIR / name / "README.md").read_text()
    return {figure: float(value) for figure, value in re.findall(r"^\| (.+?) \| ([\d.]+) \|$", card, re.MULTILINE)}


def pictures(num_scenes: int) -> list:
    return [picture(scene) for scene in unseen_scenes(num_scenes, 9000)]


def test_all_are_there_and_small() -> None:
    assert all((EMBEDDED_DIR / name / "README.md").is_file() for name in NAMES)
    num_bytes = sum(file.stat().st_size for file in EMBEDDED_DIR.rglob("*") if file.is_file())
    assert num_bytes <= 40_000_000
    assert {file.suffix for file in EMBEDDED_DIR.rglob("*") if file.is_file()} <= {
        ".json",
        ".txt",
        ".md",
        ".safetensors",
    }


@pytest.mark.parametrize(
    ("name", "measure", "figure"),
    [
        ("blip-captioner", measure_captioner, "greedy captions true"),
        ("blip-captioner", measure_captioner, "nucleus captions true"),
        ("blip-filter", measure_filter, "AUC against other images' captions"),
        ("blip-filter", measure_filter, "AUC against one changed fact"),
        ("clip", measure_clip, "image to text R@5"),
        ("opt", measure_llm, "captions true after a preamble"),
        ("t5", measure_llm, "captions true after a preamble"),
    ],
)
def test_cards_tell_the_truth(name: str, measure, figure: str) -> None:
    """Within four standard errors of a share measured on so many scenes."""
    expected = card_figures(name)[figure]
    found = measure(EMBEDDED_DIR / name, NUM_SCENES)[figure]
    assert abs(found - expected) <= 4 * np.sqrt(max(expected * (1 - expected), 0.02) / NUM_SCENES)


def test_captioner_writes_the_same_in_plain_transformers() -> None:
    folder = EMBEDDED_DIR / "blip-captioner"
    settings = CaptionSettings(captioner=str(folder), decoding="greedy", num_captions=1, max_length=28)
    ours = BlipCaptioner(settings)
    model = BlipForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder)
    images = pictures(20)
    batch = torch.stack([ours.prepare(image) for image in images])
    pixels = processor.image_processor(list(batch), return_tensors="pt", do_resize=False).pixel_values
    prompt = processor.tokenizer(ours.prompt, return_tensors="pt").input_ids[:, :].expand(len(images), -1)
    with torch.no_grad():
        written = model.generate(
            pixel_values=pixels, input_ids=prompt, max_length=28, min_length=5, do_sample=False, num_beams=1,
            repetition_penalty=settings.repetition_penalty,
        )  # fmt: skip
    theirs = [
        text.removeprefix("a picture of").strip() for text in processor.batch_decode(written, skip_special_tokens=True)
    ]
    assert [texts[0] for texts in ours.caption(images, [str(n) for n in range(20)])] == theirs


def test_filter_scores_the_same_in_plain_transformers() -> None:
    folder = EMBEDDED_DIR / "blip-filter"
    ours = ItmScorer(FilterSettings(filter_model=str(folder)))
    model = BlipForImageTextRetrieval.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder)
    texts = [caption(scene, np.random.default_rng(0)) for scene in unseen_scenes(20)]
    prepared = [ours.prepare(image) for image in pictures(20)]
    pixels = processor.image_processor(prepared, return_tensors="pt", do_resize=False).pixel_values
    found = np.array(ours.score(prepared, [[text] for text in texts]))[:, 0]
    encoded = processor.tokenizer(texts, padding=True, return_tensors="pt")
    encoded.input_ids[:, 0] = len(processor.tokenizer) - 1  # [ENC], which transformers itself does not set
    with torch.no_grad():
        logits = model(input_ids=encoded.input_ids, attention_mask=encoded.attention_mask, pixel_values=pixels)[0]
    assert np.allclose(found, logits.softmax(dim=1)[:, 1].numpy(), atol=1e-4)


def test_clip_opens_in_plain_open_clip() -> None:
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{EMBEDDED_DIR / 'clip'}")
    tokens = open_clip.get_tokenizer(f"local-dir:{EMBEDDED_DIR / 'clip'}")(["a red ball", "two stars"])
    with torch.no_grad():
        assert model.encode_image(torch.stack([transform(image) for image in pictures(2)])).shape == (2, 128)
        assert model.encode_text(tokens).shape == (2, 128)


@pytest.mark.parametrize(("name", "auto_class"), [("opt", AutoModelForCausalLM), ("t5", AutoModelForSeq2SeqLM)])
def test_language_models_open_in_plain_transformers(name: str, auto_class) -> None:
    folder: Path = EMBEDDED_DIR / name
    model, tokenizer = auto_class.from_pretrained(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer("a large red ball on the sand.", return_tensors="pt")
    with torch.no_grad():
        written = model.generate(input_ids=inputs.input_ids, max_new_tokens=20, do_sample=False)
    assert tokenizer.decode(written[0], skip_special_tokens=True).strip()
