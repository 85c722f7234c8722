"""Our CLIP towers against open_clip's with the same weights, and what they leave to open_clip."""

from __future__ import annotations

from typing import Any

import open_clip
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from capfilt.models.clip import ClipImageTower, ClipTextTower
from capfilt.models.convert_clip import (
    has_plain_image_tower,
    has_plain_text_tower,
    image_tower_from_open_clip,
    text_tower_from_open_clip,
)
from capfilt.models.packed import PackedLinear, pack_linears

END, CONTEXT = 99, 16
VISION = {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8}
TEXT = {"context_length": CONTEXT, "vocab_size": 100, "width": 32, "heads": 4, "layers": 2}


def build(*, quick_gelu: bool = False, vision: dict[str, Any] | None = None, text: dict[str, Any] | None = None) -> Any:
    torch.manual_seed(0)
    model = open_clip.CLIP(24, VISION | (vision or {}), TEXT | (text or {}), quick_gelu=quick_gelu).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 and name != "logit_scale":
                parameter.add_(0.2 * torch.randn_like(parameter))
        model.token_embedding.weight.mul_(20)
    return model.requires_grad_(False)


BothTowers = tuple[ClipImageTower, ClipTextTower]


def ours(model: Any) -> BothTowers:
    assert has_plain_image_tower(model)
    assert has_plain_text_tower(model)
    return image_tower_from_open_clip(model), text_tower_from_open_clip(model)


def padded(texts: list[list[int]]) -> torch.Tensor:
    return torch.tensor([text + [0] * (CONTEXT - len(text)) for text in texts])


def draw_texts(num: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(0, CONTEXT - 1, (num,), generator=generator).tolist()
    return [[98, *torch.randint(1, 98, (length,), generator=generator).tolist(), END] for length in lengths]


@pytest.mark.parametrize("quick_gelu", [False, True])
@pytest.mark.parametrize("text", [{}, {"proj_type": "linear", "proj_bias": False}, {"pool_type": "eos", "eos_id": END}])
def test_embeddings_are_those_of_open_clip(quick_gelu: bool, text: dict[str, Any]) -> None:
    model = build(quick_gelu=quick_gelu, text=text)
    images, texts = torch.randn(5, 3, 32, 32), draw_texts(40)
    expected_images, expected_texts = model.encode_image(images, normalize=True), model.encode_text(padded(texts), True)
    assert expected_images.std(dim=0).mean() > 0.01
    assert expected_texts.std(dim=0).mean() > 0.01
    image_tower, text_tower = ours(model)
    for _ in range(2):
        torch.testing.assert_close(image_tower(images), expected_images, atol=1e-5, rtol=0)
        torch.testing.assert_close(text_tower(texts), expected_texts, atol=1e-5, rtol=0)
        pack_linears(image_tower)
        pack_linears(text_tower)


@pytest.fixture(scope="module")
def packed() -> BothTowers:
    towers = ours(build(quick_gelu=True))
    for tower in towers:
        pack_linears(tower)
        if not isinstance(tower.projection, PackedLinear):
            pytest.skip("this CPU or torch has no packed layers")
    return towers


ALL_TEXTS = draw_texts(60)


@settings(max_examples=50, deadline=None)
@given(chosen=st.lists(st.integers(0, len(ALL_TEXTS) - 1), min_size=1, max_size=30))
def test_a_text_is_embedded_the_same_among_any_others(packed: BothTowers, chosen: list[int]) -> None:
    text_tower = packed[1]
    whole = text_tower(ALL_TEXTS)
    assert torch.equal(text_tower([ALL_TEXTS[number] for number in chosen]), whole[chosen])


def test_an_image_is_embedded_the_same_among_any_others(packed: BothTowers) -> None:
    images = torch.randn(9, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    image_tower = packed[0]
    whole = image_tower(images)
    for chosen in ([0], [3, 1], [8, 2, 5, 0, 7]):
        assert torch.equal(image_tower(images[chosen]), whole[chosen])


@pytest.mark.parametrize(
    ("vision", "text"),
    [
        ({"pool_type": "avg"}, {}),
        ({"ls_init_value": 0.1}, {}),
        ({"no_ln_pre": True}, {}),
        ({"attentional_pool": True, "attn_pooler_heads": 2}, {}),
        ({"final_ln_after_pool": True}, {}),
        ({}, {"no_causal_mask": True}),
        ({}, {"pool_type": "last"}),
        ({}, {"proj_type": "none"}),
        ({}, {"ls_init_value": 0.1}),
        ({"act_kwargs": {"approximate": "tanh"}}, {}),
        ({}, {"act_kwargs": {"approximate": "tanh"}}),
        ({"image_size": 36}, {}),
    ],
)
def test_models_of_another_build_are_left_to_open_clip(vision: dict[str, Any], text: dict[str, Any]) -> None:
    model = build(vision=vision, text=text)
    assert has_plain_image_tower(model) == (not vision)
    assert has_plain_text_tower(model) == (not text)
