"""ALBEF's encoders against transformers' BERT, what may influence what, and its losses against plain loops."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from transformers import BertConfig, BertForMaskedLM

from capfilt.models.albef import Albef, AlbefConfig, AlbefLosses
from capfilt.models.convert_albef import bert_config, original_names
from capfilt.models.momentum import MomentumConfig
from capfilt.models.text_layout import TextLayout
from capfilt.models.vit import VisionTransformer, ViTConfig

PAD, CLS, SEP, MASK = 0, 1, 2, 3
VIT = ViTConfig(image_size_px=16, patch_size_px=8, width=48, depth=2, num_heads=2, mlp_width=64)
CONFIG = AlbefConfig(
    vocab_size=30, width=32, depth=4, text_depth=2, num_heads=2, mlp_width=64, max_positions=16, vision_width=48,
    sep_token_id=SEP, cls_token_id=CLS, mask_token_id=MASK,
)  # fmt: skip


def build(seed: int = 0) -> Albef:
    """Lively weights: every matrix matters."""
    torch.manual_seed(seed)
    model = Albef(VisionTransformer(VIT), CONFIG, embed_dim=16).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2) if p.ndim >= 2 else p.add_(0.1 * torch.randn_like(p))
    return model


def draw_pairs(num_pairs: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """Images, and texts of different lengths that begin with [CLS] and end with [SEP]."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(num_pairs, 3, 16, 16, generator=generator)
    tokens = torch.zeros(num_pairs, 8, dtype=torch.long)
    for row in range(num_pairs):
        words = torch.randint(4, 30, (3 + row % 4,), generator=generator)
        tokens[row, : len(words) + 2] = torch.tensor([CLS, *words.tolist(), SEP])
    return images, tokens


def their_berts(model: Albef) -> tuple[BertForMaskedLM, BertForMaskedLM]:
    """transformers' text encoder (first layers) and fusion encoder (last ones, with cross-attention), equal weights."""
    names = original_names(vision_depth=VIT.depth, text_depth=2, fusion_depth=2)
    state = {
        theirs.removeprefix("text_encoder."): model.state_dict()[ours]
        for ours, theirs in names.items()
        if theirs.startswith("text_encoder.")
    }
    found = []
    for first, is_fusion in ((0, False), (2, True)):
        config = BertConfig(
            **bert_config(CONFIG), is_decoder=is_fusion, add_cross_attention=is_fusion, encoder_hidden_size=48
        )
        own = {}
        for name, tensor in state.items():
            if name.startswith("bert.encoder.layer."):
                number, _, rest = name.removeprefix("bert.encoder.layer.").partition(".")
                if first <= int(number) < first + 2:
                    own[f"bert.encoder.layer.{int(number) - first}.{rest}"] = tensor
            else:
                own[name] = tensor
        bert = BertForMaskedLM(config).eval()
        if is_fusion:  # cross-attention reads images, which are as wide as their encoder
            for layer in bert.bert.encoder.layer:
                for part in ("key", "value"):
                    setattr(layer.crossattention.self, part, torch.nn.Linear(48, 32))
        missing, unexpected = bert.load_state_dict(own, strict=False)
        assert not unexpected
        assert set(missing) <= {"cls.predictions.decoder.weight", "cls.predictions.decoder.bias"}
        bert.tie_weights()
        found.append(bert)
    return found[0], found[1]


@torch.no_grad()
def test_both_encoders_and_the_head_against_transformers() -> None:
    model = build()
    images, tokens = draw_pairs()
    mask = tokens != PAD
    text_bert, fusion_bert = their_berts(model)
    expected = text_bert.bert(tokens, attention_mask=mask.long()).last_hidden_state
    found = model.text.encode(tokens, mask)
    torch.testing.assert_close(found[mask], expected[mask], atol=1e-4, rtol=1e-4)

    features = model.vision(images)
    both_ways = torch.zeros(len(tokens), 1, 1, 8).masked_fill(~mask[:, None, None], torch.finfo(torch.float32).min)
    fused = fusion_bert.bert.encoder(
        expected, attention_mask=both_ways.expand(-1, -1, 8, -1), encoder_hidden_states=features
    ).last_hidden_state
    found = model.text.fuse(found, mask, model.text.image_key_values(features))
    torch.testing.assert_close(found[mask], fused[mask], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(model.head(found[mask]), fusion_bert.cls(fused[mask]), atol=1e-4, rtol=1e-4)
    itm = model.itm_logits(features, tokens, mask)
    torch.testing.assert_close(itm, model.itm_head(fused[:, 0]), atol=1e-4, rtol=1e-4)


def test_the_text_encoder_has_no_weights_for_images() -> None:
    names = [name for name, _ in build().text.named_parameters() if "cross" in name]
    assert {name.split(".")[1] for name in names} == {"2", "3"}


@torch.no_grad()
def test_what_influences_what() -> None:
    model = build()
    images, tokens = draw_pairs()
    mask = tokens != PAD
    features = model.vision(images)

    def run(tokens_BT: torch.Tensor, features_BPD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        text = model.text.encode(tokens_BT, mask)
        return text, model.text.fuse(text, mask, model.text.image_key_values(features_BPD))

    text, fused = run(tokens, features)
    changed = tokens.clone()
    changed[0, -1] = 9  # padding, masked
    for found, expected in zip(run(changed, features), (text, fused), strict=True):
        torch.testing.assert_close(found[mask], expected[mask])
    changed = tokens.clone()
    changed[1, 2] = 4 + (tokens[1, 2] - 3) % 26  # a word of text 1
    other_text, other_fused = run(changed, features)
    rows = torch.tensor([0, 2, 3])
    torch.testing.assert_close(other_fused[rows], fused[rows])
    assert ((other_text[1, :5] - text[1, :5]).abs().amax(dim=1) > 1e-4).all(), "bidirectional: all see the word"
    assert ((other_fused[1, :5] - fused[1, :5]).abs().amax(dim=1) > 1e-4).all()
    other = features.clone()
    other[2] += 1.0
    other_text, other_fused = run(tokens, other)
    assert torch.equal(other_text, text), "the text encoder sees no image"
    torch.testing.assert_close(other_fused[[0, 1, 3]], fused[[0, 1, 3]])
    assert ((other_fused[2] - fused[2]).abs().amax(dim=1) > 1e-4).all(), "every token of the fusion encoder sees it"


@torch.no_grad()
def test_texts_laid_out_by_image_are_those_of_single_pairs() -> None:
    model = build()
    images, tokens = draw_pairs()
    features, rows = model.vision(images), torch.tensor([0, 0, 1, 3])
    layout = TextLayout(rows, num_images=4, num_tokens=8)
    found = model.itm_logits(features, tokens, tokens != PAD, layout=layout)
    expected = torch.cat(
        [model.itm_logits(features[[n]], t[None], t[None] != PAD) for n, t in zip(rows.tolist(), tokens, strict=True)]
    )
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def mask_some(tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    is_masked = torch.zeros_like(tokens, dtype=torch.bool)
    for place in ((0, 1), (1, 2), (1, 3), (3, 1)):
        is_masked[place] = True
    return tokens.masked_fill(is_masked, MASK), is_masked


@pytest.mark.parametrize("momentum", [None, MomentumConfig(0.9, 6)])
def test_losses_against_plain_loops(momentum: MomentumConfig | None, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = AlbefLosses(build(), momentum)
    model, alpha = losses.model, 0.3 if momentum else 0.0
    images, tokens = draw_pairs()
    masked_tokens, is_masked = mask_some(tokens)
    queued_images, queued_texts = torch.zeros(0, 16), torch.zeros(0, 16)
    slow = model
    if losses.momentum is not None:
        slow = losses.momentum.model
        with torch.no_grad():
            for p in slow.parameters():
                p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
        queued_images, queued_texts = F.normalize(torch.randn(2, 4, 16), dim=-1)
        queue = losses.momentum.queue
        queue.hold(queued_images, queued_texts)
        queue.push()
    texts_of, images_of = torch.tensor([2, 3, 0, 1]), torch.tensor([1, 2, 3, 0])
    draws = iter([texts_of, images_of])
    monkeypatch.setattr("capfilt.models.contrast.draw_hard_negatives", lambda *_, **__: next(draws))
    found = losses(images, tokens, masked_tokens_BT=masked_tokens, is_masked_BT=is_masked, alpha=alpha)

    def unit(vector: torch.Tensor) -> torch.Tensor:
        return vector / vector.norm()

    def embed(own: Albef) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        pictures = [unit(own.vision_projection(own.vision(image[None])[0, 0])) for image in images]
        texts = [unit(own.text_projection(own.text.encode(t[t != PAD][None], torch.ones(1, 1))[0, 0])) for t in tokens]
        return pictures, texts

    own_images, own_texts = embed(model)
    slow_images, slow_texts = embed(slow)
    expected = []
    for own, slow_own, others in (
        (own_images, slow_images, [*slow_texts, *queued_texts]),
        (own_texts, slow_texts, [*slow_images, *queued_images]),
    ):
        for row in range(4):
            logits = torch.stack([own[row] @ other / 0.07 for other in others])
            slow_logits = torch.stack([slow_own[row] @ other / 0.07 for other in others])
            targets = alpha * slow_logits.softmax(0)
            targets[row] = targets[row] + 1 - alpha
            expected.append(-(targets * logits.log_softmax(0)).sum())
    assert found["itc"].item() == pytest.approx(float(torch.stack(expected).detach().mean()), rel=1e-4)

    def match(image: int, text: int) -> torch.Tensor:
        words = tokens[text][tokens[text] != PAD][None]
        return model.itm_logits(model.vision(images[image][None]), words, torch.ones_like(words))[0].log_softmax(0)

    parts = [-match(row, row)[1] for row in range(4)]
    parts += [-match(row, int(texts_of[row]))[0] for row in range(4)]
    parts += [-match(int(images_of[row]), row)[0] for row in range(4)]
    assert found["itm"].item() == pytest.approx(float(torch.stack(parts).detach().mean()), rel=1e-4)

    def words_of(own: Albef, row: int) -> torch.Tensor:
        text = masked_tokens[row][tokens[row] != PAD][None]
        image = own.text.image_key_values(own.vision(images[row][None]))
        hidden = own.text.fuse(own.text.encode(text, torch.ones_like(text)), torch.ones_like(text), image)
        return own.head(hidden)[0]

    parts = []
    for row, place in is_masked.nonzero().tolist():
        said = words_of(model, row)[place].log_softmax(0)
        soft = words_of(slow, row)[place].softmax(0)
        parts.append(-(1 - alpha) * said[tokens[row, place]] - alpha * (soft * said).sum())
    assert found["mlm"].item() == pytest.approx(float(torch.stack(parts).detach().mean()), rel=1e-4)
    torch.testing.assert_close(found["loss"], found["itc"] + found["itm"] + found["mlm"])


@pytest.mark.parametrize("names", [("itc",), ("itm",), ("mlm",), ("itc", "mlm"), ("itc", "itm")])
def test_each_loss_alone_is_what_it_is_together(names: tuple[str, ...]) -> None:
    losses = AlbefLosses(build(), MomentumConfig(0.9, 8))
    images, tokens = draw_pairs()
    masked_tokens, is_masked = mask_some(tokens)
    inputs = {"masked_tokens_BT": masked_tokens, "is_masked_BT": is_masked, "uniform_2B": torch.full((2, 4), 0.4)}
    together = losses(images, tokens, **inputs)
    alone = losses(images, tokens, names, **inputs)
    assert set(alone) == {*names, "loss"}
    for name in names:
        torch.testing.assert_close(alone[name], together[name])


def test_pseudo_labels_carry_no_gradient_and_no_masked_token_no_loss() -> None:
    losses = AlbefLosses(build(), MomentumConfig(0.9, 8))
    images, tokens = draw_pairs()
    masked_tokens, is_masked = mask_some(tokens)
    losses(images, tokens, masked_tokens_BT=masked_tokens, is_masked_BT=is_masked)["loss"].backward()
    assert losses.momentum is not None
    assert all(p.grad is None and not p.requires_grad for p in losses.momentum.parameters())
    without = {name for name, p in losses.named_parameters() if p.requires_grad and p.grad is None}
    assert without == set()
    none = torch.zeros_like(is_masked)
    assert losses(images, tokens, ("mlm",), masked_tokens_BT=tokens, is_masked_BT=none)["mlm"].item() == 0.0


def test_the_momentum_model_follows_without_dropout_and_keeps_its_head_tied() -> None:
    losses = AlbefLosses(build(), MomentumConfig(0.9, 8)).train()
    momentum, model = losses.momentum, losses.model
    assert momentum is not None
    assert model.training
    assert not momentum.model.training
    before = momentum.model.text.word_embedding.weight.clone()
    with torch.no_grad():
        model.text.word_embedding.weight.add_(1.0)
    momentum.follow(model)
    torch.testing.assert_close(momentum.model.text.word_embedding.weight, before + 0.1)
    assert momentum.model.head.vocabulary.weight is momentum.model.text.word_embedding.weight


def test_a_split_that_leaves_no_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="text_depth 4 of 4"):
        AlbefConfig(depth=4, text_depth=4)
