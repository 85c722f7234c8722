"""The Q-Former's masks by brute force, and its size."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from capfilt.models.blip2 import Stage1
from capfilt.models.qformer import ImageKeyValues, QFormer, QFormerConfig

NUM_QUERIES, NUM_TOKENS, BATCH = 3, 6, 2
SMALL = QFormerConfig(
    num_queries=NUM_QUERIES, width=16, depth=3, num_heads=4, mlp_width=32, vision_width=24, vocab_size=40,
    max_positions=12, dropout=0.0,
)  # fmt: skip


@pytest.fixture(scope="module")
def qformer() -> QFormer:
    torch.manual_seed(0)
    model = QFormer(SMALL).double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model


@pytest.fixture(scope="module")
def image(qformer: QFormer) -> ImageKeyValues:
    torch.manual_seed(1)
    return qformer.image_key_values(torch.randn(BATCH, 5, 24, dtype=torch.float64))


def random_texts(num_padding: int = 0) -> tuple[Tensor, Tensor]:
    torch.manual_seed(2)
    mask = torch.ones(BATCH, NUM_TOKENS, dtype=torch.bool)
    mask[:, NUM_TOKENS - num_padding :] = False
    return torch.randint(1, 40, (BATCH, NUM_TOKENS)), mask


def changed_places(before: Tensor, after: Tensor) -> list[bool]:
    """Per place, whether the output of any row differs."""
    return ((before - after).abs().amax(dim=(0, 2)) > 1e-9).tolist()


@pytest.mark.parametrize("place", range(NUM_TOKENS))
def test_text_sees_all_text_but_no_padding_under_the_unimodal_mask(qformer: QFormer, place: int) -> None:
    tokens, mask = random_texts(num_padding=2)
    other = tokens.clone()
    other[:, place] += 1 - 2 * (other[:, place] == 39).long()
    found = changed_places(qformer.encode_text(tokens, mask), qformer.encode_text(other, mask))
    is_padding = place >= NUM_TOKENS - 2
    expected = [i == place for i in range(NUM_TOKENS)] if is_padding else [True] * NUM_TOKENS
    assert found == expected


@pytest.mark.parametrize("place", range(NUM_TOKENS))
def test_text_sees_earlier_text_only_under_the_causal_mask(qformer: QFormer, image: ImageKeyValues, place: int) -> None:
    tokens, _ = random_texts()
    other = tokens.clone()
    other[:, place] = (other[:, place] + 7) % 40
    _, key_values = qformer.encode_queries(image)
    found = changed_places(qformer.decode_text(tokens, key_values), qformer.decode_text(other, key_values))
    assert found == [i >= place for i in range(NUM_TOKENS)]


def test_every_query_and_the_image_reach_text_and_pairs(qformer: QFormer, image: ImageKeyValues) -> None:
    tokens, mask = random_texts()
    before = qformer.query_tokens.data.clone()
    outputs = {}
    for name in ("whole", "changed"):
        _, key_values = qformer.encode_queries(image)
        outputs[name] = qformer.decode_text(tokens, key_values), qformer.encode_pairs(image, tokens, mask)
        qformer.query_tokens.data[0, 1, 0] += 3.0  # of one dimension: a layer norm undoes a shift of all
    qformer.query_tokens.data.copy_(before)
    assert changed_places(outputs["whole"][0], outputs["changed"][0]) == [True] * NUM_TOKENS
    assert changed_places(outputs["whole"][1], outputs["changed"][1]) == [True] * NUM_QUERIES


@pytest.mark.parametrize("place", range(NUM_TOKENS))
def test_queries_see_text_but_no_padding_under_the_bidirectional_mask(
    qformer: QFormer, image: ImageKeyValues, place: int
) -> None:
    tokens, mask = random_texts(num_padding=2)
    other = tokens.clone()
    other[:, place] = (other[:, place] + 5) % 40
    found = changed_places(qformer.encode_pairs(image, tokens, mask), qformer.encode_pairs(image, other, mask))
    assert found == [place < NUM_TOKENS - 2] * NUM_QUERIES


def joint_pass(qformer: QFormer, image: ImageKeyValues, tokens: Tensor, mask: Tensor) -> Tensor:
    """Queries and text in one sequence under an explicit (B, S, S) mask, nothing reused."""
    hidden = torch.cat([qformer.query_tokens.expand(len(tokens), -1, -1), embed(qformer, tokens)], dim=1)
    hidden = qformer.embedding_norm(hidden)
    for layer, image_layer in zip(qformer.layers, image, strict=True):
        attended = layer.attend(hidden, layer.self_attention.key_value(hidden), mask[:, None])
        queries = layer.finish_queries(attended[:, :NUM_QUERIES], image_layer)
        hidden = torch.cat([queries, layer.finish_text(attended[:, NUM_QUERIES:])], dim=1)
    return hidden


def embed(qformer: QFormer, tokens: Tensor) -> Tensor:
    return qformer.word_embedding(tokens) + qformer.position_embedding.weight[: tokens.shape[1]]


@pytest.mark.parametrize("kind", ["unimodal", "bidirectional", "causal"])
def test_methods_equal_one_joint_pass_under_an_explicit_mask(
    qformer: QFormer, image: ImageKeyValues, kind: str
) -> None:
    tokens, text_mask = random_texts(num_padding=1)
    total = NUM_QUERIES + NUM_TOKENS
    is_query = torch.arange(total) < NUM_QUERIES
    mask = torch.zeros(total, total, dtype=torch.bool)
    mask[is_query[:, None] & is_query] = True
    both_text = ~is_query[:, None] & ~is_query
    mask |= both_text & (torch.ones_like(mask).tril() if kind == "causal" else torch.ones_like(mask))
    if kind == "bidirectional":
        mask[:] = True
    if kind == "causal":
        mask |= ~is_query[:, None] & is_query
    full = mask.repeat(BATCH, 1, 1)
    full[:, :, NUM_QUERIES:] &= text_mask[:, None, :] | (kind == "causal")
    expected = joint_pass(qformer, image, tokens, full)
    queries, key_values = qformer.encode_queries(image)
    if kind == "unimodal":
        found = torch.cat([queries, qformer.encode_text(tokens, text_mask)], dim=1)
    elif kind == "causal":
        found = torch.cat([queries, qformer.decode_text(tokens, key_values)], dim=1)
    else:
        found, expected = qformer.encode_pairs(image, tokens, text_mask), expected[:, :NUM_QUERIES]
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=0)


def test_full_size_has_the_papers_188_million_parameters() -> None:
    """BLIP-2 §3.1, heads and projections included; within one percent."""
    with torch.device("meta"):
        model = Stage1(QFormerConfig())
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    assert millions == pytest.approx(188, rel=0.01)


def test_without_text_has_no_text_weights() -> None:
    names = [name for name, _ in QFormer(QFormerConfig(**{**SMALL.__dict__, "with_text": False})).named_parameters()]
    assert not [name for name in names if "text" in name or "word" in name or "position" in name]
