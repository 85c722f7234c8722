"""MED's three ways of reading a text, against their masks: a changed token may reach exactly what the mask allows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import BlipForConditionalGeneration

from capfilt.models.blip import CaptionerLosses
from capfilt.models.convert_blip import from_transformers, sizes_from_config
from capfilt.models.med import Captioner, MEDConfig, TextTransformer
from capfilt.models.vit import VisionTransformer
from tests import factories

NUM_TOKENS, PLACES = 7, range(7)
CONFIG = MEDConfig(
    vocab_size=30, width=32, depth=3, num_heads=2, mlp_width=64, max_positions=16, vision_width=24, sep_token_id=2,
    dec_token_id=28, enc_token_id=29,
)  # fmt: skip


def build(*, causal: bool) -> TextTransformer:
    torch.manual_seed(0)
    model = TextTransformer(CONFIG, causal=causal).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(1.5)
    return model


def reached(model: TextTransformer, mask: Tensor | None, image: Tensor | None) -> Tensor:
    """(from, to): whether another token at a place changes the feature at another, by perturbation."""
    tokens = torch.tensor([[1, 7, 8, 9, 10, 11, 2]])
    keys = None if image is None else model.image_key_values(image)
    with torch.no_grad():
        before = model(tokens, mask_BT=mask, image=keys)[0]
        changed = []
        for place in PLACES:
            other = tokens.clone()
            other[0, place] = 20
            changed.append((model(other, mask_BT=mask, image=keys)[0] - before).abs().amax(dim=1) > 1e-6)
    return torch.stack(changed)


def gradient_reaches(model: TextTransformer, mask: Tensor | None, image: Tensor | None) -> Tensor:
    """The same by the gradient of each feature with respect to the embedded tokens."""
    tokens = torch.tensor([[1, 7, 8, 9, 10, 11, 2]])
    kept: list[Tensor] = []
    handle = model.word_embedding.register_forward_hook(lambda _m, _i, output: kept.append(output.requires_grad_()))
    keys = None if image is None else model.image_key_values(image)
    hidden = model(tokens, mask_BT=mask, image=keys)[0]
    handle.remove()
    # Layer norm makes the sum of a feature constant: weights that differ show what reaches it.
    weights = torch.linspace(-1, 1, hidden.shape[1])
    rows = [torch.autograd.grad((hidden[p] * weights).sum(), kept[0], retain_graph=True)[0][0] for p in PLACES]
    return (torch.stack(rows).abs().amax(dim=2) > 1e-7).T


@pytest.mark.parametrize("with_image", [False, True])
@pytest.mark.parametrize("num_padding", [0, 2])
def test_the_encoder_sees_all_tokens_and_no_padding(with_image: bool, num_padding: int) -> None:
    model, num_read = build(causal=False), NUM_TOKENS - num_padding
    mask = (torch.arange(NUM_TOKENS) < num_read)[None]
    image = torch.randn(1, 5, 24, generator=torch.Generator().manual_seed(1)) if with_image else None
    allowed = torch.zeros(NUM_TOKENS, NUM_TOKENS, dtype=torch.bool)
    allowed[:num_read] = True
    allowed |= torch.eye(NUM_TOKENS, dtype=torch.bool)
    assert torch.equal(reached(model, mask, image), allowed)
    assert torch.equal(gradient_reaches(model, mask, image), allowed)


@pytest.mark.parametrize("with_image", [False, True])
def test_the_decoder_sees_the_tokens_so_far(with_image: bool) -> None:
    model = build(causal=True)
    image = torch.randn(1, 5, 24, generator=torch.Generator().manual_seed(1)) if with_image else None
    allowed = torch.ones(NUM_TOKENS, NUM_TOKENS, dtype=torch.bool).triu()
    assert torch.equal(reached(model, None, image), allowed)
    assert torch.equal(gradient_reaches(model, None, image), allowed)


@pytest.mark.parametrize("causal", [False, True])
def test_every_token_sees_its_own_image_alone(causal: bool) -> None:
    model, tokens = build(causal=causal), torch.tensor([[1, 7, 8, 2], [1, 9, 10, 2]])
    images = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(1), requires_grad=True)
    hidden = model(tokens, image=model.image_key_values(images))
    weights = torch.linspace(-1, 1, hidden.shape[2])
    for text in range(2):
        for place in range(4):
            (gradient,) = torch.autograd.grad((hidden[text, place] * weights).sum(), images, retain_graph=True)
            by_image = gradient.abs().amax(dim=(1, 2)) > 1e-7
            assert by_image.tolist() == [text == 0, text == 1]


def test_lm_is_the_loss_of_transformers() -> None:
    """BlipForConditionalGeneration with the same weights and texts, smoothed by 0.1 as BLIP's released code does."""
    theirs: BlipForConditionalGeneration = factories.build_captioner(seed=3).eval()
    theirs.text_decoder.label_smoothing = 0.1
    vit, med, _ = sizes_from_config(theirs.config.to_dict())
    ours = Captioner(VisionTransformer(vit), med)
    state = from_transformers(theirs.state_dict(), "captioner", vision_depth=vit.depth, text_depth=med.depth)
    ours.load_state_dict(state)
    generator = torch.Generator().manual_seed(2)
    side = vit.image_size_px
    images = torch.randn(3, 3, side, side, generator=generator)
    tokens = torch.randint(10, med.vocab_size - 4, (3, 6), generator=generator)
    tokens[:, 0], tokens[:, -1] = med.dec_token_id, med.sep_token_id
    with torch.no_grad():
        expected = theirs(input_ids=tokens, pixel_values=images, labels=tokens).loss
        found = CaptionerLosses(ours.eval())(ours.vision(images), tokens)["lm"]
    assert found.item() == pytest.approx(expected.item(), rel=1e-4)
