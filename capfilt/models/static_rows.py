"""Rows of text whose shapes stay the same from the first token to the last, so that a GPU's step is one CUDA graph.

In and out as `models.rows`: image features and a prompt, then a token a row; next-token logits. A GPU's step is bound
by the launches of its some hundred kernels; a graph launches them at once. What has ended is computed on and not
looked at. Elsewhere than on a GPU the same steps run one kernel after another.

Logits are those of `models.rows` up to rounding, which here may depend on the shape of the batch.

Legend: B images, N texts per image, R = B·N rows of text, V vocabulary, P image features, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from capfilt.models.med import Captioner, KeyValue, LayerCache, StaticLayerCache
from capfilt.models.rows import Rows

_SHAPES_KEPT = 2
"""A full batch, and the rest at the end of a shard."""


class DecodingStep:
    """One token for B·N rows, in buffers of its own; captured as a CUDA graph when it first runs on a GPU."""

    def __init__(self, model: Captioner, image: Sequence[KeyValue], num_texts: int, max_length: int) -> None:
        config, like = model.decoder.config, model.decoder.word_embedding.weight
        num_rows = image[0][0].shape[0] * num_texts
        self._model = model
        self._image = [(torch.empty_like(key), torch.empty_like(value)) for key, value in image]
        self._places_L = torch.arange(max_length, device=like.device)
        self._position_1 = self._places_L.new_zeros(1)
        self._cache = [
            StaticLayerCache(num_rows, config, max_length, like, self._position_1) for _ in model.decoder.layers
        ]
        self._tokens_R = self._places_L.new_zeros(num_rows)
        self.logits_RV = torch.zeros(num_rows, config.vocab_size, device=like.device)
        self._graph: torch.cuda.CUDAGraph | None = None

    def start(self, image: Sequence[KeyValue], prompt_cache: Sequence[LayerCache]) -> None:
        """Begin with images and the cache of their prompt, an entry per image in both."""
        for mine, given in zip(self._image, image, strict=True):
            mine[0].copy_(given[0])
            mine[1].copy_(given[1])
        length = prompt_cache[0].length
        for layer, given in zip(self._cache, prompt_cache, strict=True):
            num_texts = len(layer.key) // len(given.key)
            layer.key[:, :, :length] = given.key[:, :, :length].repeat_interleave(num_texts, 0)
            layer.value[:, :, :length] = given.value[:, :, :length].repeat_interleave(num_texts, 0)
        self._position_1.fill_(length)

    def run(self, slots: Tensor, tokens: Tensor) -> Tensor:
        """Next-token logits (., V) of the rows `slots` after one more token of each, float32."""
        self._tokens_R[slots] = tokens
        if self._tokens_R.device.type == "cuda":
            if self._graph is None:
                self._graph = self._capture()
            self._graph.replay()
        else:
            self.compute()
        self._position_1 += 1
        return self.logits_RV[slots]

    def compute(self) -> None:
        """The kernels of a step, all of them on the buffers."""
        written_1L = (self._places_L <= self._position_1)[None]
        hidden_R1D = self._model.decoder(
            self._tokens_R[:, None], mask_BT=written_1L, image=self._image, cache=self._cache
        )
        self.logits_RV.copy_(self._model.head(hidden_R1D)[:, 0])

    def _capture(self) -> torch.cuda.CUDAGraph:
        """Warm up beside the current stream, as CUDA graphs want it, then record; neither moves the position."""
        beside = torch.cuda.Stream()
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            self.compute()
        torch.cuda.current_stream().wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.compute()
        return graph


class DecodingSteps:
    """The steps of one captioner, by shape: their buffers, and on a GPU their graphs, serve batch after batch."""

    def __init__(self, model: Captioner) -> None:
        self._model = model
        self._by_shape: dict[tuple[int, ...], DecodingStep] = {}

    def find(self, image: Sequence[KeyValue], num_texts: int, max_length: int) -> DecodingStep:
        """The step for as many images as `image` has; the shape that was not asked for longest gives way."""
        shape = (*image[0][0].shape, num_texts, max_length)
        step = self._by_shape.pop(shape, None)
        if step is None:
            if len(self._by_shape) == _SHAPES_KEPT:
                self._by_shape.pop(next(iter(self._by_shape)))
            step = DecodingStep(self._model, image, num_texts, max_length)
        self._by_shape[shape] = step
        return step


class StaticRows:
    """`models.rows.Rows` on a `DecodingStep`: rows that are dropped are no longer looked at."""

    def __init__(
        self, model: Captioner, features_BPD: Tensor, prompt: Sequence[int], max_length: int, steps: DecodingSteps
    ) -> None:
        self._first = Rows(model, features_BPD, prompt, max_length)  # reads the prompt
        self._steps, self._max_length = steps, max_length
        self.logits_BV = self._first.logits_BV

    def repeat(self, num_texts: int) -> None:
        """Go on with `num_texts` rows of each image."""
        image = self._first.image
        self._step = self._steps.find(image, num_texts, self._max_length)
        self._step.start(image, self._first.cache)
        self._slots = torch.arange(len(self.logits_BV) * num_texts, device=self.logits_BV.device)
        del self._first

    def keep(self, rows: Tensor) -> None:
        """Go on with these of the rows, each at most once."""
        self._slots = self._slots[rows]

    def append(self, tokens_R: Tensor) -> Tensor:
        """Read one more token of each row; next-token logits (R, V), float32."""
        return self._step.run(self._slots, tokens_R)
