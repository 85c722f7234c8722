"""BLIP-2's two pre-training stages over a frozen image encoder (BLIP-2 §3.2, §3.3).

In: features of a frozen image encoder, before its last layer norm, and texts. Out: losses.

- `Stage1`: the Q-Former learns to fetch what text speaks of: ITC + ITM + ITG, plain sum
- `Stage2`: query outputs, projected, are soft visual prompts of a frozen language model
- `Blip2FineTuning`: the same, with the loss of texts behind prompts; the image encoder may train too (§4.2, §4.3)
- the layer norm on the image features stays trainable and computes in float32; what comes before it is
  frozen, so the features may come from a cache
- which processes train together is an argument (`models.ranks`); in-batch negatives come from all of them

Legend: B images, A images of all ranks, Q queries, P patches, T tokens, D width, E embedding, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from capfilt.models.contrast import Contrast, same_images
from capfilt.models.llms import LanguageModel
from capfilt.models.losses import cosines, itm_loss, lm_loss
from capfilt.models.med import LanguageModelHead, MEDConfig
from capfilt.models.qformer import ImageKeyValues, KeyValue, QFormer, QFormerConfig, join_images, select_images
from capfilt.models.ranks import ALONE, Ranks
from capfilt.models.text_layout import TextLayout
from capfilt.models.vit import VisionTransformer

LABEL_SMOOTHING = 0.1
"""Of ITC and ITG (released code; the paper does not say)."""


@dataclass(frozen=True, kw_only=True)
class Texts:
    """A batch of tokenised texts: `tokens` (B, T), [CLS] first, padding last; `mask` (B, T) boolean."""

    tokens: Tensor
    mask: Tensor


class Stage1(nn.Module):
    """Q-Former with the heads of ITC, ITM and ITG."""

    def __init__(
        self,
        config: QFormerConfig,
        *,
        embed_dim: int = 256,
        dec_token_id: int = 30522,
        vision_norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.dec_token_id = dec_token_id
        self.vision_norm = nn.LayerNorm(config.vision_width, eps=vision_norm_eps)
        self.qformer = QFormer(config)
        self.vision_projection = nn.Linear(config.width, embed_dim)
        self.text_projection = nn.Linear(config.width, embed_dim)
        self.itm_head = nn.Linear(config.width, 2)
        for projection in (self.vision_projection, self.text_projection, self.itm_head):
            nn.init.normal_(projection.weight, std=0.02)
            nn.init.zeros_(projection.bias)
        sizes = MEDConfig(vocab_size=config.vocab_size, width=config.width, layer_norm_eps=config.layer_norm_eps)
        self.lm_head = LanguageModelHead(sizes, self.qformer.word_embedding)
        self.temperature = nn.Parameter(torch.tensor([0.07]))  # one entry: FSDP shards no scalars

    def image_key_values(self, features_BPD: Tensor) -> ImageKeyValues:
        """Frozen features, not yet normed, in any precision → cross-attention keys and values."""
        return self.qformer.image_key_values(self.vision_norm(features_BPD.float()))

    def embed_queries(self, query_outputs_BQD: Tensor) -> Tensor:
        """ITC embeddings (B, Q, E) of unit length, one per query."""
        return F.normalize(self.vision_projection(query_outputs_BQD), dim=-1)

    def embed_texts(self, texts: Texts) -> Tensor:
        """ITC embeddings (B, E) of unit length, from [CLS]."""
        return F.normalize(self.text_projection(self.qformer.encode_text(texts.tokens, texts.mask)[:, 0]), dim=-1)

    def itm_logits(self, image: ImageKeyValues, texts: Texts, *, layout: TextLayout | None = None) -> Tensor:
        """ITM logits (B, 2), averaged over the queries; index 1 is "match". `layout` as in `QFormer.encode_pairs`."""
        return self.itm_head(self.qformer.encode_pairs(image, texts.tokens, texts.mask, layout=layout)).mean(dim=1)

    def forward(
        self,
        features_BPD: Tensor,
        texts: Texts,
        *,
        losses: tuple[str, ...] = ("itc", "itm", "itg"),
        ids_B: Tensor | None = None,
        uniform_2B: Tensor | None = None,
        ranks: Ranks = ALONE,
    ) -> dict[str, Tensor]:
        """The losses asked for, and "loss", their plain sum.

        The images and texts of all `ranks` are negatives; every rank pads its texts to the same length then. Whole
        numbers `ids_B` tell images apart: pairs of the same image are no negatives (released code: one pair an image).
        `uniform_2B` draws the hard negatives, the other texts and the other images, see `draw_hard_negatives`.
        """
        normed_BPD = self.vision_norm(features_BPD.float())
        image = self.qformer.image_key_values(normed_BPD)
        queries, key_values = self.qformer.encode_queries(image)
        found: dict[str, Tensor] = {}
        if "itc" in losses or "itm" in losses:
            i2t, t2i = (cosine / self.temperature for cosine in self._cosines(queries, texts, ranks))
            contrast = Contrast(i2t, t2i, ranks.offset(len(queries)), same_images(ids_B, ranks))
            if "itc" in losses:
                found["itc"] = contrast.loss(LABEL_SMOOTHING)
            if "itm" in losses:
                all_texts = Texts(tokens=ranks.gather(texts.tokens), mask=ranks.gather(texts.mask))
                chosen, other_image = contrast.hard_negatives(texts.tokens, all_texts.tokens, uniform_2B)
                other_texts = Texts(tokens=all_texts.tokens[chosen], mask=all_texts.mask[chosen])
                found["itm"] = self._itm_loss(normed_BPD, image, texts, other_image, other_texts, ranks)
        if "itg" in losses:
            found["itg"] = self._itg_loss(texts, key_values, ranks)
        return {"loss": torch.stack(list(found.values())).sum(), **found}

    def _cosines(self, queries_BQD: Tensor, texts: Texts, ranks: Ranks) -> tuple[Tensor, Tensor]:
        """Cosines (B, A) of own images with all texts and of own texts with all images; best query counts."""
        images_BQE, texts_BE = self.embed_queries(queries_BQD), self.embed_texts(texts)
        image_to_text = cosines(images_BQE, ranks.gather(texts_BE)).amax(dim=1)
        if ranks.num_ranks == 1:
            return image_to_text, image_to_text.T
        of_all_AQB = cosines(ranks.gather(images_BQE), texts_BE)
        return image_to_text, of_all_AQB.amax(dim=1).T

    def _itm_loss(
        self,
        normed_BPD: Tensor,
        image: ImageKeyValues,
        texts: Texts,
        other_image: Tensor,
        other_texts: Texts,
        ranks: Ranks,
    ) -> Tensor:
        """B pairs that belong together, and for each image and each text a hard negative from all ranks."""
        own = torch.arange(len(texts.tokens), device=texts.tokens.device)
        if ranks.num_ranks == 1:
            pair_images = select_images(image, torch.cat([own, own, other_image]))
        else:  # features are gathered, which are less than the keys and values of all layers
            others = self.qformer.image_key_values(ranks.gather(normed_BPD)[other_image])
            pair_images = join_images(select_images(image, torch.cat([own, own])), others)
        pair_texts = Texts(
            tokens=torch.cat([texts.tokens, other_texts.tokens, texts.tokens]),
            mask=torch.cat([texts.mask, other_texts.mask, texts.mask]),
        )
        logits_R2 = self.itm_logits(pair_images, pair_texts)
        return itm_loss(logits_R2[: len(own)], logits_R2[len(own) :])

    def _itg_loss(self, texts: Texts, query_key_values: list[KeyValue], ranks: Ranks) -> Tensor:
        """Next-token cross-entropy, smoothed; [DEC] takes the place of [CLS]; padding carries no loss."""
        tokens = texts.tokens.clone()
        tokens[:, 0] = self.dec_token_id
        hidden = self.qformer.decode_text(tokens[:, :-1], query_key_values)
        predicted = texts.mask[:, 1:].bool()
        logits = self.lm_head(hidden[predicted])
        return lm_loss(logits, tokens[:, 1:][predicted], label_smoothing=LABEL_SMOOTHING, ranks=ranks)


class Stage2(nn.Module):
    """Q-Former and projection in front of a frozen language model (BLIP-2 §3.3)."""

    def __init__(self, config: QFormerConfig, llm: LanguageModel, *, vision_norm_eps: float = 1e-6) -> None:
        super().__init__()
        self.vision_norm = nn.LayerNorm(config.vision_width, eps=vision_norm_eps)
        self.qformer = QFormer(config)
        self.projection = nn.Linear(config.width, llm.width)
        nn.init.normal_(self.projection.weight, std=0.02)
        nn.init.zeros_(self.projection.bias)
        self.llm = llm

    def visual_prompts(self, features_BPD: Tensor) -> Tensor:
        """Frozen features, not yet normed → soft visual prompts (B, Q, width of the LLM)."""
        image = self.qformer.image_key_values(self.vision_norm(features_BPD.float()))
        return self.projection(self.qformer.encode_queries(image)[0])

    def forward(
        self,
        features_BPD: Tensor,
        texts: list[str],
        ranks: Ranks = ALONE,
        draws: Sequence[float] | None = None,
    ) -> dict[str, Tensor]:
        """The language model's loss on the texts, as "lm" and "loss"; see `LanguageModel.caption_loss`."""
        loss = self.llm.caption_loss(self.visual_prompts(features_BPD), texts, ranks, draws)
        return {"loss": loss, "lm": loss}

    def train(self, mode: bool = True) -> Stage2:
        """The language model stays in eval mode: it is frozen."""
        super().train(mode)
        self.llm.eval()
        return self


class Blip2FineTuning(nn.Module):
    """A stage-2 model that learns what follows a prompt: captions or answers (BLIP-2 §4.2, §4.3).

    Deviation from §4.3: the Q-Former does not read the question, as transformers' BLIP-2 has no place for it; the
    language model does.
    """

    def __init__(self, stage: Stage2, vision: VisionTransformer | None = None) -> None:
        """With `vision` it computes the features itself, so that the image encoder trains too."""
        super().__init__()
        self.stage, self.vision = stage, vision

    def forward(
        self,
        prompts: list[str],
        texts: list[str],
        *,
        features_BPD: Tensor | None = None,
        images_BCHW: Tensor | None = None,
        ranks: Ranks = ALONE,
    ) -> dict[str, Tensor]:
        """The language model's loss on the texts, as "lm" and "loss"; see `LanguageModel.continuation_loss`.

        Takes normalised images with an image encoder, its features (not yet normed) without.
        """
        if self.vision is not None:
            assert images_BCHW is not None, "an image encoder that trains reads images"
            features_BPD = self.vision(images_BCHW)
        assert features_BPD is not None, "without an image encoder features are given"
        visual = self.stage.visual_prompts(features_BPD)
        loss = self.stage.llm.continuation_loss(visual, prompts, texts, ranks)
        return {"loss": loss, "lm": loss}
