"""BLIP for pre-training: one image encoder, MED's encoder and decoder, the heads of ITC, ITM and LM.

In: images and token ids. Out: the losses ITC, ITM and LM (BLIP §3.2).

- encoder and decoder share everything but self-attention (`tie_decoder`)
- one image forward serves all losses; the cross-attention keys and values of an image serve the positive
  and the hard negative text
- ITC contrasts with the features of momentum encoders and of their queue, against soft targets; without momentum
  (`MomentumConfig` None) within the batch
- hard negatives of ITM have probability softmax(similarity); pairs of equal texts or of the same image are no
  negatives, in ITC neither the latter

Deviation from the released code: images and texts of all ranks are negatives, of ITM too.

Legend: B images of this rank, A of all ranks, R texts of them (a multiple of B), T tokens, P patches, D width,
E embedding, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from capfilt.models.contrast import Contrast, ImageTextContrast
from capfilt.models.losses import itm_loss, lm_loss
from capfilt.models.med import Captioner, Filter, KeyValue, MEDConfig, tie_decoder
from capfilt.models.momentum import FeatureQueue, MomentumConfig, follow, slow_copy
from capfilt.models.ranks import ALONE, Ranks
from capfilt.models.vit import VisionTransformer


class MomentumEncoders(nn.Module):
    """Slow copies of a filter's image and text encoder with their projections, and the queue of their features."""

    def __init__(self, model: Filter, config: MomentumConfig) -> None:
        super().__init__()
        self.rate = config.rate
        self.filter = slow_copy(model)
        self.filter.itm_head = nn.Identity()  # pyright: ignore[reportAttributeAccessIssue]
        for layer in self.filter.encoder.layers:  # the text encoder of ITC attends to no image
            layer.cross_attention, layer.cross_norm = nn.Identity(), nn.Identity()
        self.queue = FeatureQueue(config.queue_size, model.text_projection.out_features)

    def follow(self, model: Filter) -> None:
        """After a step: go its way after `model`, and put its features into the queue."""
        follow(self.filter, model, self.rate)
        self.queue.push()

    @torch.no_grad()
    def embed(self, images_BCHW: Tensor, tokens_BT: Tensor, mask_BT: Tensor) -> tuple[Tensor, Tensor]:
        """ITC embeddings (B, E) of images and of texts."""
        images_BE = self.filter.embed_images(self.filter.vision(images_BCHW))
        return images_BE, self.filter.embed_texts(tokens_BT, mask_BT)

    def train(self, mode: bool = True) -> MomentumEncoders:
        """The copies stay in eval mode, without dropout."""
        return super().train(False)


class FilterLosses(nn.Module):
    """ITC and ITM of a filter, from pre-training on or for its fine-tuning."""

    def __init__(self, model: Filter, momentum: MomentumConfig | None = None) -> None:
        super().__init__()
        self.model = model
        self.contrast = ImageTextContrast()
        self.momentum = MomentumEncoders(model, momentum) if momentum else None

    def forward(
        self,
        images_BCHW: Tensor,
        features_BPD: Tensor,
        tokens_BT: Tensor,
        losses: Sequence[str] = ("itc", "itm"),
        *,
        ids_B: Tensor | None = None,
        false_tokens_BT: Tensor | None = None,
        uniform_2B: Tensor | None = None,
        alpha: Tensor | float = 0.4,
        ranks: Ranks = ALONE,
    ) -> dict[str, Tensor]:
        """Losses `itc` and `itm` of pairs, those of them that are asked for.

        Args:
            images_BCHW: the images, for the momentum encoders.
            features_BPD: their features.
            tokens_BT: (B, T) texts that begin with [CLS] and end with [SEP], padded; as long on every rank.
            losses: names of the losses; another's name is passed over.
            ids_B: whole numbers, 0 or more, that tell the images apart; None: each is another.
            false_tokens_BT: (B, T) texts known to be false of their image, in place of hard negative texts; a row
                of padding alone where none is known.
            uniform_2B: what draws the hard negatives, see `draw_hard_negatives`: of texts, of images.
            alpha: weight of the momentum encoders' similarities in ITC's targets.
            ranks: whose images and texts are negatives too.
        """
        if "itc" not in losses and "itm" not in losses:
            return {}
        contrast = self._contrast(images_BCHW, features_BPD, tokens_BT, ids_B, alpha, ranks)
        found: dict[str, Tensor] = {}
        if "itc" in losses:
            found["itc"] = contrast.loss()
        if "itm" in losses:
            all_tokens_AT = ranks.gather(tokens_BT)
            other_text, other_image = contrast.hard_negatives(tokens_BT, all_tokens_AT, uniform_2B)
            negative_BT = all_tokens_AT[other_text]
            if false_tokens_BT is not None:
                is_known = (false_tokens_BT != self.model.encoder.config.pad_token_id).any(dim=1, keepdim=True)
                negative_BT = torch.where(is_known, false_tokens_BT, negative_BT)
            found["itm"] = self._itm(features_BPD, tokens_BT, negative_BT, other_image, ranks)
        return found

    def _contrast(
        self,
        images_BCHW: Tensor,
        features_BPD: Tensor,
        tokens_BT: Tensor,
        ids_B: Tensor | None,
        alpha: Tensor | float,
        ranks: Ranks,
    ) -> Contrast:
        mask_BT = tokens_BT != self.model.encoder.config.pad_token_id
        embedded = self.model.embed_images(features_BPD), self.model.embed_texts(tokens_BT, mask_BT)
        if self.momentum is None:
            return self.contrast.within_batch(embedded, ranks, ids_B)
        slow = self.momentum.embed(images_BCHW, tokens_BT, mask_BT)
        return self.contrast.with_queue(embedded, slow, self.momentum.queue, alpha, ranks, ids_B)

    def _itm(
        self, features_BPD: Tensor, tokens_BT: Tensor, negative_BT: Tensor, other_image: Tensor, ranks: Ranks
    ) -> Tensor:
        """B matching pairs, B images with a negative text, B texts with a negative image."""
        encoder = self.model.encoder
        image = encoder.image_key_values(features_BPD)
        both_texts = torch.stack([tokens_BT, negative_BT], dim=1).flatten(0, 1)
        by_image = self._match_logits(both_texts, image)
        if ranks.num_ranks == 1:
            negative_image = [(key[other_image], value[other_image]) for key, value in image]
        else:  # features are gathered, which are less than the keys and values of all layers
            negative_image = encoder.image_key_values(ranks.gather(features_BPD)[other_image])
        by_text = self._match_logits(tokens_BT, negative_image)
        return itm_loss(by_image[0::2], torch.cat([by_image[1::2], by_text]))

    def _match_logits(self, tokens_RT: Tensor, image: list[KeyValue]) -> Tensor:
        encoder = self.model.encoder
        mask_RT = tokens_RT != encoder.config.pad_token_id
        tokens_RT = tokens_RT.clone()
        tokens_RT[:, 0] = encoder.config.enc_token_id
        return self.model.itm_head(encoder(tokens_RT, mask_BT=mask_RT, image=image)[:, 0])


class CaptionerLosses(nn.Module):
    """LM of a captioner; the tokens of the prompt carry no loss."""

    def __init__(self, model: Captioner, *, num_prompt_tokens: int = 0, label_smoothing: float = 0.1) -> None:
        super().__init__()
        self.model = model
        self.num_prompt_tokens = num_prompt_tokens
        self.label_smoothing = label_smoothing

    def forward(self, features_BPD: Tensor, tokens_RT: Tensor, ranks: Ranks = ALONE) -> dict[str, Tensor]:
        """Loss `lm` of texts (R, T) that begin with any token (replaced by [DEC]) and the prompt, if any.

        R is B, or a multiple of it: several texts of each image, side by side. Averaged over the ranks it is the
        mean over the tokens of all.
        """
        decoder = self.model.decoder
        inputs_RT = tokens_RT[:, :-1].clone()
        inputs_RT[:, 0] = decoder.config.dec_token_id
        target_RT = tokens_RT[:, 1:]
        counts = target_RT != decoder.config.pad_token_id
        counts[:, : self.num_prompt_tokens] = False
        hidden_RTD = decoder(inputs_RT, image=decoder.image_key_values(features_BPD))
        logits_NV = self.model.head(hidden_RTD[counts][None])[0]
        return {"lm": lm_loss(logits_NV, target_RT[counts], label_smoothing=self.label_smoothing, ranks=ranks)}


class FineTuning(nn.Module):
    """A captioner or a filter by itself: its losses and their sum `loss`."""

    def __init__(self, losses: CaptionerLosses | FilterLosses) -> None:
        super().__init__()
        self.losses = losses

    def forward(
        self,
        images_BCHW: Tensor,
        tokens_RT: Tensor,
        losses: Sequence[str],
        *,
        ids_B: Tensor | None = None,
        false_tokens_BT: Tensor | None = None,
        uniform_2B: Tensor | None = None,
        alpha: Tensor | float = 0.4,
        ranks: Ranks = ALONE,
    ) -> dict[str, Tensor]:
        """As `Blip.forward`; the captioner's loss is `lm` alone."""
        features_BPD = self.losses.model.vision(images_BCHW)
        if isinstance(self.losses, CaptionerLosses):
            found = self.losses(features_BPD, tokens_RT, ranks)
        else:
            found = self.losses(
                images_BCHW, features_BPD, tokens_RT, losses, ids_B=ids_B,
                false_tokens_BT=false_tokens_BT, uniform_2B=uniform_2B, alpha=alpha, ranks=ranks,
            )  # fmt: skip
        return found | {"loss": torch.stack(list(found.values())).sum()}


class Blip(nn.Module):
    """A captioner and a filter that share one image encoder and all of MED but the self-attention."""

    def __init__(
        self,
        vision: VisionTransformer,
        config: MEDConfig,
        *,
        embed_dim: int = 256,
        label_smoothing: float = 0.1,
    ) -> None:
        super().__init__()
        self.filter = Filter(vision, config, embed_dim=embed_dim)
        self.captioner = Captioner(vision, config)
        tie_decoder(self.captioner.decoder, self.filter.encoder)
        self.captioner.head.vocabulary.weight = self.filter.encoder.word_embedding.weight
        self.filter_losses = FilterLosses(self.filter)
        self.captioner_losses = CaptionerLosses(self.captioner, label_smoothing=label_smoothing)

    def start_momentum(self, config: MomentumConfig | None) -> None:
        """Momentum encoders that start as what is followed; None takes them away."""
        self.filter_losses.momentum = MomentumEncoders(self.filter, config) if config else None

    def forward(
        self,
        images_BCHW: Tensor,
        tokens_RT: Tensor,
        losses: Sequence[str] = ("itc", "itm", "lm"),
        *,
        ids_B: Tensor | None = None,
        false_tokens_BT: Tensor | None = None,
        uniform_2B: Tensor | None = None,
        alpha: Tensor | float = 0.4,
        ranks: Ranks = ALONE,
    ) -> dict[str, Tensor]:
        """The losses asked for of `itc`, `itm` and `lm`, and their sum `loss` (BLIP §3.2).

        Where there are several texts of each image (R = B·N, side by side), LM takes all, the others the first.
        """
        features_BPD = self.filter.vision(images_BCHW)
        first_BT = tokens_RT[:: len(tokens_RT) // len(images_BCHW)]
        found = self.filter_losses(
            images_BCHW, features_BPD, first_BT, losses, ids_B=ids_B,
            false_tokens_BT=false_tokens_BT, uniform_2B=uniform_2B, alpha=alpha, ranks=ranks,
        )  # fmt: skip
        if "lm" in losses:
            found |= self.captioner_losses(features_BPD, tokens_RT, ranks)
        return found | {"loss": torch.stack(list(found.values())).sum()}
