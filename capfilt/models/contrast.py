"""Image-text contrast: its temperature, its similarities within the batch or with momentum encoders and their queue.

In: embeddings of this rank's pairs, of unit length. Out: `Contrast`, which gives ITC's loss and draws ITM's hard
negatives (ALBEF §3.2, BLIP §3.2).

Legend: B pairs on this rank, A pairs on all ranks, K columns contrasted with (A, and the queue's), E embedding width,
T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from capfilt.models.losses import cosines, draw_hard_negatives, itc_loss, soft_itc_loss, soft_targets
from capfilt.models.momentum import FeatureQueue, similarities_to_queue
from capfilt.models.ranks import Ranks

Embedded = tuple[Tensor, Tensor]
"""Embeddings (B, E) of images and of their texts."""


@dataclass(frozen=True)
class Contrast:
    """Similarities over temperature of a rank's pairs."""

    i2t: Tensor
    """(B, K), of images to texts; those of all ranks' pairs come first."""
    t2i: Tensor
    """(B, K), of texts to images."""
    offset: int
    """Column of this rank's first pair."""
    same_image: Tensor | None = None
    """(B, K) booleans, True at pairs of the same image; None: an image has no other pair."""
    targets: tuple[Tensor, Tensor] | None = None
    """(B, K) each, of ITC; None for one-hot."""

    def loss(self, label_smoothing: float = 0.0) -> Tensor:
        """ITC's loss; `label_smoothing` of one-hot targets."""
        if self.targets is None:
            return itc_loss(
                self.i2t, self.t2i, offset=self.offset, label_smoothing=label_smoothing, same_image_BA=self.same_image
            )
        return soft_itc_loss(self.i2t, self.t2i, self.targets)

    def hard_negatives(
        self, tokens_BT: Tensor, all_tokens_AT: Tensor, uniform_2B: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """For each pair another text and another image, (B,) places among all ranks' pairs.

        Drawn by similarity, see `draw_hard_negatives`; pairs of an equal text or of the same image are no negatives.
        """
        by_text, by_image = uniform_2B if uniform_2B is not None else (None, None)
        num_all = len(all_tokens_AT)
        excluded_BA = equal_pairs(tokens_BT, all_tokens_AT, self.same_image)
        other_text = draw_hard_negatives(self.i2t[:, :num_all].detach(), excluded_BA, by_text, offset=self.offset)
        other_image = draw_hard_negatives(self.t2i[:, :num_all].detach(), excluded_BA, by_image, offset=self.offset)
        return other_text, other_image


def same_images(ids_B: Tensor | None, ranks: Ranks) -> Tensor | None:
    """(B, A) booleans, True at pairs of the same image; None where images have no ids."""
    return None if ids_B is None else ids_B[:, None] == ranks.gather(ids_B)[None]


def equal_pairs(tokens_BT: Tensor, all_tokens_AT: Tensor, same_image_BK: Tensor | None) -> Tensor:
    """(B, A) booleans, True at pairs that are no negatives: of an equal text, of the same image."""
    equal_BA = (tokens_BT[:, None] == all_tokens_AT[None]).all(dim=2)
    return equal_BA if same_image_BK is None else equal_BA | same_image_BK[:, : len(all_tokens_AT)]


TEMPERATURE_RANGE = (0.001, 0.5)
"""Bounds of ITC's learned temperature (ALBEF's and BLIP's released codes; BLIP-2's has none)."""


@torch.no_grad()
def bound_temperature(temperature: Tensor) -> None:
    """After a step: back into the bounds. Clamped in the forward pass it would have no gradient there, and stay."""
    temperature.clamp_(*TEMPERATURE_RANGE)


class ImageTextContrast(nn.Module):
    """The learned temperature of ITC, 0.07 at first; training calls `bound_temperature` after each step."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor([0.07]))  # one entry: FSDP shards no scalars

    @torch.no_grad()
    def start_at(self, temperature: float) -> None:
        """Go on from the temperature of an earlier training."""
        self.temperature.fill_(temperature)
        bound_temperature(self.temperature)

    def value(self) -> float:
        """The temperature as a number, to be saved."""
        return self.temperature.item()

    def forward(self, own_BE: Tensor, others_AE: Tensor) -> Tensor:
        """Similarities over temperature (B, A)."""
        return cosines(own_BE, others_AE) / self.temperature

    def within_batch(self, embedded: Embedded, ranks: Ranks, ids_B: Tensor | None = None) -> Contrast:
        """With the pairs of all ranks' batches; `ids_B` tells the images apart."""
        images_BE, texts_BE = embedded
        return Contrast(
            self(images_BE, ranks.gather(texts_BE)), self(texts_BE, ranks.gather(images_BE)),
            ranks.offset(len(texts_BE)), same_images(ids_B, ranks),
        )  # fmt: skip

    def with_queue(
        self,
        embedded: Embedded,
        slow: Embedded,
        queue: FeatureQueue,
        alpha: Tensor | float,
        ranks: Ranks,
        ids_B: Tensor | None = None,
    ) -> Contrast:
        """With what momentum encoders make of all ranks' batches (`slow`: of this rank's) and with their queue.

        Targets are soft, `alpha` the weight of the momentum encoders' similarities. The queue holds what is to be
        pushed after the step. `ids_B` tells the images apart, also from those of earlier batches.
        """
        (images_BE, texts_BE), (slow_images_BE, slow_texts_BE) = embedded, slow
        slow_images_AE, slow_texts_AE = ranks.gather(slow_images_BE), ranks.gather(slow_texts_BE)
        queued_images, queued_texts = queue.features()

        def similarities(own_BE: Tensor, others_AE: Tensor, queued_KE: Tensor) -> Tensor:
            queued_BK = similarities_to_queue(own_BE, queued_KE, self.temperature)
            return torch.cat([self(own_BE, others_AE), queued_BK], dim=1)

        offset, same_image_BK = ranks.offset(len(texts_BE)), None
        same_image_BA = same_images(ids_B, ranks)
        if ids_B is not None and same_image_BA is not None:
            same_image_BK = torch.cat([same_image_BA, queue.same_images(ids_B)], dim=1)
        with torch.no_grad():
            slow_i2t = similarities(slow_images_BE, slow_texts_AE, queued_texts)
            slow_t2i = similarities(slow_texts_BE, slow_images_AE, queued_images)
        i2t_targets = soft_targets(slow_i2t, alpha, offset=offset, same_image_BK=same_image_BK)
        t2i_targets = soft_targets(slow_t2i, alpha, offset=offset, same_image_BK=same_image_BK)
        i2t = similarities(images_BE, slow_texts_AE, queued_texts)
        t2i = similarities(texts_BE, slow_images_AE, queued_images)
        queue.hold(slow_images_AE, slow_texts_AE, None if ids_B is None else ranks.gather(ids_B))
        return Contrast(i2t, t2i, offset, same_image_BK, (i2t_targets, t2i_targets))
