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

from capfilt.models.attention import KeyValue
from capfilt.models.layer_cache import LayerCache, StaticLayerCache
from capfilt.models.med import Captioner
from capfilt.models.rows import Rows


class DecodingStep:
    """One token for B·N rows, in buffers of its own; captured as a CUDA graph when it first runs on a GPU.

    Fewer images than B leave slots idle.
    """

    def __init__(self, model: Captioner, image: Sequence[KeyValue], num_texts: int, max_length: int) -> None:
        config, like = model.decoder.config, model.decoder.word_embedding.weight
        num_rows = image[0][0].shape[0] * num_texts
        self._model, self._num_texts = model, num_texts
        self._image = [(torch.zeros_like(key), torch.zeros_like(value)) for key, value in image]
        self._places_L = torch.arange(max_length, device=like.device)
        self._position_1 = self._places_L.new_zeros(1)
        shape = model.decoder.cache_shape(num_rows, max_length)
        self.cache = [StaticLayerCache(shape, like, self._position_1) for _ in model.decoder.layers]
        self._tokens_R = self._places_L.new_zeros(num_rows)
        self.logits_RV = torch.zeros(num_rows, config.vocab_size, device=like.device)
        self._graph: torch.cuda.CUDAGraph | None = None

    def start(self, image: Sequence[KeyValue], prompt_cache: Sequence[LayerCache]) -> None:
        """Begin with at most B images and the cache of their prompt, an entry per image in both."""
        num_images, length = image[0][0].shape[0], prompt_cache[0].length
        for mine, given in zip(self._image, image, strict=True):
            mine[0][:num_images] = given[0]
            mine[1][:num_images] = given[1]
        for layer, given in zip(self.cache, prompt_cache, strict=True):
            for mine, own in ((layer.key, given.key), (layer.value, given.value)):
                # What is masked must be finite all the same: nought times infinity is not nought.
                mine.zero_()
                mine[: num_images * self._num_texts, :, :length] = own[:, :, :length].repeat_interleave(
                    self._num_texts, 0
                )
        self._position_1.fill_(length)

    def run(self, slots: Tensor, tokens: Tensor) -> Tensor:
        """Next-token logits (., V) of the rows `slots` after one more token of each, float32."""
        self._tokens_R[slots] = tokens
        if self._tokens_R.device.type == "cuda":
            with torch.cuda.device(self._tokens_R.device):
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
            self._tokens_R[:, None], mask_BT=written_1L, image=self._image, cache=self.cache
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
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads may go on using the GPU
            self.compute()
        return graph


class DecodingSteps:
    """The step of one captioner: its buffers, and on a GPU its graph, serve batch after batch."""

    def __init__(self, model: Captioner) -> None:
        self._model = model
        self._shape: tuple[int, ...] = ()
        self.step: DecodingStep | None = None

    def find(self, image: Sequence[KeyValue], num_texts: int, max_length: int) -> DecodingStep:
        """The step for as many images as `image` has, or more of the same sizes; else a new one in its place."""
        num_images, *sizes = image[0][0].shape
        shape = (num_images, *sizes, num_texts, max_length)
        if self.step is None or self._shape[0] < num_images or self._shape[1:] != shape[1:]:
            self.clear()
            self.step, self._shape = DecodingStep(self._model, image, num_texts, max_length), shape
        return self.step

    def clear(self) -> None:
        """Let go of the buffers."""
        self.step, self._shape = None, ()


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

    def retain(self, live: Tensor) -> Tensor:
        """Go on with these of the rows, each at most once, in the order given."""
        self._slots = self._slots[live]
        return live

    def append(self, tokens_R: Tensor) -> Tensor:
        """Read one more token of each row; next-token logits (R, V), float32."""
        return self._step.run(self._slots, tokens_R)
