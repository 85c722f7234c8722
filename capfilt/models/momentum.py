"""Momentum encoders and the queue of their features (MoCo; ALBEF §3.2, BLIP §3.2).

In: a model that trains. Out: a copy that follows it slowly, and the features that copies of the last steps gave, to
be contrasted with.

Deviations from the released code: the queue starts empty, not full of random features, and its size need not be a
multiple of the batch; the features of all ranks' batches are contrasted with, not this rank's alone, so that ranks
compute what one process would with the joint batch.

Legend: B pairs on this rank, A pairs on all ranks, K places in the queue, E embedding.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from capfilt.models.losses import cosines

NEVER = -1e4
"""Similarity over temperature of what is not there: far below that of any two features (at least -1 / 0.001)."""

NO_IMAGE = -1
"""In the place of an image's id: of an empty place, and of an image that nothing is known of."""

Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True)
class MomentumConfig:
    """Momentum encoders and their queue."""

    rate: float = 0.995
    """Share of its old weights that a momentum encoder keeps in a step (ALBEF §3.5, BLIP: 0.995)."""
    queue_size: int = 57600
    """Pairs of features that are contrasted with, beside the batch (released codes: BLIP 57,600, ALBEF 65,536)."""


def slow_copy(module: Module) -> Module:
    """A copy that takes no gradient."""
    return deepcopy(module).requires_grad_(False).eval()


@torch.no_grad()
def follow(slow: nn.Module, fast: nn.Module, rate: float) -> None:
    """slow ← rate · slow + (1 - rate) · fast, weight by weight (ALBEF: rate 0.995)."""
    targets = dict(fast.named_parameters())
    for name, p in slow.named_parameters():
        p.lerp_(targets[name].detach(), 1.0 - rate)


def similarities_to_queue(features_BE: Tensor, queued_KE: Tensor, temperature: Tensor) -> Tensor:
    """(B, K) over temperature, float32; NEVER at places where nothing was put yet."""
    empty_K = queued_KE.square().sum(dim=1) == 0
    return (cosines(features_BE, queued_KE) / temperature).masked_fill(empty_K, NEVER)


class FeatureQueue(nn.Module):
    """The last K features of images and of texts, all of unit length, with the images' ids; zeros where it is empty.

    BLIP's and ALBEF's codes for retrieval keep ids, those for pre-training do not, whose epochs are longer than the
    queue. Curated runs may be small: an image then meets its own earlier features, which are no negatives.
    """

    def __init__(self, size: int, embed_dim: int) -> None:
        super().__init__()
        self.size = size
        self.register_buffer("images", torch.zeros(size, embed_dim))
        self.register_buffer("texts", torch.zeros(size, embed_dim))
        self.register_buffer("ids", torch.full((size,), NO_IMAGE))
        self.register_buffer("place", torch.zeros((), dtype=torch.long))
        self._held: list[tuple[Tensor, Tensor, Tensor]] = []

    def features(self) -> tuple[Tensor, Tensor]:
        """Queued features (K, E) of images and of texts."""
        return cast(Tensor, self.images), cast(Tensor, self.texts)

    def same_images(self, ids_B: Tensor) -> Tensor:
        """(B, K) booleans, True at pairs of the same image."""
        return ids_B[:, None] == cast(Tensor, self.ids)[None]

    def hold(self, images_AE: Tensor, texts_AE: Tensor, ids_A: Tensor | None = None) -> None:
        """Keep the features of a batch until `push`: the backward pass still reads the queue as it is.

        `ids_A`, 0 or more, tell the images apart; without them each is another.
        """
        if ids_A is None:
            ids_A = torch.full((len(images_AE),), NO_IMAGE, device=images_AE.device)
        if torch.is_grad_enabled():
            self._held.append((images_AE.detach(), texts_AE.detach(), ids_A))

    @torch.no_grad()
    def push(self) -> None:
        """Put what is held in the place of the oldest features; of more than fit, the last."""
        place = cast(Tensor, self.place)
        for batch in self._held:
            kept = [values[-self.size :] for values in batch]
            rows = (place + torch.arange(len(kept[0]), device=place.device)) % self.size
            for queued, values in zip((*self.features(), cast(Tensor, self.ids)), kept, strict=True):
                queued.index_copy_(0, rows, values.to(queued.dtype))
            place.copy_((place + len(rows)) % self.size)
        self._held.clear()

    @torch.no_grad()
    def take_over(self, images_KE: Tensor, texts_KE: Tensor, place: int) -> None:
        """Start with the features of an earlier queue, whose oldest lie at `place`: the newest that fit.

        Their images' ids are another training's, so each counts as another image.
        """
        cast(Tensor, self.ids).fill_(NO_IMAGE)
        for queued, features_KE in zip(self.features(), (images_KE, texts_KE), strict=True):
            if len(features_KE) != self.size:
                features_KE = features_KE.roll(-place, dims=0)[-self.size :]
            queued.zero_()
            queued[: len(features_KE)] = features_KE.to(queued)
        fits_exactly = len(images_KE) == self.size
        cast(Tensor, self.place).fill_(place if fits_exactly else min(len(images_KE), self.size) % self.size)
