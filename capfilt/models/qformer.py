"""Q-Former, BLIP-2's bridge between a frozen image encoder and language (BLIP-2 §3.1, Figure 2).

In: image features and token ids. Out: query outputs and text features.

- BERT's layers; self-attention is shared by queries and text, the feed-forward is not
- queries attend to the image in every second layer, text never does
- three masks, each a method of its own: unimodal (`encode_queries`, `encode_text`), bidirectional
  (`encode_pairs`), multimodal causal (`decode_text`)
- what a mask makes equal is computed once: queries see only queries under the unimodal and the causal mask,
  so `decode_text` takes their keys and values from `encode_queries`; an image's cross-attention keys and
  values serve every pass over it

Legend: B images or pairs, Q queries, P patches, T tokens, D width, H heads, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from capfilt.models.med import Attention, FeedForward, KeyValue
from capfilt.models.text_layout import TextLayout

ImageKeyValues = list[KeyValue | None]
"""Cross-attention keys and values of images, one entry per layer; None where a layer has none."""


@dataclass(frozen=True, kw_only=True)
class QFormerConfig:
    """Sizes of a Q-Former; the defaults are BLIP-2's (188M parameters with a ViT-g and the text side)."""

    num_queries: int = 32
    """Query tokens (BLIP-2 §3.1: 32)."""
    width: int = 768
    """Width of queries and text."""
    depth: int = 12
    """Number of layers."""
    num_heads: int = 12
    """Attention heads."""
    mlp_width: int = 3072
    """Inner width of both feed-forwards."""
    vision_width: int = 1408
    """Width of the image features (ViT-g: 1408, ViT-L: 1024)."""
    cross_attention_every: int = 2
    """Layers 0, n, 2n, … attend to the image."""
    with_text: bool = True
    """Keep the text side: needed in stage 1, dropped in stage 2."""
    vocab_size: int = 30523
    """Tokens: BERT's and [DEC]."""
    max_positions: int = 512
    """Longest text in tokens."""
    layer_norm_eps: float = 1e-12
    """Added to the variance in every layer norm."""
    dropout: float = 0.1
    """Dropout while training, after embeddings, attention and feed-forward; BERT's on the attention weights
    is left out, so that the fused kernels can be used."""
    pad_token_id: int = 0
    """[PAD]."""

    def __post_init__(self) -> None:
        if self.width % self.num_heads:
            raise ValueError(f"width {self.width} is no multiple of num_heads {self.num_heads}")

    def attends_to_image(self, layer: int) -> bool:
        return layer % self.cross_attention_every == 0


class QFormerLayer(nn.Module):
    """Post-norm layer over queries and text side by side, queries first."""

    def __init__(self, config: QFormerConfig, index: int) -> None:
        super().__init__()
        width, eps = config.width, config.layer_norm_eps
        self.self_attention = Attention(width, config.num_heads, width)
        self.self_norm = nn.LayerNorm(width, eps=eps)
        self.cross_attention: Attention | None = None
        if config.attends_to_image(index):
            self.cross_attention = Attention(width, config.num_heads, config.vision_width)
            self.cross_norm = nn.LayerNorm(width, eps=eps)
        self.query_feed_forward = FeedForward(width, config.mlp_width)
        self.query_norm = nn.LayerNorm(width, eps=eps)
        if config.with_text:
            self.text_feed_forward = FeedForward(width, config.mlp_width)
            self.text_norm = nn.LayerNorm(width, eps=eps)
        self.dropout = nn.Dropout(config.dropout)

    def attend(self, hidden_BSD: Tensor, key_value: KeyValue, mask: Tensor | None) -> Tensor:
        """Self-attention with its residual and norm; mask is True where attended."""
        return self.self_norm(hidden_BSD + self.dropout(self.self_attention(hidden_BSD, key_value, mask)))

    def finish_queries(self, queries_BQD: Tensor, image: KeyValue | None, layout: TextLayout | None = None) -> Tensor:
        """Cross-attention, if this layer has it, and the queries' feed-forward."""
        if self.cross_attention is not None:
            assert image is not None, "the layer attends to the image"
            attended = self.cross_attention(queries_BQD, image, layout=layout)
            queries_BQD = self.cross_norm(queries_BQD + self.dropout(attended))
        return self.query_norm(queries_BQD + self.dropout(self.query_feed_forward(queries_BQD)))

    def finish_text(self, text_BTD: Tensor) -> Tensor:
        """The text's feed-forward."""
        return self.text_norm(text_BTD + self.dropout(self.text_feed_forward(text_BTD)))


class QFormer(nn.Module):
    """Querying Transformer; see the module's docstring for what each method computes."""

    def __init__(self, config: QFormerConfig) -> None:
        super().__init__()
        self.config = config
        self.query_tokens = nn.Parameter(torch.zeros(1, config.num_queries, config.width))
        if config.with_text:
            self.word_embedding = nn.Embedding(config.vocab_size, config.width)
            self.position_embedding = nn.Embedding(config.max_positions, config.width)
        self.embedding_norm = nn.LayerNorm(config.width, eps=config.layer_norm_eps)
        self.layers = nn.ModuleList(QFormerLayer(config, index) for index in range(config.depth))
        self.dropout = nn.Dropout(config.dropout)
        self.apply(_initialise)
        nn.init.normal_(self.query_tokens, std=0.02)

    def image_key_values(self, features_BPD: Tensor) -> ImageKeyValues:
        """Cross-attention keys and values of images, shared by every pass over them."""
        attentions = [layer.cross_attention for layer in self._layers()]
        return [None if a is None else a.key_value(features_BPD) for a in attentions]

    def encode_queries(self, image: ImageKeyValues) -> tuple[Tensor, list[KeyValue]]:
        """Unimodal mask, image side.

        Returns:
            Query outputs (B, Q, D), and each layer's self-attention keys and values for `decode_text`.
        """
        hidden, key_values = self._embed_queries(_batch_size(image)), []
        for layer, image_layer in zip(self._layers(), image, strict=True):
            key_values.append(layer.self_attention.key_value(hidden))
            hidden = layer.finish_queries(layer.attend(hidden, key_values[-1], None), image_layer)
        return hidden, key_values

    def encode_text(self, tokens_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """Unimodal mask, text side: (B, T) token ids, [CLS] first, and their mask → (B, T, D)."""
        hidden, mask = self._embed_text(tokens_BT), mask_BT[:, None, None, :].bool()
        for layer in self._layers():
            hidden = layer.finish_text(layer.attend(hidden, layer.self_attention.key_value(hidden), mask))
        return hidden

    def encode_pairs(
        self, image: ImageKeyValues, tokens_BT: Tensor, mask_BT: Tensor, *, layout: TextLayout | None = None
    ) -> Tensor:
        """Bidirectional mask: queries and text see each other → query outputs (B, Q, D).

        The text's features after the last layer serve nothing and are not computed. `layout`, of rows of Q tokens,
        says whose each text is where several share an image; without one there is an image for each text.
        """
        num_queries = self.config.num_queries
        hidden = torch.cat([self._embed_queries(len(tokens_BT)), self._embed_text(tokens_BT)], dim=1)
        query_mask = mask_BT.new_ones(len(mask_BT), num_queries)
        mask = torch.cat([query_mask, mask_BT], dim=1)[:, None, None, :].bool()
        layers = self._layers()
        for layer, image_layer in zip(layers[:-1], image[:-1], strict=True):
            hidden = layer.attend(hidden, layer.self_attention.key_value(hidden), mask)
            queries = layer.finish_queries(hidden[:, :num_queries], image_layer, layout)
            hidden = torch.cat([queries, layer.finish_text(hidden[:, num_queries:])], dim=1)
        key_value = layers[-1].self_attention.key_value(hidden)
        queries = layers[-1].attend(hidden[:, :num_queries], key_value, mask)
        return layers[-1].finish_queries(queries, image[-1], layout)

    def decode_text(self, tokens_BT: Tensor, query_key_values: Sequence[KeyValue]) -> Tensor:
        """Multimodal causal mask: a token sees all queries and the text up to itself → (B, T, D).

        Padding comes last, so no token sees it; what padding itself yields is to be left out of the loss.
        """
        hidden, num_tokens = self._embed_text(tokens_BT), tokens_BT.shape[1]
        causal = torch.ones(num_tokens, num_tokens, dtype=torch.bool, device=tokens_BT.device).tril()
        mask = torch.cat([causal.new_ones(num_tokens, self.config.num_queries), causal], dim=1)
        for layer, past in zip(self._layers(), query_key_values, strict=True):
            own = layer.self_attention.key_value(hidden)
            joined = (torch.cat([past[0], own[0]], dim=2), torch.cat([past[1], own[1]], dim=2))
            hidden = layer.finish_text(layer.attend(hidden, joined, mask))
        return hidden

    def _layers(self) -> list[QFormerLayer]:
        return list(self.layers)  # pyright: ignore[reportReturnType]

    def _embed_queries(self, batch_size: int) -> Tensor:
        return self.dropout(self.embedding_norm(self.query_tokens).expand(batch_size, -1, -1))

    def _embed_text(self, tokens_BT: Tensor) -> Tensor:
        """Positions count from the first token, whatever stands before it."""
        positions = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
        embedded = self.word_embedding(tokens_BT) + self.position_embedding(positions)
        return self.dropout(self.embedding_norm(embedded))


def select_images(image: ImageKeyValues, rows: Tensor) -> ImageKeyValues:
    """The keys and values of the given images, in this order, repeated where a row repeats."""
    return [None if kv is None else (kv[0][rows], kv[1][rows]) for kv in image]


def join_images(first: ImageKeyValues, second: ImageKeyValues) -> ImageKeyValues:
    """The keys and values of both, one after the other."""
    return [
        None if a is None or b is None else (torch.cat([a[0], b[0]]), torch.cat([a[1], b[1]]))
        for a, b in zip(first, second, strict=True)
    ]


def _batch_size(image: ImageKeyValues) -> int:
    first = image[0]
    assert first is not None, "layer 0 always attends to the image"
    return first[0].shape[0]


def _initialise(module: nn.Module) -> None:
    """BERT's initialisation: normal weights of std 0.02, zero biases."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
