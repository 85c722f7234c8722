"""Self-attention keys and values of the tokens that a layer has read so far.

In: keys and values of new tokens. Out: those of all tokens. `LayerCache` gives what is there; `StaticLayerCache` gives
whole buffers, whose shapes stay the same from token to token.

Legend: R rows of text, T new tokens, H heads, d width of a head.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from capfilt.models.attention import KeyValue


class LayerCache:
    """Self-attention keys and values of the tokens so far, in one preallocated buffer per layer."""

    def __init__(self, shape: Sequence[int], like: Tensor) -> None:
        """`shape` is (R, H, longest text, d); of the device and dtype of `like`."""
        self.key, self.value, self.length = like.new_empty(shape), like.new_empty(shape), 0

    def next_positions(self, num_tokens: int) -> Tensor:
        """Positions (T,) of the tokens that come next."""
        assert num_tokens == 1 or not self.length, "more than one token at a time only into an empty cache"
        return torch.arange(self.length, self.length + num_tokens, device=self.key.device)

    def append(self, key_value: KeyValue) -> KeyValue:
        """Store the keys and values of new tokens; return those of all tokens so far."""
        end = self.length + key_value[0].shape[2]
        self.key[:, :, self.length : end], self.value[:, :, self.length : end] = key_value
        self.length = end
        return self.key[:, :, :end], self.value[:, :, :end]

    def truncate(self, length: int) -> None:
        """Forget the tokens from `length` on."""
        self.length = length

    def select(self, rows: Tensor) -> None:
        """Keep (or repeat) the given rows, in this order, in new buffers."""
        self.key, self.value = self._selected(self.key, rows), self._selected(self.value, rows)

    def _selected(self, states: Tensor, rows: Tensor) -> Tensor:
        selected = states.new_empty(len(rows), *states.shape[1:])
        selected[:, :, : self.length] = states[:, :, : self.length].index_select(0, rows)
        return selected

    def move(self, sources: Tensor, targets: Tensor, num_rows: int) -> None:
        """Copy rows to other places, then keep the first `num_rows`.

        In place: what `append` gave before is no longer valid, and the buffers stay as large as they are.
        """
        for states in (self.key, self.value):
            states[targets, :, : self.length] = states[sources, :, : self.length]
        self.key, self.value = self.key[:num_rows], self.value[:num_rows]


class StaticLayerCache:
    """The same for one token at a time with shapes that do not change: what is not written yet must be masked.

    `position` (1,) is where the next token goes; it may be shared by layers, and whoever holds it counts it up.
    """

    def __init__(self, shape: Sequence[int], like: Tensor, position: Tensor) -> None:
        """`shape` is (R, H, longest text, d); of the device and dtype of `like`."""
        self.key, self.value, self.position = like.new_zeros(shape), like.new_zeros(shape), position

    def next_positions(self, num_tokens: int) -> Tensor:
        """The position of the next token."""
        assert num_tokens == 1, "one token at a time"
        return self.position

    def append(self, key_value: KeyValue) -> KeyValue:
        """Store the keys and values of the next token; return the whole buffers."""
        self.key.index_copy_(2, self.position, key_value[0])
        self.value.index_copy_(2, self.position, key_value[1])
        return self.key, self.value
