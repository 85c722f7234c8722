"""ALBEF: an image encoder, a text encoder, a fusion encoder on top of both, and the losses ITC, ITM and MLM (ALBEF §3).

In: images and token ids. Out: the losses ITC, ITM and MLM.

- BERT's first layers read the text alone (text encoder), its last ones attend to the image too (fusion encoder)
- ITC contrasts with the features of momentum encoders and of their queue; ITC and MLM have soft targets of theirs.
  Without momentum (`MomentumConfig` None) contrast is within the batch, and MLM's targets are the words alone
- ITM: two classes from the fusion encoder's [CLS]; hard negatives have probability softmax(similarity)
- MLM reads masked texts with their image
- the text and the masked text pass the text encoder together; text, hard negative text and masked text of an image pass
  the fusion encoder together, so that its cross-attention keys and values serve all three

Deviations from the released code: images and texts of all ranks are negatives; the momentum encoders compute without
dropout; no dropout on attention weights, so that the fused kernels can be used.

Legend: B images with a text each on this rank, A those of all ranks, R texts (a multiple of B), T tokens, P patches,
D width, E embedding, N masked tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from capfilt.models.contrast import Contrast, ImageTextContrast
from capfilt.models.losses import itm_loss, mlm_loss
from capfilt.models.med import KeyValue, LanguageModelHead, TextConfig, TextLayer
from capfilt.models.momentum import FeatureQueue, MomentumConfig, follow, slow_copy
from capfilt.models.ranks import ALONE, Ranks
from capfilt.models.text_layout import TextLayout
from capfilt.models.vit import VisionTransformer, initialise


@dataclass(frozen=True, kw_only=True)
class AlbefConfig(TextConfig):
    """Sizes of ALBEF's text side; the defaults are the released ones (BERT-base). `depth` counts all layers."""

    text_depth: int = 6
    """Layers of the text encoder (ALBEF §3.1: the first 6)."""
    cls_token_id: int = 101
    """[CLS], first token of a text."""
    mask_token_id: int = 103
    """[MASK]."""

    def __post_init__(self) -> None:
        if not 0 < self.text_depth < self.depth:
            raise ValueError(f"text_depth {self.text_depth} of {self.depth} layers leaves one encoder without layers")

    @property
    def fusion_depth(self) -> int:
        """Layers of the fusion encoder (ALBEF §3.1: the last 6)."""
        return self.depth - self.text_depth


class AlbefText(nn.Module):
    """Text encoder and fusion encoder: BERT's layers, of which the last ones attend to the image."""

    def __init__(self, config: AlbefConfig) -> None:
        super().__init__()
        self.config = config
        self.word_embedding = nn.Embedding(config.vocab_size, config.width)
        self.position_embedding = nn.Embedding(config.max_positions, config.width)
        self.type_embedding = nn.Embedding(2, config.width)  # of BERT's two types of tokens the first alone is used
        self.embedding_norm = nn.LayerNorm(config.width, eps=config.layer_norm_eps)
        self.layers = nn.ModuleList(
            TextLayer(config, attends_to_image=index >= config.text_depth) for index in range(config.depth)
        )
        self.dropout = nn.Dropout(config.dropout)
        initialise(self, config.width)

    def encode(self, tokens_RT: Tensor, mask_RT: Tensor) -> Tensor:
        """Text encoder: token ids (R, T) and their mask, True at tokens, to features (R, T, D)."""
        positions_T = torch.arange(tokens_RT.shape[1], device=tokens_RT.device)
        hidden_RTD = (
            self.word_embedding(tokens_RT) + self.position_embedding(positions_T) + self.type_embedding.weight[0]
        )
        hidden_RTD = self.dropout(self.embedding_norm(hidden_RTD))
        mask = mask_RT[:, None, None, :].bool()
        for layer in self.layers[: self.config.text_depth]:
            hidden_RTD = layer(hidden_RTD, mask, None, None, is_causal=False)
        return hidden_RTD

    def image_key_values(self, features_BPD: Tensor) -> list[KeyValue]:
        """Cross-attention keys and values of images, a pair for each layer of the fusion encoder."""
        return [cast(TextLayer, layer).image_key_value(features_BPD) for layer in self._fusion_layers()]

    def fuse(
        self, text_RTD: Tensor, mask_RT: Tensor, image: Sequence[KeyValue], *, layout: TextLayout | None = None
    ) -> Tensor:
        """Fusion encoder: features of texts and keys and values of their images to features (R, T, D).

        Each of the B images has R / B texts side by side, or as `layout` says.
        """
        mask = mask_RT[:, None, None, :].bool()
        for layer, key_value in zip(self._fusion_layers(), image, strict=True):
            text_RTD = layer(text_RTD, mask, key_value, None, is_causal=False, layout=layout)
        return text_RTD

    def _fusion_layers(self) -> nn.ModuleList:
        return self.layers[self.config.text_depth :]


class Albef(nn.Module):
    """Image encoder, text and fusion encoder, ITC's projections, the heads of ITM and of MLM."""

    def __init__(self, vision: VisionTransformer, config: AlbefConfig, *, embed_dim: int = 256) -> None:
        super().__init__()
        self.config = config
        self.vision = vision
        self.text = AlbefText(config)
        self.head = LanguageModelHead(config, self.text.word_embedding)
        self.vision_projection = nn.Linear(config.vision_width, embed_dim)
        self.text_projection = nn.Linear(config.width, embed_dim)
        self.itm_head = nn.Linear(config.width, 2)
        for projection in (self.vision_projection, self.text_projection, self.itm_head):
            initialise(projection, config.width)

    def embed_images(self, features_BPD: Tensor) -> Tensor:
        """ITC embeddings (B, E) of unit length from image features."""
        return F.normalize(self.vision_projection(features_BPD[:, 0]), dim=-1)

    def embed_texts(self, text_BTD: Tensor) -> Tensor:
        """ITC embeddings (B, E) of unit length from the text encoder's features."""
        return F.normalize(self.text_projection(text_BTD[:, 0]), dim=-1)

    def itm_logits(
        self, features_BPD: Tensor, tokens_RT: Tensor, mask_RT: Tensor, *, layout: TextLayout | None = None
    ) -> Tensor:
        """ITM logits (R, 2) of texts, laid out as in `AlbefText.fuse`; index 1 is "match"."""
        text_RTD = self.text.encode(tokens_RT, mask_RT)
        fused_RTD = self.text.fuse(text_RTD, mask_RT, self.text.image_key_values(features_BPD), layout=layout)
        return self.itm_head(fused_RTD[:, 0])

    def encode_pairs(self, images_BCHW: Tensor, tokens_BT: Tensor, masked_tokens_BT: Tensor | None) -> EncodedPairs:
        """What image encoder and text encoder make of pairs, and of their masked texts."""
        mask_BT = tokens_BT != self.config.pad_token_id
        both_RT = tokens_BT if masked_tokens_BT is None else torch.cat([tokens_BT, masked_tokens_BT])
        text_RTD = self.text.encode(both_RT, mask_BT.repeat(len(both_RT) // len(tokens_BT), 1))
        masked_BTD = None if masked_tokens_BT is None else text_RTD[len(tokens_BT) :]
        return EncodedPairs(self.vision(images_BCHW), mask_BT, text_RTD[: len(tokens_BT)], masked_BTD)


@dataclass(frozen=True)
class EncodedPairs:
    """Features of images and of their texts, which know nothing of each other."""

    image: Tensor
    """(B, P, D)."""
    mask: Tensor
    """(B, T), True at tokens."""
    text: Tensor
    """(B, T, D)."""
    masked: Tensor | None
    """(B, T, D) of the masked texts."""


class MomentumAlbef(nn.Module):
    """A slow copy of the model without its head of ITM, and the queue of its features."""

    def __init__(self, model: Albef, config: MomentumConfig) -> None:
        super().__init__()
        self.rate = config.rate
        self.model = slow_copy(model)
        self.model.itm_head = nn.Identity()  # pyright: ignore[reportAttributeAccessIssue]
        self.queue = FeatureQueue(config.queue_size, model.text_projection.out_features)

    def follow(self, model: Albef) -> None:
        """After a step: go its way after `model`, and put its features into the queue."""
        follow(self.model, model, self.rate)
        self.queue.push()

    def train(self, mode: bool = True) -> MomentumAlbef:
        """The copy stays in eval mode, without dropout."""
        return super().train(False)


class AlbefLosses(nn.Module):
    """ALBEF in pre-training: its losses and their sum."""

    def __init__(self, model: Albef, momentum: MomentumConfig | None = None) -> None:
        super().__init__()
        self.model = model
        self.contrast = ImageTextContrast()
        self.momentum = MomentumAlbef(model, momentum) if momentum else None

    def forward(
        self,
        images_BCHW: Tensor,
        tokens_BT: Tensor,
        losses: Sequence[str] = ("itc", "itm", "mlm"),
        *,
        ids_B: Tensor | None = None,
        masked_tokens_BT: Tensor | None = None,
        is_masked_BT: Tensor | None = None,
        uniform_2B: Tensor | None = None,
        alpha: Tensor | float = 0.4,
        ranks: Ranks = ALONE,
    ) -> dict[str, Tensor]:
        """The losses asked for of `itc`, `itm` and `mlm`, and their sum `loss`.

        Args:
            images_BCHW: (B, 3, H, W), normalised.
            tokens_BT: (B, T) texts that begin with [CLS] and end with [SEP], padded; as long on every rank.
            losses: names of the losses.
            ids_B: whole numbers, 0 or more, that tell the images apart; None: each is another.
            masked_tokens_BT: (B, T) the texts as MLM reads them, see `mask_tokens`; needed for it alone.
            is_masked_BT: (B, T) booleans, True at the tokens that MLM is to find.
            uniform_2B: what draws the hard negatives, see `draw_hard_negatives`: of texts, of images.
            alpha: weight of the momentum model's similarities and words in the targets of ITC and MLM.
            ranks: whose images and texts are negatives too.
        """
        assert "mlm" not in losses or (masked_tokens_BT is not None and is_masked_BT is not None), "what MLM reads"
        masked_tokens_BT = masked_tokens_BT if "mlm" in losses else None
        fast = self.model.encode_pairs(images_BCHW, tokens_BT, masked_tokens_BT)
        slow = None
        if self.momentum is not None:
            with torch.no_grad():
                slow = self.momentum.model.encode_pairs(images_BCHW, tokens_BT, masked_tokens_BT)
        found: dict[str, Tensor] = {}
        negatives = None
        if "itc" in losses or "itm" in losses:
            contrast = self._contrast(fast, slow, ids_B, alpha, ranks)
            if "itc" in losses:
                found["itc"] = contrast.loss()
            if "itm" in losses:
                negatives = contrast.hard_negatives(tokens_BT, ranks.gather(tokens_BT), uniform_2B)
        image = self.model.text.image_key_values(fast.image) if "itm" in losses or "mlm" in losses else []
        matched, masked_BTD = self._fuse(fast, negatives, image, ranks)
        if matched is not None and negatives is not None:
            by_text = self.model.text.fuse(fast.text, fast.mask, self._other_images(fast, negatives[1], image, ranks))
            mismatch_BD = torch.cat([matched[1], by_text[:, 0]])
            found["itm"] = itm_loss(self.model.itm_head(matched[0]), self.model.itm_head(mismatch_BD))
        if masked_BTD is not None and is_masked_BT is not None:
            logits_NV = self.model.head(masked_BTD[is_masked_BT][None])[0]
            slow_logits_NV = None if slow is None else self._slow_words(slow, is_masked_BT)
            target_N = tokens_BT[is_masked_BT]
            found["mlm"] = mlm_loss(logits_NV, target_N, slow_logits_NV, alpha=alpha, ranks=ranks)
        return found | {"loss": torch.stack(list(found.values())).sum()}

    def _contrast(
        self,
        fast: EncodedPairs,
        slow: EncodedPairs | None,
        ids_B: Tensor | None,
        alpha: Tensor | float,
        ranks: Ranks,
    ) -> Contrast:
        embedded = self.model.embed_images(fast.image), self.model.embed_texts(fast.text)
        if self.momentum is None or slow is None:
            return self.contrast.within_batch(embedded, ranks, ids_B)
        with torch.no_grad():
            copy = self.momentum.model
            slow_embedded = copy.embed_images(slow.image), copy.embed_texts(slow.text)
        return self.contrast.with_queue(embedded, slow_embedded, self.momentum.queue, alpha, ranks, ids_B)

    def _fuse(
        self, pairs: EncodedPairs, negatives: tuple[Tensor, Tensor] | None, image: Sequence[KeyValue], ranks: Ranks
    ) -> tuple[tuple[Tensor, Tensor] | None, Tensor | None]:
        """All texts of each image at once: [CLS] (B, D) of pairs and of negative texts; the masked texts (B, T, D)."""
        texts, masks = [], []
        if negatives is not None:
            texts += [pairs.text, ranks.gather(pairs.text)[negatives[0]]]
            masks += [pairs.mask, ranks.gather(pairs.mask)[negatives[0]]]
        if pairs.masked is not None:
            texts, masks = [*texts, pairs.masked], [*masks, pairs.mask]
        if not texts:
            return None, None
        rows_RTD, mask_RT = torch.stack(texts, dim=1).flatten(0, 1), torch.stack(masks, dim=1).flatten(0, 1)
        fused = self.model.text.fuse(rows_RTD, mask_RT, image).unflatten(0, (-1, len(texts)))
        matched = None if negatives is None else (fused[:, 0, 0], fused[:, 1, 0])
        return matched, None if pairs.masked is None else fused[:, -1]

    def _other_images(
        self, pairs: EncodedPairs, other_image: Tensor, image: Sequence[KeyValue], ranks: Ranks
    ) -> Sequence[KeyValue]:
        """Keys and values of the negative images; features are gathered, less than keys and values of all layers."""
        if ranks.num_ranks == 1:
            return [(key[other_image], value[other_image]) for key, value in image]
        return self.model.text.image_key_values(ranks.gather(pairs.image)[other_image])

    @torch.no_grad()
    def _slow_words(self, slow: EncodedPairs, is_masked_BT: Tensor) -> Tensor:
        """What the momentum model says of the masked tokens: (N, V)."""
        assert self.momentum is not None
        assert slow.masked is not None
        copy = self.momentum.model
        fused_BTD = copy.text.fuse(slow.masked, slow.mask, copy.text.image_key_values(slow.image))
        return copy.head(fused_BTD[is_masked_BT][None])[0]
