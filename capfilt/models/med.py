"""MED, BLIP's multimodal mixture of encoder-decoder (BLIP §3.1), built of BERT-like post-norm layers.

In: token ids and image features. Out: text features, next-token logits, ITM and ITC outputs.

- `TextTransformer` works as unimodal encoder (no image), image-grounded encoder (bidirectional,
  cross-attention) or image-grounded decoder (causal)
- several texts of one image share its cross-attention keys and values: the texts are laid out as one
  long query, so nothing of the image is copied per text; `TextLayout` says whose they are where images
  have different numbers of texts
- the decoder runs incrementally on a preallocated self-attention cache
- `tie_decoder` shares everything but self-attention between encoder and decoder (BLIP §3.2)

Legend: B images, N texts per image (rows of text = B·N, grouped by image), T tokens, S cached tokens,
P patches, D width, H heads, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from capfilt.models.attention import KeyValue, attend, gains_by_products
from capfilt.models.layer_cache import LayerCache, StaticLayerCache
from capfilt.models.packed import activated
from capfilt.models.text_layout import TextGroup, TextLayout
from capfilt.models.vit import VisionTransformer, ViTConfig, count_encoder_bytes, initialise


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """Sizes of BERT-like layers of text; the defaults are BERT-base."""

    vocab_size: int = 30522
    """Tokens."""
    width: int = 768
    """Width of a text feature."""
    depth: int = 12
    """Number of layers."""
    num_heads: int = 12
    """Attention heads."""
    mlp_width: int = 3072
    """Inner width of the feed-forward."""
    max_positions: int = 512
    """Longest text in tokens."""
    vision_width: int = 768
    """Width of the image features attended to."""
    layer_norm_eps: float = 1e-12
    """Added to the variance in every layer norm."""
    dropout: float = 0.0
    """Dropout after embeddings, attention outputs and feed-forwards while training (BERT: 0.1)."""
    pad_token_id: int = 0
    """[PAD]."""
    sep_token_id: int = 102
    """[SEP], the end of a text."""


@dataclass(frozen=True, kw_only=True)
class MEDConfig(TextConfig):
    """Sizes of MED's text side; the defaults are BLIP-base (BERT-base with two added tokens)."""

    vocab_size: int = 30524
    """Tokens, [DEC] and [ENC] included."""
    dec_token_id: int = 30522
    """[DEC], first token of a text to be decoded."""
    enc_token_id: int = 30523
    """[ENC], first token of a text in the image-grounded encoder."""


def count_image_bytes(vision: ViTConfig, config: MEDConfig, element_size: int) -> int:
    """Memory in bytes of one image: a block of its encoder, and its cross-attention keys and values of all layers.

    The latter twice: what is computed is copied into the buffers of `models.static_rows`, or being computed on.
    """
    key_value_bytes = 2 * config.depth * (vision.num_patches + 1) * config.width * element_size
    return count_encoder_bytes(vision, element_size) + 2 * key_value_bytes


def count_row_bytes(config: MEDConfig, max_length: int, element_size: int) -> int:
    """Memory in bytes of one text under way: its cache, and its logits with what sampling makes of them.

    Sampling works on a few candidates in float64, but on all tokens where neither top_k nor top_p leaves any out.
    """
    return 2 * config.depth * max_length * config.width * element_size + (4 * 4 + 3 * 8) * config.vocab_size


class Attention(nn.Module):
    """Multi-head attention whose keys and values can be computed once and used again."""

    def __init__(self, width: int, num_heads: int, source_width: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(source_width, width)
        self.value = nn.Linear(source_width, width)
        self.output = nn.Linear(width, width)

    def key_value(self, source_BSD: Tensor) -> KeyValue:
        """Keys and values of the attended sequence, each (B, H, S, D / H)."""
        return self._split(self.key(source_BSD)), self._split(self.value(source_BSD))

    def forward(
        self,
        hidden_BTD: Tensor,
        key_value: KeyValue,
        mask: Tensor | None = None,
        *,
        is_causal: bool = False,
        layout: TextLayout | None = None,
    ) -> Tensor:
        """Attend from (B, T, D) to the keys and values; mask is boolean, True where attended.

        With a layout, hidden has a row per text and the keys and values an entry per image.
        """
        query_BTD = self.query(hidden_BTD)
        if layout is not None:
            query_BTD = layout.by_image(query_BTD)
        query_BHTd = self._split(query_BTD)
        if query_BHTd.shape[2] == 1 and mask is None and query_BHTd.device.type == "cpu":
            attended = _attend_once(query_BHTd, *key_value)
        elif mask is None and not is_causal:
            attended = attend(query_BHTd, *key_value)
        else:
            attended = F.scaled_dot_product_attention(query_BHTd, *key_value, attn_mask=mask, is_causal=is_causal)
        attended_BTD = attended.transpose(1, 2).flatten(2)
        if layout is not None:
            attended_BTD = layout.by_row(attended_BTD)
        return self.output(attended_BTD)

    def _split(self, hidden_BTD: Tensor) -> Tensor:
        return hidden_BTD.unflatten(2, (self.num_heads, -1)).transpose(1, 2)


def _attend_once(query_BH1d: Tensor, key_BHSd: Tensor, value_BHSd: Tensor) -> Tensor:
    """Attention of one query, as plain products and sums.

    As fast as torch's at these sizes, and its rounding does not depend on the other rows of the batch.
    """
    scores_BHS = (query_BH1d * key_BHSd).sum(-1) * query_BH1d.shape[-1] ** -0.5
    return (scores_BHS.softmax(-1).unsqueeze(-1) * value_BHSd).sum(2, keepdim=True)


class FeedForward(nn.Module):
    """Two linear maps with exact GELU between them."""

    def __init__(self, width: int, mlp_width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, mlp_width)
        self.fc2 = nn.Linear(mlp_width, width)

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        """(B, T, D) → (B, T, D)."""
        return self.fc2(activated(self.fc1, hidden_BTD))


class TextLayer(nn.Module):
    """Post-norm layer: self-attention, cross-attention to the image if there is one, feed-forward.

    A layer that is made not to attend to images has no weights for it, and must be given none.
    """

    def __init__(self, config: TextConfig, *, attends_to_image: bool = True) -> None:
        super().__init__()
        eps = config.layer_norm_eps
        self.self_attention = Attention(config.width, config.num_heads, config.width)
        self.self_norm = nn.LayerNorm(config.width, eps=eps)
        if attends_to_image:
            self.cross_attention = Attention(config.width, config.num_heads, config.vision_width)
            self.cross_norm = nn.LayerNorm(config.width, eps=eps)
        self.feed_forward = FeedForward(config.width, config.mlp_width)
        self.norm = nn.LayerNorm(config.width, eps=eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        hidden_BTD: Tensor,
        mask: Tensor | None,
        image: KeyValue | None,
        cache: LayerCache | StaticLayerCache | None,
        *,
        is_causal: bool,
        layout: TextLayout | None = None,
    ) -> Tensor:
        """(B·N, T, D) → (B·N, T, D); `image` has B entries, each shared by N rows of text, or as laid out."""
        key_value = self.self_attention.key_value(hidden_BTD)
        if cache is not None:
            key_value = cache.append(key_value)
        attended = self.self_attention(hidden_BTD, key_value, mask, is_causal=is_causal)
        hidden_BTD = self.self_norm(hidden_BTD + self.dropout(attended))
        if image is not None:
            hidden_BTD = self.cross_norm(hidden_BTD + self.dropout(self._attend_to_image(hidden_BTD, image, layout)))
        return self.norm(hidden_BTD + self.dropout(self.feed_forward(hidden_BTD)))

    def image_key_value(self, features_BPD: Tensor) -> KeyValue:
        """Cross-attention keys and values of images, as attention reads them best."""
        key, value = self.cross_attention.key_value(features_BPD)
        return (key.contiguous(), value.contiguous()) if gains_by_products(features_BPD) else (key, value)

    def _attend_to_image(self, hidden_BTD: Tensor, image: KeyValue, layout: TextLayout | None) -> Tensor:
        if layout is not None:
            return self.cross_attention(hidden_BTD, image, layout=layout)
        num_images = image[0].shape[0]
        query = hidden_BTD.reshape(num_images, -1, hidden_BTD.shape[2])
        return self.cross_attention(query, image).view_as(hidden_BTD)


class TextTransformer(nn.Module):
    """Text encoder or decoder of MED."""

    def __init__(self, config: MEDConfig, *, causal: bool) -> None:
        super().__init__()
        self.config = config
        self.causal = causal
        self.word_embedding = nn.Embedding(config.vocab_size, config.width)
        self.position_embedding = nn.Embedding(config.max_positions, config.width)
        self.embedding_norm = nn.LayerNorm(config.width, eps=config.layer_norm_eps)
        self.layers = nn.ModuleList(TextLayer(config) for _ in range(config.depth))
        self.dropout = nn.Dropout(config.dropout)
        initialise(self, config.width)

    def image_key_values(self, features_BPD: Tensor) -> list[KeyValue]:
        """Cross-attention keys and values of images, one pair per layer, to be shared by their texts."""
        return [cast(TextLayer, layer).image_key_value(features_BPD) for layer in self.layers]

    def new_cache(self, rows: int, max_length: int) -> list[LayerCache]:
        """An empty self-attention cache for `rows` texts of at most `max_length` tokens."""
        shape, like = self.cache_shape(rows, max_length), self.word_embedding.weight
        return [LayerCache(shape, like) for _ in self.layers]

    def cache_shape(self, rows: int, max_length: int) -> tuple[int, ...]:
        """Of a layer's keys, and of its values: (rows, H, max_length, d)."""
        return rows, self.config.num_heads, max_length, self.config.width // self.config.num_heads

    def forward(
        self,
        tokens_BT: Tensor,
        *,
        mask_BT: Tensor | None = None,
        image: list[KeyValue] | None = None,
        cache: Sequence[LayerCache] | Sequence[StaticLayerCache] | None = None,
        layout: TextLayout | None = None,
    ) -> Tensor:
        """Encode texts.

        Args:
            tokens_BT: (B·N, T) token ids; with a cache, only the tokens that follow the cached ones.
            mask_BT: (B·N, T) boolean, True at tokens, False at padding; not for the decoder, whose padding
                comes last and is never attended to, but (1, max_length) with a static cache: True where written.
            image: from `image_key_values`, B entries; None for the unimodal encoder.
            cache: from `new_cache`; is extended.
            layout: whose text each row is; None where every image has the same number, in order.

        Returns:
            (B·N, T, D) text features.
        """
        num_tokens = tokens_BT.shape[1]
        is_causal = self.causal and num_tokens > 1
        positions = cache[0].next_positions(num_tokens) if cache else torch.arange(num_tokens, device=tokens_BT.device)
        hidden_BTD = self._embed(tokens_BT, positions)
        mask = None if mask_BT is None else mask_BT[:, None, None, :].bool()
        for index, layer in enumerate(self.layers):
            hidden_BTD = layer(
                hidden_BTD,
                mask,
                None if image is None else image[index],
                None if cache is None else cache[index],
                is_causal=is_causal,
                layout=layout,
            )
        return hidden_BTD

    def forward_groups(self, features_BPD: Tensor, groups: Sequence[TextGroup]) -> list[Tensor]:
        """Encode several groups of texts of the same images: (R, T, D) of each.

        The same as `forward` with each group, but layer by layer: the images' keys and values are held for one layer
        at a time, where those of all layers take more memory than anything else in the pass.
        """
        positions = torch.arange(self.config.max_positions, device=features_BPD.device)
        hidden = [self._embed(group.tokens, positions[: group.tokens.shape[1]]) for group in groups]
        masks = [group.mask[:, None, None, :].bool() for group in groups]
        for layer in self.layers:
            image = cast(TextLayer, layer).image_key_value(features_BPD)
            hidden = [
                layer(states_RTD, mask, image, None, is_causal=False, layout=group.layout)
                for states_RTD, mask, group in zip(hidden, masks, groups, strict=True)
            ]
        return hidden

    def _embed(self, tokens_BT: Tensor, positions_T: Tensor) -> Tensor:
        hidden_BTD = self.word_embedding(tokens_BT) + self.position_embedding(positions_T)
        return self.dropout(self.embedding_norm(hidden_BTD))


class LanguageModelHead(nn.Module):
    """Text features to next-token logits; the last matrix is the word embedding (BERT's MLM head)."""

    def __init__(self, config: TextConfig, word_embedding: nn.Embedding) -> None:
        super().__init__()
        self.transform = nn.Linear(config.width, config.width)
        self.norm = nn.LayerNorm(config.width, eps=config.layer_norm_eps)
        self.vocabulary = nn.Linear(config.width, config.vocab_size)
        initialise(self, config.width)
        self.vocabulary.weight = word_embedding.weight

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        """(B, T, D) → (B, T, V)."""
        return self.vocabulary(self.norm(activated(self.transform, hidden_BTD)))


class Captioner(nn.Module):
    """BLIP captioner: image encoder and image-grounded text decoder with its language model head."""

    def __init__(self, vision: VisionTransformer, config: MEDConfig) -> None:
        super().__init__()
        self.vision = vision
        self.decoder = TextTransformer(config, causal=True)
        self.head = LanguageModelHead(config, self.decoder.word_embedding)

    def forward(self, images_BCHW: Tensor, tokens_BT: Tensor) -> Tensor:
        """Next-token logits (B·N, T, V) of texts given their images, teacher-forced."""
        image = self.decoder.image_key_values(self.vision(images_BCHW))
        return self.head(self.decoder(tokens_BT, image=image))


class Filter(nn.Module):
    """BLIP filter: image encoder, text encoder, ITC projections and the ITM head."""

    def __init__(self, vision: VisionTransformer, config: MEDConfig, *, embed_dim: int = 256) -> None:
        super().__init__()
        self.vision = vision
        self.encoder = TextTransformer(config, causal=False)
        self.vision_projection = nn.Linear(config.vision_width, embed_dim)
        self.text_projection = nn.Linear(config.width, embed_dim)
        self.itm_head = nn.Linear(config.width, 2)
        for projection in (self.vision_projection, self.text_projection, self.itm_head):
            initialise(projection, config.width)

    def itm_logits(self, features_BPD: Tensor, tokens_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """ITM logits (B·N, 2) of texts given image features (B, P, D); index 1 is "match".

        The first token must be [ENC], as in training; transformers' BlipForImageTextRetrieval feeds [CLS].
        """
        image = self.encoder.image_key_values(features_BPD)
        return self.itm_head(self.encoder(tokens_BT, mask_BT=mask_BT, image=image)[:, 0])

    def embed_images(self, features_BPD: Tensor) -> Tensor:
        """ITC embeddings (B, E) of unit length from image features."""
        return F.normalize(self.vision_projection(features_BPD[:, 0]), dim=-1)

    def embed_texts(self, tokens_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """ITC embeddings (B, E) of unit length; the first token is [CLS]."""
        return F.normalize(self.text_projection(self.encoder(tokens_BT, mask_BT=mask_BT)[:, 0]), dim=-1)


def tie_decoder(decoder: TextTransformer, encoder: TextTransformer) -> None:
    """Share embeddings, cross-attention and feed-forward of the encoder with the decoder (BLIP §3.2).

    Self-attention stays apart: the encoder's looks both ways, the decoder's backwards. The layer norm
    that closes self-attention belongs to it.
    """
    decoder.word_embedding = encoder.word_embedding
    decoder.position_embedding = encoder.position_embedding
    decoder.embedding_norm = encoder.embedding_norm
    for ours, theirs in zip(decoder.layers, encoder.layers, strict=True):
        ours.cross_attention, ours.cross_norm = theirs.cross_attention, theirs.cross_norm
        ours.feed_forward, ours.norm = theirs.feed_forward, theirs.norm
