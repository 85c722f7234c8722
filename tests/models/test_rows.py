"""Rows of text under way: those retained go on as if none had ended and nothing had been moved."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from capfilt.models.med import Captioner, MEDConfig
from capfilt.models.packed import PackedLinear, pack_linears
from capfilt.models.rows import Rows
from capfilt.models.vit import VisionTransformer, ViTConfig

PROMPT, NUM_IMAGES, NUM_TEXTS, NUM_STEPS, VOCABULARY_SIZE = [50, 7, 9], 3, 4, 5, 60


@pytest.fixture(scope="module")
def captioner() -> Captioner:
    torch.manual_seed(0)
    vision = VisionTransformer(
        ViTConfig(image_size_px=32, patch_size_px=8, width=32, depth=1, num_heads=2, mlp_width=64)
    )
    config = MEDConfig(
        vocab_size=VOCABULARY_SIZE, width=32, depth=2, num_heads=2, mlp_width=64, max_positions=16, vision_width=32
    )
    captioner = Captioner(vision, config).eval().requires_grad_(False)
    pack_linears(captioner)
    if not isinstance(captioner.head.transform, PackedLinear):
        pytest.skip("this CPU or torch has no packed layers")
    return captioner


def begin(captioner: Captioner) -> Rows:
    pictures = torch.randn(NUM_IMAGES, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    rows = Rows(captioner, captioner.vision(pictures), PROMPT, len(PROMPT) + NUM_STEPS)
    rows.repeat(NUM_TEXTS)
    return rows


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_retained_rows_go_on_as_if_none_had_ended(captioner: Captioner, data: st.DataObject) -> None:
    with torch.inference_mode():
        every, some = begin(captioner), begin(captioner)
        origin = torch.arange(NUM_IMAGES * NUM_TEXTS)  # which of all rows each of `some` is
        for step in range(NUM_STEPS):
            seed = torch.Generator().manual_seed(step)
            tokens = torch.randint(1, VOCABULARY_SIZE, (NUM_IMAGES * NUM_TEXTS,), generator=seed)
            assert torch.equal(some.append(tokens[origin]), every.append(tokens)[origin])
            live = data.draw(st.lists(st.integers(0, len(origin) - 1), min_size=1, unique=True).map(sorted))
            order = some.retain(torch.tensor(live))
            assert sorted(order.tolist()) == live
            stayed = [row for row in live if row < len(live)]
            assert order[stayed].tolist() == stayed, "a row was moved that need not be"
            origin = origin[order]
