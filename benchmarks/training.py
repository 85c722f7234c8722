"""A step of BLIP-2's stage 1: capfilt's, and the same written plainly with transformers' modules.

In: a `Case` whose size is `vit-l` (frozen CLIP ViT-L/14, a Q-Former of 188M weights) or `tiny`. Out: a function that
takes one step: frozen image features, ITC + ITM + ITG, backward, AdamW. The plain side makes a pass of the Q-Former for
each loss and reuses nothing, as the losses read in the paper.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Blip2ForImageTextRetrieval, CLIPVisionConfig, CLIPVisionModel

from benchmarks.sides import Case, Pass
from capfilt.models.blip2 import Stage1, Texts
from capfilt.models.convert_blip2 import EXTRA_STAGE1_KEYS, blip2_config, stage1_names, to_theirs
from capfilt.models.losses import draw_hard_negatives
from capfilt.models.packed import packed_copy
from capfilt.models.qformer import QFormerConfig
from capfilt.models.vit import VisionTransformer, ViTConfig
from capfilt.settings import Stage1Settings
from capfilt.train.cpu import fast_cpu
from capfilt.train.optim import build_optimizer

NUM_TOKENS = 16
"""Of the longest text of a batch, special tokens included."""


@dataclass(frozen=True)
class Sizes:
    """Of the image encoder (all its blocks; the last one is left out) and of the Q-Former."""

    vision: ViTConfig
    qformer: QFormerConfig


SIZES = {
    "vit-l": Sizes(
        ViTConfig(
            image_size_px=224, patch_size_px=14, width=1024, depth=24, num_heads=16, mlp_width=4096,
            layer_norm_eps=1e-5, activation="silu", norm_first=True,  # QuickGELU, its weights scaled
        ),
        QFormerConfig(vision_width=1024),
    ),
    "tiny": Sizes(
        ViTConfig(
            image_size_px=16, patch_size_px=8, width=32, depth=3, num_heads=2, mlp_width=64, layer_norm_eps=1e-5,
            activation="silu", norm_first=True,
        ),
        QFormerConfig(
            num_queries=4, width=32, depth=4, num_heads=2, mlp_width=64, vision_width=32, vocab_size=40,
            max_positions=20,
        ),
    ),
}  # fmt: skip


def draw_batch(case: Case) -> tuple[Tensor, Texts]:
    """Images, and texts of different lengths."""
    sizes, generator = SIZES[case.size], torch.Generator().manual_seed(0)
    side = sizes.vision.image_size_px
    images = torch.randn(case.batch_size, 3, side, side, generator=generator)
    lengths = torch.randint(NUM_TOKENS // 2, NUM_TOKENS + 1, (case.batch_size,), generator=generator)
    lengths[0] = NUM_TOKENS
    tokens = torch.randint(5, sizes.qformer.vocab_size - 2, (case.batch_size, NUM_TOKENS), generator=generator)
    mask = torch.arange(NUM_TOKENS) < lengths[:, None]
    return images, Texts(tokens=tokens.masked_fill(~mask, 0), mask=mask)


def build_stage1(case: Case) -> Stage1:
    """An untrained stage 1."""
    torch.manual_seed(0)
    qformer = SIZES[case.size].qformer
    return Stage1(qformer, dec_token_id=qformer.vocab_size - 1).train()


def our_step(case: Case) -> Pass:
    """capfilt's step."""
    sizes = SIZES[case.size].vision
    vision = VisionTransformer(ViTConfig(**{**vars(sizes), "depth": sizes.depth - 1})).eval().requires_grad_(False)
    vision.norm = nn.Identity()  # pyright: ignore[reportAttributeAccessIssue]
    packed = packed_copy(vision)  # as `capfilt.train.features` computes; the plain one is saved with the result
    stage, (images, texts) = build_stage1(case), draw_batch(case)
    optimizer = build_optimizer(stage.named_parameters(), Stage1Settings())

    def step() -> None:
        with fast_cpu():
            with torch.no_grad():
                features = packed(images)
            with torch.autocast("cpu", torch.bfloat16, enabled=case.dtype == "bfloat16"):
                losses = stage(features, texts)
            optimizer.zero_grad(set_to_none=True)
            losses["loss"].backward()
            optimizer.step()

    return step


def plain_step(case: Case) -> Pass:
    """The step as one writes it with transformers' modules."""
    sizes = SIZES[case.size].vision
    config = CLIPVisionConfig(
        hidden_size=sizes.width, intermediate_size=sizes.mlp_width, num_hidden_layers=sizes.depth,
        num_attention_heads=sizes.num_heads, image_size=sizes.image_size_px, patch_size=sizes.patch_size_px,
    )  # fmt: skip
    tower = CLIPVisionModel(config).eval().requires_grad_(False)
    plain, (images, texts) = PlainStage1(build_stage1(case)), draw_batch(case)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-4, betas=(0.9, 0.98), weight_decay=0.05)

    def step() -> None:
        with torch.no_grad():
            features = tower(images, output_hidden_states=True).hidden_states[-2]
        with torch.autocast("cpu", torch.bfloat16, enabled=case.dtype == "bfloat16"):
            losses = plain(features, texts)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()

    return step


class PlainStage1(nn.Module):
    """ITC, ITM and ITG, each with passes of its own of transformers' Q-Former; the weights are those of a `Stage1`."""

    def __init__(self, stage: Stage1) -> None:
        super().__init__()
        config = blip2_config(
            ViTConfig(image_size_px=16, patch_size_px=8, width=stage.qformer.config.vision_width, depth=1, num_heads=2),
            stage.qformer.config, embed_dim=stage.vision_projection.out_features,
        )  # fmt: skip
        config.qformer_config.attention_probs_dropout_prob = 0.0  # ours has none
        model: Any = Blip2ForImageTextRetrieval(config)
        own = {name: p.detach() for name, p in stage.named_parameters() if name not in EXTRA_STAGE1_KEYS}
        odd = model.load_state_dict(to_theirs(own, stage1_names(stage.qformer.config)), strict=False)
        assert all(name.startswith("vision_model.") for name in odd.missing_keys), odd
        assert not odd.unexpected_keys, odd
        del model.vision_model
        self.model, self.norm, self.head = model.train(), stage.vision_norm, stage.lm_head
        self.head.vocabulary.weight = model.embeddings.word_embeddings.weight
        self.temperature, self.dec_token_id = stage.temperature, stage.dec_token_id

    def forward(self, features: Tensor, texts: Texts, uniform: Tensor | None = None) -> dict[str, Tensor]:
        """The three losses; `uniform` draws the hard negatives as `Stage1` does."""
        model, images = self.model, self.norm(features.float())
        similarity = self._similarity(images, texts)
        target = torch.arange(len(images))
        itc = F.cross_entropy(similarity, target, label_smoothing=0.1)
        itc = (itc + F.cross_entropy(similarity.T, target, label_smoothing=0.1)) / 2

        same = (texts.tokens[:, None] == texts.tokens[None]).all(dim=2)
        by_text, by_image = uniform if uniform is not None else (None, None)
        other_text = draw_hard_negatives(similarity.detach(), same, by_text)
        other_image = draw_hard_negatives(similarity.detach().T, same, by_image)
        tokens = torch.cat([texts.tokens, texts.tokens[other_text], texts.tokens])
        mask = torch.cat([texts.mask, texts.mask[other_text], texts.mask])
        pair_images = torch.cat([images, images, images[other_image]])
        queries = model.query_tokens.expand(len(tokens), -1, -1)
        both = model.embeddings(input_ids=tokens, query_embeds=queries)
        seen = torch.cat([mask.new_ones(queries.shape[:2]), mask], dim=1).long()
        hidden = model.qformer(
            query_embeds=both, query_length=queries.shape[1], attention_mask=seen, encoder_hidden_states=pair_images
        ).last_hidden_state
        logits = model.itm_head(hidden[:, : queries.shape[1]]).mean(dim=1)
        itm = F.cross_entropy(logits, (torch.arange(len(tokens)) < len(images)).long())
        return {"itc": itc, "itm": itm, "itg": self._itg(images, texts)}

    def _similarity(self, images: Tensor, texts: Texts) -> Tensor:
        model = self.model
        queries = model.query_tokens.expand(len(images), -1, -1)
        seen = model.qformer(query_embeds=queries, encoder_hidden_states=images).last_hidden_state
        words = model.embeddings(input_ids=texts.tokens)
        read = model.qformer(query_embeds=words, query_length=0, attention_mask=texts.mask.long()).last_hidden_state
        image_embeds = F.normalize(model.vision_projection(seen), dim=-1)
        text_embeds = F.normalize(model.text_projection(read[:, 0]), dim=-1)
        return (image_embeds @ text_embeds.T).amax(dim=1) / self.temperature

    def _itg(self, images: Tensor, texts: Texts) -> Tensor:
        model, num_queries = self.model, self.model.query_tokens.shape[1]
        tokens = texts.tokens.clone()
        tokens[:, 0] = self.dec_token_id
        queries = model.query_tokens.expand(len(images), -1, -1)
        both = model.embeddings(input_ids=tokens, query_embeds=queries)
        size = both.shape[1]
        allowed = torch.ones(size, size, dtype=torch.bool).tril()
        allowed[:num_queries, :num_queries] = True
        masked = torch.zeros(size, size).masked_fill(~allowed, torch.finfo(torch.float32).min)
        hidden = model.qformer(
            query_embeds=both,
            query_length=num_queries,
            attention_mask=masked.expand(len(images), 1, -1, -1),
            encoder_hidden_states=images,
        ).last_hidden_state[:, num_queries:]
        logits = self.head(hidden[:, :-1])
        labels = tokens[:, 1:].masked_fill(~texts.mask[:, 1:], -100)
        return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), label_smoothing=0.1)
