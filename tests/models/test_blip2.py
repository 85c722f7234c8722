"""BLIP-2's losses against plain loops, and its layouts against transformers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from transformers import Blip2ForImageTextRetrieval

from capfilt.errors import UsageError
from capfilt.models.blip2 import Stage1, Texts
from capfilt.models.convert_blip2 import (
    EXTRA_STAGE1_KEYS,
    blip2_config,
    refuse_unknown,
    sizes_from_config,
    stage1_names,
    to_ours,
    to_theirs,
    vision_names,
)
from capfilt.models.losses import draw_hard_negatives
from capfilt.models.qformer import QFormerConfig, select_images
from capfilt.models.vit import VisionTransformer, ViTConfig

VISION = ViTConfig(image_size_px=32, patch_size_px=8, width=48, depth=2, num_heads=4, mlp_width=96)
QFORMER = QFormerConfig(
    num_queries=5, width=32, depth=3, num_heads=4, mlp_width=64, vision_width=48, vocab_size=50,
    max_positions=20, dropout=0.0,
)  # fmt: skip
EMBED_DIM, DEC = 24, 48


@pytest.fixture(scope="module")
def models() -> tuple[VisionTransformer, Stage1]:
    torch.manual_seed(0)
    vision, stage = VisionTransformer(VISION), Stage1(QFORMER, embed_dim=EMBED_DIM, dec_token_id=DEC)
    for parameter in [*vision.parameters(), *stage.parameters()]:
        if parameter is not stage.temperature:
            nn.init.normal_(parameter, std=0.2)
    vision.norm = nn.Identity()
    return vision.eval(), stage.eval()


@pytest.fixture(scope="module")
def batch(models: tuple[VisionTransformer, Stage1]) -> tuple[Tensor, Tensor, Texts]:
    torch.manual_seed(1)
    images, tokens = torch.randn(4, 3, 32, 32), torch.randint(5, 48, (4, 7))
    mask = torch.ones(4, 7, dtype=torch.bool)
    mask[1, 4:] = mask[3, 6:] = False
    with torch.no_grad():
        features = models[0](images)
    return images, features, Texts(tokens=tokens.masked_fill(~mask, 0), mask=mask)


def theirs_of(vision: VisionTransformer, stage: Stage1) -> dict[str, Tensor]:
    own = {n: p.detach() for n, p in stage.named_parameters() if n not in EXTRA_STAGE1_KEYS}
    return to_theirs(vision.state_dict(), vision_names(2)) | to_theirs(own, stage1_names(QFORMER))


@torch.no_grad()
def test_outputs_equal_transformers(models, batch) -> None:
    (vision, stage), (images, features, texts) = models, batch
    theirs = Blip2ForImageTextRetrieval(blip2_config(VISION, QFORMER, embed_dim=EMBED_DIM)).eval()
    theirs.load_state_dict(theirs_of(vision, stage), strict=True)
    arguments = {"pixel_values": images, "input_ids": texts.tokens, "attention_mask": texts.mask.long()}
    image = stage.image_key_values(features)
    expected = theirs(**arguments)
    torch.testing.assert_close(stage.embed_texts(texts), expected.text_embeds, atol=1e-5, rtol=0)
    found = stage.embed_queries(stage.qformer.encode_queries(image)[0])
    torch.testing.assert_close(found, expected.image_embeds, atol=1e-5, rtol=0)
    expected = theirs(**arguments, use_image_text_matching_head=True).logits_per_image
    torch.testing.assert_close(stage.itm_logits(image, texts), expected, atol=1e-4, rtol=0)


def test_layout_goes_there_and_back(models) -> None:
    vision, stage = models
    state = theirs_of(vision, stage)
    sizes = sizes_from_config(blip2_config(VISION, QFORMER, embed_dim=EMBED_DIM))
    assert sizes == (VISION, QFORMER)
    back = to_ours(state, stage1_names(QFORMER))
    assert all(torch.equal(back[n], p) for n, p in stage.named_parameters() if n not in EXTRA_STAGE1_KEYS)
    refuse_unknown(state, vision_names(2), stage1_names(QFORMER))


def test_missing_and_unknown_weights_are_named(models) -> None:
    state = theirs_of(*models)
    with pytest.raises(UsageError, match=r"1 unknown weights, such as odd\.weight"):
        refuse_unknown([*state, "odd.weight"], vision_names(2), stage1_names(QFORMER))
    del state["itm_head.bias"]
    with pytest.raises(UsageError, match=r"lacks 1 weights, such as itm_head\.bias"):
        to_ours(state, stage1_names(QFORMER))


def smoothed(logits: list[float], target: int) -> float:
    """Cross-entropy with a tenth of the target spread over all classes."""
    top = max(logits)
    log_sum = top + math.log(sum(math.exp(x - top) for x in logits))
    logs = [x - log_sum for x in logits]
    return -(0.9 * logs[target] + 0.1 * sum(logs) / len(logs))


@torch.no_grad()
def test_itc_equals_plain_loops(models, batch) -> None:
    (_, stage), (_, features, texts) = models, batch
    queries = stage.embed_queries(stage.qformer.encode_queries(stage.image_key_values(features))[0])
    words = stage.embed_texts(texts)
    cosines = [[max(float(q @ w) for q in image) for w in words] for image in queries]
    rows = [smoothed([c / 0.07 for c in row], i) for i, row in enumerate(cosines)]
    columns = [smoothed([row[i] / 0.07 for row in cosines], i) for i in range(4)]
    expected = (sum(rows) / 4 + sum(columns) / 4) / 2
    assert float(stage(features, texts, losses=("itc",))["itc"]) == pytest.approx(expected, abs=1e-4)


@torch.no_grad()
def test_itg_equals_plain_loops(models, batch) -> None:
    (_, stage), (_, features, texts) = models, batch
    losses = []
    for index in range(4):
        length = int(texts.mask[index].sum())
        tokens = texts.tokens[index : index + 1, :length].clone()
        tokens[0, 0] = DEC
        _, key_values = stage.qformer.encode_queries(stage.image_key_values(features[index : index + 1]))
        for place in range(1, length):
            hidden = stage.qformer.decode_text(tokens[:, :place], key_values)[:, -1]
            losses.append(smoothed(stage.lm_head(hidden)[0].tolist(), int(tokens[0, place])))
    found = float(stage(features, texts, losses=("itg",))["itg"])
    assert found == pytest.approx(sum(losses) / len(losses), abs=1e-4)


@torch.no_grad()
def test_itm_has_one_match_and_two_hard_negatives_per_pair(models, batch) -> None:
    (_, stage), (_, features, texts) = models, batch
    uniform = torch.rand(2, 4, generator=torch.Generator().manual_seed(5))
    found = float(stage(features, texts, losses=("itm",), uniform_2B=uniform)["itm"])
    image = stage.image_key_values(features)
    queries = stage.embed_queries(stage.qformer.encode_queries(image)[0])
    logits = (queries @ stage.embed_texts(texts).T).amax(dim=1) / 0.07
    other_texts = draw_hard_negatives(logits, torch.eye(4, dtype=torch.bool), uniform[0])
    other_images = draw_hard_negatives(logits.T, torch.eye(4, dtype=torch.bool), uniform[1])
    pairs = [(i, i, 1) for i in range(4)]
    pairs += [(int(other_images[i]), i, 0) for i in range(4)] + [(i, int(other_texts[i]), 0) for i in range(4)]
    total = 0.0
    for row, text, label in pairs:
        length = int(texts.mask[text].sum())
        one = Texts(tokens=texts.tokens[text : text + 1, :length], mask=texts.mask[text : text + 1, :length])
        logit = stage.itm_logits(select_images(image, torch.tensor([row])), one)
        total -= float(logit.log_softmax(dim=1)[0, label])
    assert found == pytest.approx(total / 12, abs=1e-4)


@torch.no_grad()
def test_pairs_of_the_same_image_are_no_negatives(models, batch, monkeypatch: pytest.MonkeyPatch) -> None:
    (_, stage), (_, features, texts) = models, batch
    ids = torch.tensor([1, 2, 1, 3])
    asked: list[torch.Tensor] = []

    def draw(similarity: torch.Tensor, excluded: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
        asked.append(excluded)
        return torch.tensor([1, 2, 3, 0])

    monkeypatch.setattr("capfilt.models.contrast.draw_hard_negatives", draw)
    shared = stage(features, texts, losses=("itc", "itm"), ids_B=ids)
    assert [torch.equal(excluded, ids[:, None] == ids[None]) for excluded in asked] == [True, True]
    other = stage(features, texts, losses=("itc", "itm"), ids_B=torch.arange(4))
    assert shared["itc"] != other["itc"]
    assert other["itc"].item() == pytest.approx(stage(features, texts, losses=("itc",))["itc"].item(), rel=1e-5)


def test_loss_is_the_plain_sum_and_reaches_every_weight(models, batch) -> None:
    (_, stage), (_, features, texts) = models, batch
    losses = stage(features, texts)
    parts = torch.stack([losses[name] for name in ("itc", "itm", "itg")]).detach()
    torch.testing.assert_close(losses["loss"].detach(), parts.sum())
    losses["loss"].backward()
    assert [name for name, p in stage.named_parameters() if p.grad is None or not p.grad.abs().sum()] == []
    stage.zero_grad(set_to_none=True)
