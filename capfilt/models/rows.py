"""Rows of text that a captioner writes at the same time, each for one image; they leave when they end.

In: image features and a prompt, then a token a row. Out: next-token logits.

In float32 on a CPU a row does not depend on the batch around it, to the bit: matrix products of four or more rows do
not, so rows are kept at a multiple of four.

Legend: B images, R rows of text, V vocabulary, P patches, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from capfilt.models.med import Captioner
from capfilt.models.text_layout import TextLayout

_ROWS_MULTIPLE = 4


class Rows:
    """Rows of text under way: their cache, and the images they look at.

    At first there is a row per image, which has read the prompt; then `repeat`, then by turns `append` and `retain` or
    `keep`.
    """

    def __init__(self, model: Captioner, features_BPD: Tensor, prompt: Sequence[int], max_length: int) -> None:
        self._model = model
        self.image = model.decoder.image_key_values(features_BPD)
        device, batch = features_BPD.device, len(features_BPD)
        padded = -(-len(prompt) // _ROWS_MULTIPLE) * _ROWS_MULTIPLE
        tokens_T = torch.full((padded,), model.decoder.config.pad_token_id, device=device)
        tokens_T[: len(prompt)] = torch.tensor(list(prompt), device=device)
        self.cache = model.decoder.new_cache(batch, max(max_length, padded))
        hidden_BTD = model.decoder(tokens_T.expand(batch, -1), image=self.image, cache=self.cache)
        for layer in self.cache:
            layer.truncate(len(prompt))
        self.logits_BV = self._logits(hidden_BTD[:, len(prompt) - 1])
        self._image_of_row = torch.arange(batch, device=device)

    def repeat(self, num_texts: int) -> None:
        """Go on with `num_texts` rows of each image."""
        self.keep(self._image_of_row.repeat_interleave(num_texts))

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows, in this order; filled up to a multiple of four with repetitions."""
        rows = filled(rows)
        for layer in self.cache:
            layer.select(rows)
        self._look_at_images(self._image_of_row[rows])

    def retain(self, live: Tensor) -> Tensor:
        """Go on with these rows, given in ascending order; returns them in the order in which they go on.

        The last take the places of those that ended, so that few are copied. What fills up to a multiple of four is
        whatever lies there.
        """
        num_live = len(live)
        is_last = live >= num_live
        is_free = torch.ones_like(live, dtype=torch.bool)
        is_free[live[~is_last]] = False
        sources, targets = live[is_last], is_free.nonzero()[:, 0]
        num_rows = num_live + -num_live % _ROWS_MULTIPLE
        for layer in self.cache:
            layer.move(sources, targets, num_rows)
        image_of_row = self._image_of_row[:num_rows].clone()
        image_of_row[targets] = self._image_of_row[sources]
        self._look_at_images(image_of_row)
        order = torch.arange(num_live, device=live.device)
        order[targets] = sources
        return order

    def _look_at_images(self, image_of_row: Tensor) -> None:
        """Each row's image from now on; those that no row looks at are let go once they are half of all."""
        images = image_of_row.unique()
        num_images = self.image[0][0].shape[0]
        if len(images) <= num_images // 2:  # copying the others is worth it
            self.image = [(key[images], value[images]) for key, value in self.image]
            image_of_row = torch.searchsorted(images, image_of_row)
            num_images = len(images)
        self._image_of_row = image_of_row
        self._layout = TextLayout(image_of_row, num_images=num_images, num_tokens=1)

    def append(self, tokens_R: Tensor) -> Tensor:
        """Read one more token of each row; next-token logits (R, V), float32, without the filling rows."""
        hidden_RTD = self._model.decoder(
            filled(tokens_R)[:, None], image=self.image, cache=self.cache, layout=self._layout
        )
        return self._logits(hidden_RTD[:, 0])[: len(tokens_R)]

    def _logits(self, hidden_RD: Tensor) -> Tensor:
        return self._model.head(filled(hidden_RD)[:, None])[: len(hidden_RD), 0].float()


def filled(rows: Tensor) -> Tensor:
    """Rows, the last repeated up to a multiple of four."""
    missing = -len(rows) % _ROWS_MULTIPLE
    return torch.cat([rows, rows[-1:].expand(missing, *rows.shape[1:])]) if missing else rows
