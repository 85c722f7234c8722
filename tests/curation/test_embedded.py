"""The embedded captioner, filter and CLIP: plain transformers and open_clip run the same files alike."""

from __future__ import annotations

import open_clip
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoTokenizer, BlipForConditionalGeneration, BlipForImageTextRetrieval, BlipImageProcessor

from capfilt.curation.captioner import BlipCaptioner
from capfilt.curation.scorers import ClipScorer, ItmScorer
from capfilt.settings import EMBEDDED, CaptionSettings, FilterSettings, RankSettings
from capfilt.weights.find import EMBEDDED_DIR, EMBEDDED_FOLDERS
from capfilt.world.scenes import draw_scene, render

FOLDERS = {what: EMBEDDED_DIR / folder for what, folder in EMBEDDED_FOLDERS.items()}
PICTURES = [Image.fromarray(render(draw_scene(seed, split="test"))) for seed in range(24)]
KEYS = [f"{number:09d}" for number in range(len(PICTURES))]
TEXTS = ["a large red ball", "two small blue boxes on a wooden floor", "three cats"]

pytestmark = pytest.mark.skipif(
    not all(folder.is_dir() for folder in FOLDERS.values()), reason="the embedded models are not built (make assets)"
)


def test_greedy_captions_are_those_of_plain_transformers() -> None:
    folder = FOLDERS["captioner"]
    model = BlipForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ours = BlipCaptioner(CaptionSettings(captioner=EMBEDDED, dtype="float32", decoding="greedy", num_captions=1))
    pixels = BlipImageProcessor.from_pretrained(folder)(PICTURES, return_tensors="pt").pixel_values
    prompt = tokenizer(ours.prompt, return_tensors="pt").input_ids
    outputs = model.generate(
        pixel_values=pixels, input_ids=prompt.repeat(len(PICTURES), 1), do_sample=False, min_length=5, max_length=20,
        repetition_penalty=1.1,
    )  # fmt: skip
    num_prompt = prompt.shape[1] - 1
    expected = [tokenizer.decode(row[num_prompt:], skip_special_tokens=True).strip() for row in outputs]
    assert [texts[0] for texts in ours.caption(PICTURES, KEYS)] == expected


@torch.inference_mode()
def test_itm_scores_are_those_of_plain_transformers() -> None:
    folder = FOLDERS["filter"]
    model = BlipForImageTextRetrieval.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    pixels = BlipImageProcessor.from_pretrained(folder)(PICTURES, return_tensors="pt").pixel_values
    ours = ItmScorer(FilterSettings(filter_model=EMBEDDED, dtype="float32"))
    found = ours.score([ours.prepare(picture) for picture in PICTURES], [TEXTS] * len(PICTURES))
    for number, text in enumerate(TEXTS):
        tokens = tokenizer(text, return_tensors="pt").input_ids
        tokens[:, 0] = tokenizer.convert_tokens_to_ids("[ENC]")
        logits = model(pixel_values=pixels, input_ids=tokens.repeat(len(PICTURES), 1)).itm_score
        own = torch.tensor([scores[number] for scores in found])
        torch.testing.assert_close(own, logits.softmax(dim=1)[:, 1], atol=1e-4, rtol=0)


@torch.inference_mode()
def test_clip_scores_are_those_of_plain_open_clip() -> None:
    name = f"local-dir:{FOLDERS['clip']}"
    model, _, transform = open_clip.create_model_and_transforms(name)
    tokens = open_clip.get_tokenizer(name)(TEXTS)
    images = torch.stack([torch.as_tensor(transform(picture)) for picture in PICTURES])
    image, text = model.eval().encode_image(images, normalize=True), model.encode_text(tokens, normalize=True)
    ours = ClipScorer(RankSettings(clip_model=EMBEDDED, dtype="float32"))
    found = ours.score([ours.prepare(picture) for picture in PICTURES], [TEXTS] * len(PICTURES))
    torch.testing.assert_close(torch.tensor(found), image @ text.T, atol=1e-4, rtol=0)


@pytest.fixture(scope="module")
def captioner() -> BlipCaptioner:
    return BlipCaptioner(CaptionSettings(captioner=EMBEDDED, dtype="float32"))


@pytest.fixture(scope="module")
def captions(captioner: BlipCaptioner) -> list[list[str]]:
    return captioner.caption(PICTURES, KEYS)


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(chosen=st.lists(st.integers(0, len(PICTURES) - 1), min_size=1, max_size=6))
def test_captions_do_not_depend_on_the_batch(
    captioner: BlipCaptioner, captions: list[list[str]], chosen: list[int]
) -> None:
    found = captioner.caption([PICTURES[n] for n in chosen], [KEYS[n] for n in chosen])
    assert found == [captions[n] for n in chosen]


def test_what_bfloat16_changes() -> None:
    """Which `--dtype auto` takes on CPUs that are fast at it: scores move a little, few captions become others."""
    exact, near = (
        [
            BlipCaptioner(CaptionSettings(captioner=EMBEDDED, dtype=dtype)).caption(PICTURES, KEYS),
            ItmScorer(FilterSettings(filter_model=EMBEDDED, dtype=dtype)),
            ClipScorer(RankSettings(clip_model=EMBEDDED, dtype=dtype)),
        ]
        for dtype in ("float32", "bfloat16")
    )
    captions, others = ([text for own in found[0] for text in own] for found in (exact, near))
    assert sum(map(str.__eq__, captions, others)) > 0.8 * len(captions)
    for index, largest in ((1, 0.1), (2, 0.02)):
        scores, other_scores = (
            torch.tensor(found[index].score([found[index].prepare(picture) for picture in PICTURES], exact[0]))
            for found in (exact, near)
        )
        assert 0 < (scores - other_scores).abs().max() < largest
        assert ((scores >= 0.5) == (other_scores >= 0.5)).float().mean() > 0.98
