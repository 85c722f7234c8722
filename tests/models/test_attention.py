"""Attention by matrix products, as in bfloat16 on a CPU: as exact as transformers', whatever the batch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from capfilt.models.attention import attend, attend_by_products, gains_by_products

needs_bfloat16 = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="this CPU has no bfloat16 kernels"
)


def draw(num_queries: int, num_images: int = 3) -> list[Tensor]:
    """Queries, keys and values of an image with 577 patches; scores of a deviation of three."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((num_images, 4, number, 64) for number in (num_queries, 577, 577))
    query, key, value = (torch.randn(*shape, generator=generator).bfloat16() for shape in shapes)
    return [query * 3, key, value]


@needs_bfloat16
@pytest.mark.parametrize("num_queries", [10, 577])
def test_as_near_as_transformers(num_queries: int) -> None:
    query, key, value = draw(num_queries)
    found = attend_by_products(query, key, value)
    exact = F.scaled_dot_product_attention(*(states.float() for states in (query, key, value)))
    as_transformers = ((query @ key.mT) * 64**-0.5).softmax(-1) @ value
    error, their_error = ((found.float() - exact).abs().mean(), (as_transformers.float() - exact).abs().mean())
    assert 0 < error < 1.2 * their_error
    assert error < 0.02 * exact.abs().mean()


@needs_bfloat16
@pytest.mark.parametrize("num_queries", [10, 577])
def test_an_image_is_the_same_in_any_batch(num_queries: int) -> None:
    query, key, value = draw(num_queries, num_images=9)  # more than go at once, with 577 queries
    found = attend_by_products(query, key, value)
    for image, number in ((0, num_queries), (1, 4), (2, 7), (8, num_queries)):
        one = slice(image, image + 1)
        alone = attend_by_products(query[one, :, :number].contiguous(), key[one], value[one])
        assert torch.equal(alone[0], found[image, :, :number])
    gaps = torch.stack([query, query], dim=2).flatten(1, 2)[:, ::2]  # heads with others between them
    assert torch.equal(attend_by_products(gaps, key, value), found)


@needs_bfloat16
def test_products_are_taken_for_inference_in_bfloat16_alone() -> None:
    query, key, value = draw(10)
    assert not gains_by_products(query), "gradients are computed"
    with torch.no_grad():
        assert gains_by_products(query)
        assert not gains_by_products(query.float())
        assert torch.equal(attend(query, key, value), attend_by_products(query, key, value))
    query.requires_grad_()
    attend(query, key, value).sum().backward()
    assert query.grad is not None
    assert query.grad.abs().sum() > 0
