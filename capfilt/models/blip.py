"""BLIP for pre-training: one image encoder, MED's encoder and decoder, the heads of ITC, ITM and LM.

In: images and token ids. Out: the losses ITC, ITM and LM (BLIP §3.2).

- encoder and decoder share everything but self-attention (`tie_decoder`)
- one image forward serves all losses; the cross-attention keys and values of an image serve the positive
  and the hard negative text
- negatives come from the batch, with probability softmax(similarity); pairs of equal texts are no negatives

Deviation from the paper: no momentum encoders, queue or soft targets; ITC contrasts within the batch.

Legend: B images, R texts of them (a multiple of B), T tokens, P patches, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from capfilt.models.losses import draw_hard_negatives, itc_loss, itm_loss, lm_loss
from capfilt.models.med import Captioner, Filter, KeyValue, MEDConfig, tie_decoder
from capfilt.models.vit import VisionTransformer


class ImageTextContrast(nn.Module):
    """The learned temperature of ITC (0.07 at first, kept in 0.001 to 0.5, as BLIP's released code does)."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor(0.07))

    def forward(self, images_BE: Tensor, texts_BE: Tensor) -> Tensor:
        """Similarities over temperature, (B, B), images in rows."""
        return images_BE @ texts_BE.T / self.temperature.clamp(0.001, 0.5)


class FilterLosses(nn.Module):
    """ITC and ITM of a filter, from pre-training on or for its fine-tuning."""

    def __init__(self, model: Filter) -> None:
        super().__init__()
        self.model = model
        self.contrast = ImageTextContrast()

    def forward(
        self,
        features_BPD: Tensor,
        tokens_BT: Tensor,
        losses: Sequence[str] = ("itc", "itm"),
        false_tokens_BT: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Losses `itc` and `itm` of pairs, those of them that are asked for.

        Args:
            features_BPD: image features.
            tokens_BT: (B, T) texts that begin with [CLS] and end with [SEP], padded.
            losses: names of the losses; another's name is passed over.
            false_tokens_BT: (B, T) texts known to be false of their image, in place of hard negative texts; a row
                of padding alone where none is known.
        """
        if "itc" not in losses and "itm" not in losses:
            return {}
        config = self.model.encoder.config
        mask_BT = tokens_BT != config.pad_token_id
        images_BE = self.model.embed_images(features_BPD)
        texts_BE = self.model.embed_texts(tokens_BT, mask_BT)
        similarity_BB = self.contrast(images_BE, texts_BE)
        found: dict[str, Tensor] = {}
        if "itc" in losses:
            found["itc"] = itc_loss(similarity_BB, similarity_BB.T)
        if "itm" in losses:
            same_text = (tokens_BT[:, None] == tokens_BT[None]).all(dim=2)
            similarity_BB = similarity_BB.detach()
            negative_BT = tokens_BT[draw_hard_negatives(similarity_BB, same_text)]
            if false_tokens_BT is not None:
                is_known = (false_tokens_BT != config.pad_token_id).any(dim=1, keepdim=True)
                negative_BT = torch.where(is_known, false_tokens_BT, negative_BT)
            other_image = draw_hard_negatives(similarity_BB.T, same_text)
            found["itm"] = self._itm(features_BPD, tokens_BT, negative_BT, other_image)
        return found

    def _itm(self, features_BPD: Tensor, tokens_BT: Tensor, negative_BT: Tensor, other_image: Tensor) -> Tensor:
        """B matching pairs, B images with a negative text, B texts with a negative image."""
        image = self.model.encoder.image_key_values(features_BPD)
        both_texts = torch.stack([tokens_BT, negative_BT], dim=1).flatten(0, 1)
        by_image = self._match_logits(both_texts, image)
        by_text = self._match_logits(tokens_BT, [(key[other_image], value[other_image]) for key, value in image])
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

    def forward(self, features_BPD: Tensor, tokens_RT: Tensor) -> dict[str, Tensor]:
        """Loss `lm` of texts (R, T) that begin with any token (replaced by [DEC]) and the prompt, if any.

        R is B, or a multiple of it: several texts of each image, side by side.
        """
        decoder = self.model.decoder
        inputs_RT = tokens_RT[:, :-1].clone()
        inputs_RT[:, 0] = decoder.config.dec_token_id
        target_RT = tokens_RT[:, 1:]
        counts = target_RT != decoder.config.pad_token_id
        counts[:, : self.num_prompt_tokens] = False
        hidden_RTD = decoder(inputs_RT, image=decoder.image_key_values(features_BPD))
        logits_NV = self.model.head(hidden_RTD[counts][None])[0]
        return {"lm": lm_loss(logits_NV, target_RT[counts], label_smoothing=self.label_smoothing)}


class Blip(nn.Module):
    """A captioner and a filter that share one image encoder and all of MED but the self-attention."""

    def __init__(
        self, vision: VisionTransformer, config: MEDConfig, *, embed_dim: int = 256, label_smoothing: float = 0.1
    ) -> None:
        super().__init__()
        self.filter = Filter(vision, config, embed_dim=embed_dim)
        self.captioner = Captioner(vision, config)
        tie_decoder(self.captioner.decoder, self.filter.encoder)
        self.captioner.head.vocabulary.weight = self.filter.encoder.word_embedding.weight
        self.filter_losses = FilterLosses(self.filter)
        self.captioner_losses = CaptionerLosses(self.captioner, label_smoothing=label_smoothing)

    def forward(
        self,
        images_BCHW: Tensor,
        tokens_RT: Tensor,
        losses: Sequence[str] = ("itc", "itm", "lm"),
        false_tokens_BT: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The losses asked for of `itc`, `itm` and `lm`, and their sum `loss` (BLIP §3.2).

        Where there are several texts of each image (R = B·N, side by side), LM takes all, the others the first.
        """
        features_BPD = self.filter.vision(images_BCHW)
        first_BT = tokens_RT[:: len(tokens_RT) // len(images_BCHW)]
        found = self.filter_losses(features_BPD, first_BT, losses, false_tokens_BT)
        if "lm" in losses:
            found |= self.captioner_losses(features_BPD, tokens_RT)
        return found | {"loss": torch.stack(list(found.values())).sum()}
