"""Our captioner and filter against transformers with the same weights, and captions against their batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from capfilt.models.convert_blip import from_transformers, sizes_from_config
from capfilt.models.decoding import write_captions
from capfilt.models.med import Captioner, Filter, MEDConfig
from capfilt.models.packed import pack_linears
from capfilt.models.static_rows import DecodingStep, DecodingSteps
from capfilt.models.vit import VisionTransformer, ViTConfig
from capfilt.settings import CaptionSettings
from tests import factories

DEC = len(factories.VOCABULARY)
PROMPT = [DEC, *(factories.VOCABULARY.index(word) for word in ("a", "picture", "of"))]
DEPTHS = {"vision_depth": 2, "text_depth": 2}
NUM_IMAGES = 24
KEYS = [f"{index:09d}" for index in range(NUM_IMAGES)]


def load_ours(theirs: Any, *, packed: bool = True) -> Captioner | Filter:
    vit, med, embed_dim = sizes_from_config(theirs.config.to_dict())
    vision = VisionTransformer(vit)
    if hasattr(theirs, "itm_head"):
        ours, kind = Filter(vision, med, embed_dim=embed_dim), "filter"
    else:
        ours, kind = Captioner(vision, med), "captioner"
    ours.load_state_dict(from_transformers(theirs.state_dict(), kind, **DEPTHS))
    if packed:  # as curation does on a CPU
        pack_linears(ours.requires_grad_(False))
    return ours.eval()


@pytest.fixture(scope="module")
def captioners() -> tuple[Any, Captioner]:
    theirs = factories.build_captioner()
    return theirs, load_ours(theirs)


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(NUM_IMAGES, 3, 32, 32, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def features(captioners: Any, images: Tensor) -> Tensor:
    with torch.inference_mode():
        return captioners[1].vision(images)


def texts_of(outputs: Tensor, prompt_length: int) -> list[list[list[int]]]:
    """Token ids after the prompt, up to [SEP], of what transformers' generate gives."""
    rows = [row[prompt_length:].tolist() for row in outputs]
    return [[row[: row.index(3)] if 3 in row else [t for t in row if t != 0]] for row in rows]


@torch.inference_mode()
def test_features_and_logits_are_those_of_transformers(captioners: Any, images: Tensor) -> None:
    theirs, ours = captioners
    tokens = torch.randint(4, DEC, (NUM_IMAGES, 9), generator=torch.Generator().manual_seed(4))
    expected = theirs(pixel_values=images, input_ids=tokens)
    found = ours.vision(images)
    assert (expected.image_embeds.std(dim=0) > 0.01).all(), "the images would not matter"
    torch.testing.assert_close(found, expected.image_embeds, atol=1e-4, rtol=0)
    torch.testing.assert_close(ours(images, tokens), expected.logits, atol=1e-4, rtol=0)
    plain = load_ours(theirs, packed=False)
    torch.testing.assert_close(plain(images, tokens), expected.logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("prompt", [PROMPT, PROMPT[:1], PROMPT[:2]])
@pytest.mark.parametrize(("min_length", "max_length", "penalty"), [(5, 20, 1.0), (10, 14, 1.1), (8, 12, 1.5)])
@pytest.mark.parametrize("num_beams", [1, 3])
def test_greedy_and_beam_captions_are_those_of_transformers(
    captioners: Any, images: Tensor, features: Tensor, prompt: list[int], min_length: int, max_length: int,
    penalty: float, num_beams: int,
) -> None:  # fmt: skip
    theirs, ours = captioners
    expected = theirs.generate(
        pixel_values=images, input_ids=torch.tensor([[*prompt, 3]] * NUM_IMAGES), num_beams=num_beams,
        do_sample=False, min_length=min_length, max_length=max_length, repetition_penalty=penalty,
    )  # fmt: skip
    decoding = CaptionSettings(
        decoding="greedy" if num_beams == 1 else "beam", num_beams=num_beams, num_captions=1,
        min_length=min_length, max_length=max_length, repetition_penalty=penalty,
    )  # fmt: skip
    found = write_captions(ours, features, KEYS, prompt, decoding)
    assert found == texts_of(expected, len(prompt))
    assert len({tuple(texts[0]) for texts in found}) > NUM_IMAGES // 4, "the captions would not differ"


def test_incremental_logits_are_the_teacher_forced_ones(captioners: Any, images: Tensor, features: Tensor) -> None:
    """Every token greedy decoding takes is the argmax of the full forward of transformers."""
    theirs, ours = captioners
    decoding = CaptionSettings(decoding="greedy", num_captions=1, min_length=1, max_length=18, repetition_penalty=1.0)
    with torch.inference_mode():
        for index, texts in enumerate(write_captions(ours, features, KEYS, PROMPT, decoding)):
            tokens = torch.tensor([[*PROMPT, *texts[0]]])
            logits = theirs(pixel_values=images[index : index + 1], input_ids=tokens).logits[0]
            chosen = [*texts[0], 3][: 18 - len(PROMPT)]
            assert logits[len(PROMPT) - 1 :].argmax(dim=1).tolist()[: len(chosen)] == chosen


def sample(ours: Captioner, features: Tensor, chosen: list[int], **changes: Any) -> list[list[list[int]]]:
    decoding = CaptionSettings(**{"num_captions": 10, "seed": 5, **changes})
    return write_captions(ours, features[chosen], [KEYS[index] for index in chosen], PROMPT, decoding)


@pytest.fixture(scope="module")
def captions(captioners: Any, features: Tensor) -> list[list[list[int]]]:
    return sample(captioners[1], features, list(range(NUM_IMAGES)))


def test_sampled_captions_differ_and_keep_their_lengths(captions: list[list[list[int]]]) -> None:
    lengths = {len(text) + len(PROMPT) for texts in captions for text in texts}
    assert min(lengths) >= 5
    assert max(lengths) <= 20
    assert len(lengths) > 5
    assert min(len({tuple(text) for text in texts}) for texts in captions) > 3


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_captions_do_not_depend_on_the_batch(
    captioners: Any, images: Tensor, captions: list[list[list[int]]], data: st.DataObject
) -> None:
    chosen = data.draw(st.lists(st.integers(0, NUM_IMAGES - 1), min_size=1, max_size=9))
    num = data.draw(st.integers(1, 10))
    with torch.inference_mode():
        features = captioners[1].vision(images[chosen])
    keys = [KEYS[index] for index in chosen]
    decoding = CaptionSettings(num_captions=num, seed=5)
    found = write_captions(captioners[1], features, keys, PROMPT, decoding)
    assert found == [captions[index][:num] for index in chosen]


@pytest.mark.parametrize("decoding", ["nucleus", "greedy"])
def test_static_shapes_give_the_same_captions(captioners: Any, features: Tensor, decoding: str) -> None:
    """What a GPU runs as CUDA graphs. Buffers serve batch after batch, smaller ones too; what was in them is gone."""
    settings = CaptionSettings(decoding=decoding, num_captions=1 if decoding == "greedy" else 5, seed=5)
    steps, lengths = DecodingSteps(captioners[1]), set()
    for numbers in (range(8), range(8, 16), range(16, 19), range(8), range(2)):
        part, keys = features[list(numbers)], [KEYS[n] for n in numbers]
        expected = write_captions(captioners[1], part, keys, PROMPT, settings)
        assert write_captions(captioners[1], part, keys, PROMPT, settings, steps) == expected
        assert steps.step is not None
        with torch.inference_mode():
            for layer in steps.step.cache:
                layer.key.fill_(torch.nan)
                layer.value.fill_(torch.nan)
        lengths |= {len(text) for own in expected for text in own}
    assert len(lengths) > 1 or decoding == "greedy"


def test_a_step_of_static_shapes_stays_on_its_device() -> None:
    """Run by torch's shadow of a GPU: a tensor made elsewhere, or a value read back, would be refused."""
    with torch.device("meta"):
        model = Captioner(VisionTransformer(ViTConfig(depth=2)), MEDConfig(depth=2)).eval()
    with FakeTensorMode(allow_non_fake_inputs=True), torch.inference_mode():
        model = model.to_empty(device="cuda")
        image = model.decoder.image_key_values(model.vision(torch.randn(4, 3, 384, 384, device="cuda")))
        step = DecodingStep(model, image, num_texts=10, max_length=20)
        prompt_cache = model.decoder.new_cache(4, 20)
        model.decoder(torch.ones(4, 4, dtype=torch.long, device="cuda"), image=image, cache=prompt_cache)
        step.start(image, prompt_cache)
        step.compute()
        assert step.logits_RV.shape == (40, 30524)
        assert step.logits_RV.device.type == "cuda"


def test_seed_and_key_change_captions(captioners: Any, features: Tensor, captions: list[list[list[int]]]) -> None:
    assert sample(captioners[1], features, [0], seed=6)[0] != captions[0]
    decoding = CaptionSettings(seed=5)
    assert write_captions(captioners[1], features[:1], ["other"], PROMPT, decoding)[0] != captions[0]


def test_logits_are_equal_to_the_bit_in_any_batch(captioners: Any, images: Tensor, features: Tensor) -> None:
    """What the property above rests on: rounding does not depend on the neighbours (float32, CPU)."""
    ours = captioners[1]
    tokens = torch.randint(4, DEC, (NUM_IMAGES, 8), generator=torch.Generator().manual_seed(4))
    with torch.inference_mode():
        whole = ours(images, tokens)
        for part in (slice(0, 1), slice(3, 5), slice(7, 20)):
            assert torch.equal(ours(images[part], tokens[part]), whole[part])


def test_prompt_as_long_as_the_text_is_refused(captioners: Any, features: Tensor) -> None:
    with pytest.raises(ValueError, match="max_length is 4"):
        sample(captioners[1], features, [0], min_length=1, max_length=4)


@pytest.mark.parametrize("padded_to", [12, 20])
@torch.inference_mode()
def test_itm_logits_are_those_of_transformers(images: Tensor, padded_to: int) -> None:
    theirs = factories.build_filter()
    ours = load_ours(theirs)
    assert isinstance(ours, Filter)
    generator = torch.Generator().manual_seed(4)
    tokens = torch.randint(4, DEC, (NUM_IMAGES, 2, padded_to), generator=generator)
    lengths = torch.randint(4, 12, (NUM_IMAGES, 2, 1), generator=generator)
    mask = torch.arange(padded_to) < lengths
    tokens, mask = torch.where(mask, tokens, 0).flatten(0, 1), mask.flatten(0, 1)
    expected = theirs(
        pixel_values=images.repeat_interleave(2, 0), input_ids=tokens, attention_mask=mask.long()
    ).itm_score
    found = ours.itm_logits(ours.vision(images), tokens, mask)
    assert expected.std(dim=0).min() > 0.01
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    similarity = theirs(pixel_values=images, input_ids=tokens[::2], attention_mask=mask[::2].long(), use_itm_head=False)
    ours_similarity = ours.embed_images(ours.vision(images)) @ ours.embed_texts(tokens[::2], mask[::2]).T
    torch.testing.assert_close(ours_similarity, similarity.itm_score, atol=1e-4, rtol=0)


@pytest.mark.parametrize("decoding", ["nucleus", "top-k", "greedy", "beam"])
def test_an_image_without_finite_logits_has_no_captions_and_its_neighbours_have_theirs(
    captioners: Any, features: Tensor, decoding: str
) -> None:
    num = 1 if decoding in ("greedy", "beam") else 4
    expected = sample(captioners[1], features, [0, 1, 2], decoding=decoding, num_captions=num)
    broken = features[:3].clone()
    broken[1, 5] = torch.nan
    chosen = CaptionSettings(decoding=decoding, num_captions=num, seed=5)
    found = write_captions(captioners[1], broken, KEYS[:3], PROMPT, chosen)
    assert found == [expected[0], [], expected[2]]
