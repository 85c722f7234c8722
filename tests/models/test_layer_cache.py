"""The cache of a layer: rows kept, repeated and moved, beside plain indexing."""

from __future__ import annotations

import pytest
import torch

from capfilt.models.layer_cache import LayerCache

SHAPE, LENGTH = (8, 2, 6, 3), 4


def filled_cache() -> tuple[LayerCache, torch.Tensor, torch.Tensor]:
    """A cache with random keys and values, and copies of both."""
    torch.manual_seed(0)
    cache = LayerCache(SHAPE, torch.empty(0))
    key, value = torch.randn(8, 2, LENGTH, 3), torch.randn(8, 2, LENGTH, 3)
    cache.append((key, value))
    return cache, key, value


def read(cache: LayerCache) -> tuple[torch.Tensor, torch.Tensor]:
    """What attention would get together with one more token."""
    rows = len(cache.key)
    key, value = cache.append((torch.ones(rows, 2, 1, 3), torch.zeros(rows, 2, 1, 3)))
    assert torch.equal(key[:, :, -1:], torch.ones(rows, 2, 1, 3))
    return key[:, :, :-1], value[:, :, :-1]


@pytest.mark.parametrize("rows", [[7, 0, 3], [1, 0, 3, 2, 5, 4, 7, 6], [2, 2, 2], list(range(8)) * 3, [0]])
def test_selected_rows_are_those_of_plain_indexing(rows: list[int]) -> None:
    cache, key, value = filled_cache()
    cache.select(torch.tensor(rows))
    found = read(cache)
    assert torch.equal(found[0], key[rows])
    assert torch.equal(found[1], value[rows])


def test_moved_rows_lie_in_the_same_buffers() -> None:
    cache, key, value = filled_cache()
    places = cache.key.data_ptr(), cache.value.data_ptr()
    cache.move(torch.tensor([7, 5]), torch.tensor([1, 2]), 5)
    assert (cache.key.data_ptr(), cache.value.data_ptr()) == places
    found, rows = read(cache), [0, 7, 5, 3, 4]
    assert torch.equal(found[0], key[rows])
    assert torch.equal(found[1], value[rows])
