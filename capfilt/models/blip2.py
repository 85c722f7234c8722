"""BLIP-2's two pre-training stages over a frozen image encoder (BLIP-2 §3.2, §3.3).

In: features of a frozen image encoder, before its last layer norm, and texts. Out: losses.

- `Stage1`: the Q-Former learns to fetch what text speaks of: ITC + ITM + ITG, plain sum
- `Stage2`: query outputs, projected, are soft visual prompts of a frozen language model
- the layer norm on the image features stays trainable and computes in float32; what comes before it is
  frozen, so the features may come from a cache
- gathering across ranks is an argument, the identity on one process

Legend: B images, A images of all ranks, Q queries, P patches, T tokens, D width, E embedding, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from capfilt.models.llms import LanguageModel
from capfilt.models.losses import draw_hard_negatives, itc_loss
from capfilt.models.med import LanguageModelHead, MEDConfig
from capfilt.models.qformer import ImageKeyValues, KeyValue, QFormer, QFormerConfig, select_images

Gather = Callable[[Tensor], Tensor]
"""(B, …) of this rank → (A, …) of all ranks, gradients included."""

LABEL_SMOOTHING = 0.1
"""Of ITC and ITG (released code; the paper does not say)."""
TEMPERATURE_RANGE = (0.001, 0.5)
"""Bounds of the learned temperature (BLIP's; BLIP-2's code has none)."""
IGNORED = -100


def identity(tensor: Tensor) -> Tensor:
    """Gathers on one process."""
    return tensor


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
        self.temperature = nn.Parameter(torch.tensor(0.07))

    def image_key_values(self, features_BPD: Tensor) -> ImageKeyValues:
        """Frozen features, not yet normed, in any precision → cross-attention keys and values."""
        return self.qformer.image_key_values(self.vision_norm(features_BPD.float()))

    def embed_queries(self, query_outputs_BQD: Tensor) -> Tensor:
        """ITC embeddings (B, Q, E) of unit length, one per query."""
        return F.normalize(self.vision_projection(query_outputs_BQD), dim=-1)

    def embed_texts(self, texts: Texts) -> Tensor:
        """ITC embeddings (B, E) of unit length, from [CLS]."""
        return F.normalize(self.text_projection(self.qformer.encode_text(texts.tokens, texts.mask)[:, 0]), dim=-1)

    def itm_logits(self, image: ImageKeyValues, texts: Texts) -> Tensor:
        """ITM logits (B, 2), averaged over the queries; index 1 is "match"."""
        return self.itm_head(self.qformer.encode_pairs(image, texts.tokens, texts.mask)).mean(dim=1)

    def forward(
        self,
        features_BPD: Tensor,
        texts: Texts,
        *,
        losses: tuple[str, ...] = ("itc", "itm", "itg"),
        gather: Gather = identity,
        rank: int = 0,
    ) -> dict[str, Tensor]:
        """The losses asked for, and "loss", their plain sum.

        `gather` and `rank` bring in the images and texts of all ranks as negatives; every rank must pad its
        texts to the same length then.
        """
        image = self.image_key_values(features_BPD)
        queries, key_values = self.qformer.encode_queries(image)
        similarity = self._similarities(queries, texts, gather)
        found: dict[str, Tensor] = {}
        if "itc" in losses:
            image_to_text, text_to_image = (cosines / self._temperature() for cosines in similarity)
            found["itc"] = itc_loss(
                image_to_text, text_to_image, offset=rank * len(queries), label_smoothing=LABEL_SMOOTHING
            )
        if "itm" in losses:
            found["itm"] = self._itm_loss(image, texts, similarity, gather, rank)
        if "itg" in losses:
            found["itg"] = self._itg_loss(texts, key_values)
        return {"loss": torch.stack(list(found.values())).sum(), **found}

    def _temperature(self) -> Tensor:
        return self.temperature.clamp(*TEMPERATURE_RANGE)

    def _similarities(self, queries_BQD: Tensor, texts: Texts, gather: Gather) -> tuple[Tensor, Tensor]:
        """Cosines (B, A) of own images with all texts and of own texts with all images; best query counts."""
        images_BQE, texts_BE = self.embed_queries(queries_BQD), self.embed_texts(texts)
        image_to_text = (images_BQE @ gather(texts_BE).T).amax(dim=1)
        if gather is identity:
            return image_to_text, image_to_text.T
        text_to_image = torch.einsum("be,aqe->baq", texts_BE, gather(images_BQE)).amax(dim=2)
        return image_to_text, text_to_image

    def _itm_loss(
        self,
        image: ImageKeyValues,
        texts: Texts,
        similarity: tuple[Tensor, Tensor],
        gather: Gather,
        rank: int,
    ) -> Tensor:
        """B pairs that belong together, and for each image and each text a hard negative from all ranks."""
        num_own = len(texts.tokens)
        all_tokens, all_mask = gather(texts.tokens), gather(texts.mask)
        same = (texts.tokens[:, None] == all_tokens[None]).all(dim=2)
        temperature = self._temperature().detach()
        texts_for_image, images_for_text = (
            draw_hard_negatives(cosines.detach() / temperature, same, offset=rank * num_own) for cosines in similarity
        )
        own = torch.arange(num_own, device=texts.tokens.device)
        all_images = [None if kv is None else (gather(kv[0]), gather(kv[1])) for kv in image]
        own = own + rank * num_own
        pair_images = select_images(all_images, torch.cat([own, images_for_text, own]))
        pair_texts = torch.cat([own, own, texts_for_image])
        logits = self.itm_logits(pair_images, Texts(tokens=all_tokens[pair_texts], mask=all_mask[pair_texts]))
        labels = torch.zeros(3 * num_own, dtype=torch.long, device=logits.device)
        labels[:num_own] = 1
        return F.cross_entropy(logits, labels)

    def _itg_loss(self, texts: Texts, query_key_values: list[KeyValue]) -> Tensor:
        """Next-token cross-entropy, smoothed; [DEC] takes the place of [CLS]; padding carries no loss."""
        tokens = texts.tokens.clone()
        tokens[:, 0] = self.dec_token_id
        hidden = self.qformer.decode_text(tokens[:, :-1], query_key_values)
        predicted = texts.mask[:, 1:].bool()
        logits = self.lm_head(hidden[predicted])
        return F.cross_entropy(logits, tokens[:, 1:][predicted], label_smoothing=LABEL_SMOOTHING)


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

    def forward(self, features_BPD: Tensor, texts: list[str]) -> dict[str, Tensor]:
        """The language model's loss on the texts, as "lm" and "loss"."""
        loss = self.llm.caption_loss(self.visual_prompts(features_BPD), texts)
        return {"loss": loss, "lm": loss}

    def train(self, mode: bool = True) -> Stage2:
        """The language model stays in eval mode: it is frozen."""
        super().train(mode)
        self.llm.eval()
        return self
