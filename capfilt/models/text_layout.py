"""Which texts belong to which image, where images have different numbers of texts and share their keys and values.

In: the image of each row of text. Out: queries in the order in which an image's attention takes them, and back.

Legend: B images, N slots for texts per image, R rows of text, T tokens, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_MIN_QUERIES = 4
"""Below four queries torch's CPU attention rounds differently, and a text would depend on its neighbours."""


class TextLayout:
    """Which rows of text belong to which image, where images have different numbers of texts.

    Queries go to the image's attention in a (B, N) grid of slots, N being the largest number of texts of an
    image; idle slots repeat a row. With few tokens there are more slots, for `_MIN_QUERIES`.
    """

    def __init__(self, image_of_row: Tensor, *, num_images: int, num_tokens: int) -> None:
        """`image_of_row` (R,): each row's image, 0 to num_images - 1; every row has `num_tokens` tokens."""
        counts = torch.bincount(image_of_row, minlength=num_images)
        self.num_images, self.num_tokens = num_images, num_tokens
        self.num_slots = max(int(counts.max()), -(-_MIN_QUERIES // num_tokens))
        order = torch.argsort(image_of_row, stable=True)
        first = (counts.cumsum(0) - counts)[image_of_row[order]]
        slot = torch.empty_like(order)
        slot[order] = image_of_row[order] * self.num_slots + torch.arange(len(order), device=order.device) - first
        self.slot_of_row = slot
        self.row_of_slot = slot.new_zeros(num_images * self.num_slots)
        self.row_of_slot[slot] = torch.arange(len(slot), device=slot.device)

    def by_image(self, query_RTD: Tensor) -> Tensor:
        """(R, T, D) → (B, N·T, D)."""
        return query_RTD[self.row_of_slot].reshape(self.num_images, -1, query_RTD.shape[2])

    def by_row(self, attended_BQD: Tensor) -> Tensor:
        """(B, N·T, D) → (R, T, D)."""
        return attended_BQD.reshape(-1, self.num_tokens, attended_BQD.shape[2])[self.slot_of_row]


@dataclass(frozen=True)
class TextGroup:
    """Texts of one padded length, each of one of several images."""

    tokens: Tensor
    """(R, T) ids, R texts."""
    mask: Tensor
    """(R, T), True at tokens, False at padding."""
    layout: TextLayout
