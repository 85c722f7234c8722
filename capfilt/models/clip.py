"""CLIP's two towers for scoring (Radford et al. 2021): images and texts to embeddings of unit length.

In: normalised images, and texts as token ids. Out: embeddings whose products are CLIP scores.

- the text tower looks backwards only, so what follows a text's end changes nothing: texts are not padded. They
  are laid end to end for all linear maps, and attend in groups of equal length.
- on a CPU an embedding does not depend on its neighbours in the batch, to the bit, once the linear layers are
  packed (`capfilt.models.packed`)

Legend: B images, P patches, N texts, T tokens, S tokens of all texts, D width, E embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from capfilt.models.packed import Activation
from capfilt.models.rows import filled
from capfilt.models.vit import Block, VisionTransformer, ViTConfig, attend_backwards

_TOKENS_MULTIPLE = 8
"""Texts are padded to it for attention: at other lengths its buffers are not aligned, and on some CPUs rounding then
depends on a text's place in the batch."""


@dataclass(frozen=True, kw_only=True)
class ClipTextConfig:
    """Sizes of CLIP's text tower; the defaults are ViT-L/14's."""

    vocab_size: int = 49408
    """Tokens, those of beginning and end included."""
    max_positions: int = 77
    """Longest text in tokens."""
    width: int = 768
    """Width of a text feature."""
    depth: int = 12
    """Number of blocks."""
    num_heads: int = 12
    """Attention heads."""
    mlp_width: int = 3072
    """Inner width of the feed-forward."""
    layer_norm_eps: float = 1e-5
    """Added to the variance in every layer norm."""
    activation: Activation = "silu"
    """Of the feed-forwards."""


class ClipTextEncoder(nn.Module):
    """Causal text encoder; a text's feature is that of its last token."""

    def __init__(self, config: ClipTextConfig) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.width)
        self.position_embedding = nn.Parameter(torch.zeros(config.max_positions, config.width))
        self.blocks = nn.ModuleList(
            Block(
                config.width, config.num_heads, config.mlp_width, layer_norm_eps=config.layer_norm_eps,
                activation=config.activation,
            )
            for _ in range(config.depth)
        )  # fmt: skip
        self.norm = nn.LayerNorm(config.width, eps=config.layer_norm_eps)

    def forward(self, texts: Sequence[Sequence[int]]) -> Tensor:
        """N texts, at least one, each of one to `max_positions` token ids → (N, D)."""
        order = sorted(range(len(texts)), key=lambda number: len(texts[number]))
        lengths = [len(texts[number]) for number in order]
        device = self.position_embedding.device
        tokens_S = torch.tensor([token for number in order for token in texts[number]], device=device)
        positions_S = torch.cat([torch.arange(length, device=device) for length in lengths])
        groups = [(length, len(list(same))) for length, same in groupby(lengths)]
        hidden_SD = self.token_embedding(tokens_S) + self.position_embedding[positions_S]
        for block in self.blocks:
            hidden_SD = block(hidden_SD, lambda states_SE, num_heads: _attend_in_groups(states_SE, num_heads, groups))
        last_N = torch.tensor(lengths, device=device).cumsum(0) - 1
        place_N = torch.empty(len(order), dtype=torch.long, device=device)
        place_N[torch.tensor(order, device=device)] = torch.arange(len(order), device=device)
        return self.norm(hidden_SD[last_N[place_N]])


def _attend_in_groups(states_SE: Tensor, num_heads: int, groups: Sequence[tuple[int, int]]) -> Tensor:
    """Causal attention inside each text: (S, 3D) → (S, D); `groups` are (tokens, texts) one after another."""
    parts = states_SE.split([length * count for length, count in groups])
    return torch.cat([
        _attend_in_texts(part.unflatten(0, (count, length)), num_heads).flatten(0, 1)
        for part, (length, count) in zip(parts, groups, strict=True)
    ])  # fmt: skip


def _attend_in_texts(states_NTE: Tensor, num_heads: int) -> Tensor:
    """Causal attention in texts of one length: (N, T, 3D) → (N, T, D)."""
    length = states_NTE.shape[1]
    padded = F.pad(states_NTE, (0, 0, 0, -length % _TOKENS_MULTIPLE))
    return attend_backwards(padded, num_heads)[:, :length]


class ClipImageTower(nn.Module):
    """Image encoder and its projection into the common space."""

    def __init__(self, config: ViTConfig, embed_dim: int) -> None:
        super().__init__()
        self.vision = VisionTransformer(config)
        self.projection = nn.Linear(config.width, embed_dim, bias=False)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """(B, 3, H, W) normalised → (B, E) of unit length."""
        return _project(self.projection, self.vision(images_BCHW)[:, 0])


class ClipTextTower(nn.Module):
    """Text encoder and its projection into the common space."""

    def __init__(self, config: ClipTextConfig, embed_dim: int) -> None:
        super().__init__()
        self.text = ClipTextEncoder(config)
        self.projection = nn.Linear(config.width, embed_dim, bias=False)

    def forward(self, texts: Sequence[Sequence[int]]) -> Tensor:
        """N texts as token ids, their first and last tokens included → (N, E) of unit length."""
        return _project(self.projection, self.text(texts))


def _project(projection: nn.Module, features_ND: Tensor) -> Tensor:
    return F.normalize(projection(filled(features_ND))[: len(features_ND)], dim=-1)
