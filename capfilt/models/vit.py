"""Vision Transformer, the image encoder of BLIP (BLIP §3.1; Dosovitskiy et al. 2021) and of CLIP.

In: images, float, normalised. Out: one feature per patch, the [CLS] feature first.

- a strided convolution cuts and embeds the patches; learned positions
- pre-norm blocks: attention with one fused query-key-value matrix, then a feed-forward
- a last layer norm; CLIP has one before the blocks too
- `change_image_size` makes it take larger or smaller images than it was trained on

Legend: B batch, C channels, P patches, D width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from capfilt.models.attention import attend
from capfilt.models.packed import Activation, activated


@dataclass(frozen=True, kw_only=True)
class ViTConfig:
    """Sizes of a Vision Transformer; the defaults are BLIP-base at fine-tuning resolution."""

    image_size_px: int = 384
    """Height and width of the square input."""
    patch_size_px: int = 16
    """Height and width of a patch."""
    width: int = 768
    """Width of a feature."""
    depth: int = 12
    """Number of blocks."""
    num_heads: int = 12
    """Attention heads."""
    mlp_width: int = 3072
    """Inner width of the feed-forward."""
    layer_norm_eps: float = 1e-6
    """Added to the variance in every layer norm."""
    activation: Activation = "gelu"
    """Of the feed-forwards."""
    norm_first: bool = False
    """A layer norm before the first block, as CLIP has it."""

    def __post_init__(self) -> None:
        if self.image_size_px % self.patch_size_px:
            raise ValueError(f"image_size_px {self.image_size_px} is no multiple of patch {self.patch_size_px}")
        if self.width % self.num_heads:
            raise ValueError(f"width {self.width} is no multiple of num_heads {self.num_heads}")

    @property
    def num_patches(self) -> int:
        """Patches of one image, the [CLS] feature not counted."""
        return (self.image_size_px // self.patch_size_px) ** 2


def count_encoder_bytes(config: ViTConfig, element_size: int) -> int:
    """Memory in bytes that one image takes in a block at most: its features, what attention and feed-forward add."""
    return (config.num_patches + 1) * (6 * config.width + 2 * config.mlp_width) * element_size


Attend = Callable[[Tensor, int], Tensor]
"""(queries, keys and values side by side (..., 3D), number of heads) → attended values (..., D)."""


def attend_all(query_key_value_BPE: Tensor, num_heads: int) -> Tensor:
    """Every feature of a sequence attends to all: (B, P, 3D) → (B, P, D)."""
    return attend(*_split_heads(query_key_value_BPE, num_heads)).transpose(1, 2).flatten(2)


def attend_backwards(query_key_value_BPE: Tensor, num_heads: int) -> Tensor:
    """Every feature attends to itself and those before it: (B, P, 3D) → (B, P, D)."""
    query, key, value = _split_heads(query_key_value_BPE, num_heads)
    return F.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2).flatten(2)


def _split_heads(query_key_value_BPE: Tensor, num_heads: int) -> Tensor:
    """Queries, keys and values by head: (3, B, H, P, D / H)."""
    return query_key_value_BPE.unflatten(2, (3, num_heads, -1)).permute(2, 0, 3, 1, 4)


class Block(nn.Module):
    """Pre-norm Transformer block: attention, then feed-forward, each added to its input."""

    def __init__(
        self, width: int, num_heads: int, mlp_width: int, *, layer_norm_eps: float, activation: Activation = "gelu"
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.activation: Activation = activation
        self.norm1 = nn.LayerNorm(width, eps=layer_norm_eps)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.projection = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, eps=layer_norm_eps)
        self.fc1 = nn.Linear(width, mlp_width)
        self.fc2 = nn.Linear(mlp_width, width)

    def forward(self, features_BPD: Tensor, attend_with: Attend = attend_all) -> Tensor:
        """(B, P, D) → (B, P, D), or as `attend_with` lays them out."""
        query_key_value = self.query_key_value(self.norm1(features_BPD))
        features_BPD = features_BPD + self.projection(attend_with(query_key_value, self.num_heads))
        return features_BPD + self.fc2(activated(self.fc1, self.norm2(features_BPD), self.activation))


class VisionTransformer(nn.Module):
    """Image encoder: normalised images to patch features."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embedding = nn.Conv2d(3, config.width, config.patch_size_px, stride=config.patch_size_px)
        self.class_embedding = nn.Parameter(torch.zeros(1, 1, config.width))
        self.position_embedding = nn.Parameter(_sine_positions(config))
        eps = config.layer_norm_eps
        self.first_norm = nn.LayerNorm(config.width, eps=eps) if config.norm_first else nn.Identity()
        self.blocks = nn.ModuleList(
            Block(config.width, config.num_heads, config.mlp_width, layer_norm_eps=eps, activation=config.activation)
            for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(config.width, eps=eps)
        initialise(self, config.width)
        nn.init.trunc_normal_(self.class_embedding, std=0.02)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Encode images.

        Args:
            images_BCHW: (B, 3, H, W) with H = W = image_size_px, normalised; computed in the weights' precision.

        Returns:
            (B, 1 + P, D), layer-normed; index 0 is [CLS].
        """
        images_BCHW = images_BCHW.to(self.patch_embedding.weight.dtype)
        patches_BPD = self.patch_embedding(images_BCHW).flatten(2).transpose(1, 2)
        class_B1D = self.class_embedding.expand(len(images_BCHW), -1, -1)
        features_BPD = torch.cat([class_B1D, patches_BPD], dim=1) + self.position_embedding
        features_BPD = self.first_norm(features_BPD)
        for block in self.blocks:
            features_BPD = block(features_BPD)
        return self.norm(features_BPD)


def interpolate_positions(position_1PD: Tensor, grid: tuple[int, int]) -> Tensor:
    """Learned positions of a square grid of patches, for another grid.

    Bicubic without antialiasing, corners not aligned, as ViTs are brought to another resolution (Dosovitskiy et al.
    2021 §3.2; BLIP's released code does the same). Computed in float32.

    Args:
        position_1PD: (1, 1 + P, D), [CLS] first, P a square number.
        grid: rows and columns of patches wanted.

    Returns:
        (1, 1 + rows · columns, D) of the same dtype; [CLS]'s entry as it was, and all of it for the same grid.

    Raises ValueError where P is no square number or the grid is empty.
    """
    num_patches = position_1PD.shape[1] - 1
    side = math.isqrt(max(num_patches, 0))
    if side * side != num_patches or side == 0:
        raise ValueError(f"{num_patches} positions make no square grid of patches")
    if min(grid) < 1:
        raise ValueError(f"grid is {grid}; expected at least one row and one column of patches")
    if grid == (side, side):
        return position_1PD
    known_1DHW = position_1PD[:, 1:].float().unflatten(1, (side, side)).permute(0, 3, 1, 2)
    wanted_1DHW = F.interpolate(known_1DHW, size=grid, mode="bicubic", align_corners=False)
    wanted_1PD = wanted_1DHW.flatten(2).transpose(1, 2).to(position_1PD.dtype)
    return torch.cat([position_1PD[:, :1], wanted_1PD], dim=1)


@torch.no_grad()
def change_image_size(vision: VisionTransformer, image_size_px: int) -> None:
    """Let an encoder take squares of another size, in place: its positions are interpolated.

    Raises ValueError where the size is no multiple of the patch.
    """
    config = replace(vision.config, image_size_px=image_size_px)
    side, known = image_size_px // config.patch_size_px, vision.position_embedding
    wanted = interpolate_positions(known, (side, side)).clone()
    vision.position_embedding = nn.Parameter(wanted, requires_grad=known.requires_grad)
    vision.config = config


def initialise(module: nn.Module, width: int) -> None:
    """Normal weights, zero biases, in place; std 0.02 at width 768 as in BERT, larger in narrower models.

    Deviation from BLIP for narrow models only: 0.02 at width 128 leaves attention flat for thousands of steps.
    """
    std = 0.02 * math.sqrt(768 / width)
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Conv2d | nn.Embedding):
            nn.init.trunc_normal_(part.weight, std=std)
        if isinstance(part, nn.Linear | nn.Conv2d) and part.bias is not None:
            nn.init.zeros_(part.bias)


def _sine_positions(config: ViTConfig) -> Tensor:
    """Positions (1, 1 + P, D) to start from: sines and cosines of row and column, about as large as the patches.

    Deviation from BLIP, which starts from noise: neighbours look alike from the first step. The waves are as long
    as twice the picture at most and two patches at least, so that all of them tell places apart on small grids
    too (of the usual code's, down to 1 / 10,000, most are flat there, and what lies left of what is not learnt).
    """
    filled = torch.zeros(1, 1 + config.num_patches, config.width)
    if filled.is_meta:  # weights are read in its place; there these functions are Python's and take seconds to import
        return filled
    side, quarter = config.image_size_px // config.patch_size_px, config.width // 4
    places = (torch.arange(side, dtype=torch.float32) + 0.5) / side
    frequencies = math.pi * torch.logspace(0, math.log2(max(side / 2, 1)), quarter, base=2.0)
    waves_SD = torch.cat([(places[:, None] * frequencies).sin(), (places[:, None] * frequencies).cos()], dim=1)
    by_column = waves_SD[None].expand(side, -1, -1)
    by_row = waves_SD[:, None].expand(-1, side, -1)
    code_PD = torch.cat([by_column, by_row], dim=2).flatten(0, 1)
    filled[:, 1:, : code_PD.shape[1]] = code_PD - code_PD.mean(dim=0)
    return filled
