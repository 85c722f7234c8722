"""BLIP's pre-training model: what is shared, and its losses against plain loops over pairs."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from capfilt.models.blip import Blip, CaptionerLosses, FilterLosses
from capfilt.models.med import MEDConfig
from capfilt.models.momentum import MomentumConfig
from capfilt.models.vit import VisionTransformer, ViTConfig

PAD, CLS, SEP, DEC, ENC = 0, 1, 2, 28, 29


def build(seed: int = 0) -> Blip:
    torch.manual_seed(seed)
    vit = ViTConfig(image_size_px=16, patch_size_px=8, width=32, depth=2, num_heads=2, mlp_width=64)
    med = MEDConfig(
        vocab_size=30, width=32, depth=2, num_heads=2, mlp_width=64, max_positions=16, vision_width=32,
        sep_token_id=SEP, dec_token_id=DEC, enc_token_id=ENC,
    )  # fmt: skip
    return Blip(VisionTransformer(vit), med, embed_dim=16, label_smoothing=0.1)


def draw_pairs(num_pairs: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(num_pairs, 3, 16, 16, generator=generator)
    tokens = torch.full((num_pairs, 8), PAD)
    for row in range(num_pairs):
        length = 3 + row % 4
        words = torch.randint(3, 28, (length,), generator=generator)
        tokens[row, : length + 2] = torch.tensor([CLS, *words.tolist(), SEP])
    return images, tokens


def test_encoder_and_decoder_share_all_but_self_attention() -> None:
    model = build()
    encoder = {id(p) for p in model.filter.encoder.parameters()}
    apart = [name for name, p in model.captioner.decoder.named_parameters() if id(p) not in encoder]
    assert apart
    assert all("self_attention" in name or "self_norm" in name for name in apart)
    assert model.captioner.vision is model.filter.vision
    assert model.captioner.head.vocabulary.weight is model.filter.encoder.word_embedding.weight


def test_padding_changes_no_loss() -> None:
    model, (images, tokens) = build(), draw_pairs()
    longer = F.pad(tokens, (0, 4), value=PAD)
    for losses in (("itc",), ("lm",)):
        short, long = model(images, tokens, losses), model(images, longer, losses)
        assert short["loss"].item() == pytest.approx(long["loss"].item(), rel=1e-5)


def test_lm_is_the_mean_over_next_tokens() -> None:
    model, (images, tokens) = build(), draw_pairs()
    log_probabilities = []
    for image, row in zip(images, tokens.tolist(), strict=True):
        length = row.index(SEP) + 1
        inputs = torch.tensor([[DEC, *row[1 : length - 1]]])
        logits = torch.log_softmax(model.captioner(image[None], inputs)[0], dim=1)
        for place, target in enumerate(row[1:length]):
            log_probabilities.append(0.9 * logits[place, target] + 0.1 * logits[place].mean())
    expected = -torch.stack(log_probabilities).mean()
    assert model(images, tokens, ("lm",))["lm"].item() == pytest.approx(expected.item(), rel=1e-4)


def test_lm_of_several_texts_of_an_image_is_that_of_pairs() -> None:
    model, (images, tokens) = build(), draw_pairs()
    twice = images[[0, 0, 1, 1]]
    found = model(images[:2], tokens, ("lm",))["lm"]
    assert found.item() == pytest.approx(model(twice, tokens, ("lm",))["lm"].item(), rel=1e-5)
    first = model(images[:2], tokens, ("itc", "itm", "lm"))["itc"]
    assert first.item() == pytest.approx(model(images[:2], tokens[::2], ("itc",))["itc"].item(), rel=1e-5)


def test_prompt_carries_no_loss() -> None:
    model, (images, tokens) = build(), draw_pairs()
    features = model.captioner.vision(images)
    tokens[:, 1:3] = torch.tensor([5, 6])
    tokens[0, 3:6] = torch.tensor([7, SEP, PAD])
    losses = CaptionerLosses(model.captioner, num_prompt_tokens=2)
    whole = CaptionerLosses(model.captioner)(features, tokens)["lm"]
    masked = losses(features, tokens)["lm"]
    assert masked.item() != pytest.approx(whole.item(), rel=1e-4)
    (gradient,) = torch.autograd.grad(masked, model.captioner.head.vocabulary.bias)
    assert {5, 6}.isdisjoint(tokens[:, 3:].flatten().tolist())
    for token in (5, 6):
        assert gradient[token].item() > 0, "the prompt's tokens are never targets, so their biases are only pushed down"
    assert gradient[7].item() < 0, "the first word behind the prompt is one"


def test_itm_pairs_against_single_forwards(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the drawn negatives known, ITM equals the loss of one image and one text at a time."""
    model, (images, tokens) = build(), draw_pairs()
    other = torch.tensor([1, 2, 3, 0])
    monkeypatch.setattr("capfilt.models.contrast.draw_hard_negatives", lambda *_, **__: other)
    losses: FilterLosses = model.filter_losses
    features = model.filter.vision(images)
    found = losses(images, features, tokens)["itm"]

    def logits(image: int, text: int) -> torch.Tensor:
        row = tokens[text][tokens[text] != PAD].clone()
        row[0] = ENC
        mask = torch.ones(1, len(row), dtype=torch.bool)
        return model.filter.itm_logits(features[image : image + 1], row[None], mask)[0]

    positive = [logits(i, i) for i in range(4)]
    negative = [logits(i, int(other[i])) for i in range(4)] + [logits(int(other[i]), i) for i in range(4)]
    target = torch.tensor([1] * 4 + [0] * 8)
    expected = F.cross_entropy(torch.stack(positive + negative), target)
    assert found.item() == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("with_queue", [False, True])
def test_pairs_of_the_same_image_are_no_negatives(monkeypatch: pytest.MonkeyPatch, with_queue: bool) -> None:
    model, (images, tokens) = build(), draw_pairs()
    model.start_momentum(MomentumConfig(0.5, 6) if with_queue else None)
    ids = torch.tensor([1, 2, 1, 3])
    same = ids[:, None] == ids[None]
    asked: list[torch.Tensor] = []

    def draw(similarity: torch.Tensor, excluded: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
        asked.append(excluded)
        return torch.tensor([1, 2, 3, 0])

    monkeypatch.setattr("capfilt.models.contrast.draw_hard_negatives", draw)
    found = model(images, tokens, ("itc", "itm"), ids_B=ids)
    assert [torch.equal(excluded, same) for excluded in asked] == [True, True]
    assert found["itc"] != model(images, tokens, ("itc",))["itc"]


def test_known_false_texts_take_the_place_of_drawn_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (images, tokens) = build(), draw_pairs()
    drawn, known = torch.tensor([1, 2, 3, 0]), torch.tensor([2, 3, 0, 1])
    features = model.filter.vision(images)
    by_hand = torch.stack([known[0], drawn[1], known[2], drawn[3]])
    draws = iter([by_hand, drawn, drawn, drawn])  # of a text and of an image, for each of the two calls
    monkeypatch.setattr("capfilt.models.contrast.draw_hard_negatives", lambda *_, **__: next(draws))
    expected = model.filter_losses(images, features, tokens, ("itm",))["itm"]
    false_tokens = tokens[known].clone()
    false_tokens[1::2] = PAD
    found = model.filter_losses(images, features, tokens, ("itm",), false_tokens_BT=false_tokens)["itm"]
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


def test_losses_can_be_switched_off() -> None:
    model, (images, tokens) = build(), draw_pairs()
    assert set(model(images, tokens)) == {"itc", "itm", "lm", "loss"}
    assert set(model(images, tokens, ("itm",))) == {"itm", "loss"}
    found = model(images, tokens, ("itc", "lm"))
    assert found["loss"].item() == pytest.approx((found["itc"] + found["lm"]).item(), rel=1e-6)
