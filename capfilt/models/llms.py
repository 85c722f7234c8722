"""Frozen language models behind the Q-Former: OPT and T5 of any size, in transformers' layout (BLIP-2 §3.3).

In: soft visual prompts and texts. Out: the loss of captions or of texts behind prompts, or generated texts. The model
itself is transformers' own; this module builds its inputs and reads its outputs.

- a decoder (OPT): visual prompts, bos, prompt, caption, newline; the newline is the end token; LM loss on the
  caption and the newline only
- an encoder-decoder (T5): visual prompts and a prefix of the caption, or the prompt, go to the encoder, the rest is
  the decoder's target (prefix LM)

To add another family: a class with the methods of `LanguageModel` and an entry in `LLMS`.

Legend: B batch, Q visual prompts, T tokens, W width of the language model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GenerationConfig, OPTForCausalLM, T5ForConditionalGeneration

from capfilt.errors import UsageError
from capfilt.models.losses import lm_loss
from capfilt.models.ranks import ALONE, Ranks

MAX_TOKENS = 32
"""Longest caption that is trained on, in tokens (released code: 32), an OPT's end token included, a T5's not. Prompts
are never cut. A caption that is cut ends as others do, with the end token (released code: without)."""


class LanguageModel(Protocol):
    """What stage 2 and generation need of a language model; all of them are modules with frozen weights."""

    width: int
    """Width of its input embeddings."""
    model: Any
    """transformers' model."""
    tokenizer: Any
    """transformers' tokenizer."""
    question_prompt: str
    """Frame of a question, with {} for it (BLIP-2 §4.1)."""
    end_token_id: int
    """The token that ends a generated text."""

    def caption_loss(
        self, visual_BQW: Tensor, texts: Sequence[str], ranks: Ranks = ALONE, draws: Sequence[float] | None = None
    ) -> Tensor:
        """Mean cross-entropy per predicted token of the texts, given the visual prompts.

        Averaged over the ranks it is the mean over the tokens of all. `draws` in [0, 1) make what is drawn for each
        text (T5: where it is split); None takes torch's generator.
        """
        ...

    def continuation_loss(
        self, visual_BQW: Tensor, prompts: Sequence[str], texts: Sequence[str], ranks: Ranks = ALONE
    ) -> Tensor:
        """Mean cross-entropy per token of the texts, each behind visual prompts and its prompt, as `generate` has them.

        The end of a text is predicted too; visual prompts and prompts carry no loss. Ranks as in `caption_loss`.
        """
        ...

    def generate(self, visual_BQW: Tensor, prompts: Sequence[str], **options: Any) -> list[str]:
        """Texts that continue (OPT) or answer (T5) the prompts; options as transformers' GenerationConfig."""
        ...

    def eval(self) -> Any: ...


class OPT(nn.Module):
    """A decoder-only language model."""

    question_prompt = "Question: {} Answer:"

    def __init__(self, model: Any, tokenizer: Any) -> None:
        super().__init__()
        self.model, self.tokenizer = model, tokenizer
        self.width = model.get_input_embeddings().weight.shape[1]
        self.bos_token_id = int(model.config.bos_token_id)
        self.end_token_id = _newline_token_id(tokenizer)

    def caption_loss(
        self, visual_BQW: Tensor, texts: Sequence[str], ranks: Ranks = ALONE, draws: Sequence[float] | None = None
    ) -> Tensor:
        """LM loss on caption and newline; visual prompts and bos carry none."""
        return self.continuation_loss(visual_BQW, [""] * len(texts), texts, ranks)

    def continuation_loss(
        self, visual_BQW: Tensor, prompts: Sequence[str], texts: Sequence[str], ranks: Ranks = ALONE
    ) -> Tensor:
        """LM loss on text and newline. UsageError where the model has not the positions for a prompt and its text."""
        starts = [[self.bos_token_id, *self._encode(prompt)] for prompt in prompts]
        ends = [self._continue(prompt, text) for prompt, text in zip(prompts, texts, strict=True)]
        self._refuse_long(starts, prompts, [visual_BQW.shape[1] + len(end) for end in ends])
        rows = [start + end for start, end in zip(starts, ends, strict=True)]
        tokens, mask = _pad(rows, pad=self.end_token_id, device=visual_BQW.device)
        hidden = self._hidden(visual_BQW, tokens, mask)[:, visual_BQW.shape[1] : -1]
        lengths_B1 = torch.tensor([[len(start)] for start in starts], device=tokens.device)
        places_T = torch.arange(1, tokens.shape[1], device=tokens.device)
        predicted = mask[:, 1:] & (places_T >= lengths_B1)
        logits = self.model.lm_head(hidden[predicted])
        return lm_loss(logits, tokens[:, 1:][predicted], label_smoothing=0.0, ranks=ranks)

    @torch.no_grad()
    def generate(self, visual_BQW: Tensor, prompts: Sequence[str], **options: Any) -> list[str]:
        """What follows each prompt, up to the newline."""
        rows = [[self.bos_token_id, *self._encode(p)] for p in prompts]
        others = visual_BQW.shape[1] + options.get("max_new_tokens", 0)
        self._refuse_long(rows, prompts, [others] * len(rows))
        tokens, mask = _pad(rows, pad=self.end_token_id, device=visual_BQW.device, left=True)
        inputs, mask = self._inputs(visual_BQW, tokens, mask)
        settings = _generation_config(self.end_token_id, self.end_token_id, options)
        found = self.model.generate(inputs_embeds=inputs, attention_mask=mask, generation_config=settings)
        return _decode(self.tokenizer, found, self.end_token_id)

    def _refuse_long(self, rows: Sequence[Sequence[int]], prompts: Sequence[str], others: Sequence[int]) -> None:
        """The model has so many positions and no more; `others` are those that each prompt cannot have."""
        num_positions = int(self.model.config.max_position_embeddings)
        for row, prompt, needed in zip(rows, prompts, others, strict=True):
            if len(row) + needed > num_positions:
                raise UsageError(
                    f"The prompt {prompt[:60]!r} has {len(row)} tokens; with {needed} for image and text the language "
                    f"model takes {num_positions}. Give a shorter prompt, or fewer new tokens."
                )

    def _continue(self, prompt: str, text: str) -> list[int]:
        """The tokens that follow a prompt: a space stands between, which OPT's tokenizer takes into the first word."""
        return [*self._encode(f" {text}" if prompt else text)[: MAX_TOKENS - 1], self.end_token_id]

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids if text else []

    def _hidden(self, visual_BQW: Tensor, tokens_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """Features (B, Q + T, W) below the vocabulary matrix, which is applied to predicted places only."""
        inputs, mask = self._inputs(visual_BQW, tokens_BT, mask_BT)
        return self.model.model(inputs_embeds=inputs, attention_mask=mask, use_cache=False).last_hidden_state

    def _inputs(self, visual_BQW: Tensor, tokens_BT: Tensor, mask_BT: Tensor) -> tuple[Tensor, Tensor]:
        embedded = self.model.get_input_embeddings()(tokens_BT)
        return _prepend(visual_BQW, embedded, mask_BT)


class T5(nn.Module):
    """An encoder-decoder language model."""

    question_prompt = "Question: {} Short answer:"

    def __init__(self, model: Any, tokenizer: Any) -> None:
        super().__init__()
        self.model, self.tokenizer = model, tokenizer
        self.width = model.get_input_embeddings().weight.shape[1]
        self.end_token_id = int(model.config.eos_token_id)
        self.pad_token_id = int(model.config.pad_token_id)
        self.whole_caption_share = 0.0
        """Share of captions trained with an empty prefix (the paper: none). Without some, a caption cannot be
        asked for without its first word."""

    def caption_loss(
        self, visual_BQW: Tensor, texts: Sequence[str], ranks: Ranks = ALONE, draws: Sequence[float] | None = None
    ) -> Tensor:
        """Prefix LM: the text is split between its first word and its middle, see `split_caption`."""
        draws = torch.rand(len(texts)).tolist() if draws is None else draws
        parts = [split_caption(t, d, self.whole_caption_share) for t, d in zip(texts, draws, strict=True)]
        prefix = self._encode_batch([p for p, _ in parts], visual_BQW.device, MAX_TOKENS)
        return self._target_loss(visual_BQW, prefix, [rest for _, rest in parts], ranks)

    def continuation_loss(
        self, visual_BQW: Tensor, prompts: Sequence[str], texts: Sequence[str], ranks: Ranks = ALONE
    ) -> Tensor:
        """The prompts go to the encoder, the texts are the decoder's targets."""
        return self._target_loss(visual_BQW, self._encode_batch(prompts, visual_BQW.device), texts, ranks)

    def _target_loss(
        self, visual_BQW: Tensor, encoded: tuple[Tensor, Tensor], targets: Sequence[str], ranks: Ranks
    ) -> Tensor:
        """Cross-entropy of the targets, given visual prompts and what the encoder reads behind them (tokens, mask)."""
        tokens, mask = encoded
        inputs, mask = _prepend(visual_BQW, self.model.get_input_embeddings()(tokens), mask)
        target, target_mask = self._encode_batch(targets, visual_BQW.device, MAX_TOKENS)
        shifted = F.pad(target[:, :-1], (1, 0), value=self.model.config.decoder_start_token_id)
        output = self.model(inputs_embeds=inputs, attention_mask=mask, decoder_input_ids=shifted, use_cache=False)
        return lm_loss(output.logits[target_mask], target[target_mask], label_smoothing=0.0, ranks=ranks)

    @torch.no_grad()
    def generate(self, visual_BQW: Tensor, prompts: Sequence[str], **options: Any) -> list[str]:
        """What the decoder writes for visual prompts and prompt."""
        tokens, mask = self._encode_batch(prompts, visual_BQW.device)
        inputs, mask = _prepend(visual_BQW, self.model.get_input_embeddings()(tokens), mask)
        settings = _generation_config(self.end_token_id, self.pad_token_id, options)
        settings.decoder_start_token_id = self.model.config.decoder_start_token_id
        found = self.model.generate(inputs_embeds=inputs, attention_mask=mask, generation_config=settings)
        return _decode(self.tokenizer, found[:, 1:], self.end_token_id)

    def _encode_batch(
        self, texts: Sequence[str], device: torch.device, max_tokens: int | None = None
    ) -> tuple[Tensor, Tensor]:
        rows = [[*self.tokenizer(t, add_special_tokens=False).input_ids[:max_tokens], self.end_token_id] for t in texts]
        return _pad(rows, pad=self.pad_token_id, device=device)


def split_caption(text: str, draw: float, whole_share: float = 0.0) -> tuple[str, str]:
    """Prefix and rest of a caption, as `draw` in [0, 1) says (BLIP-2 §3.3).

    A share `whole_share` of the draws gives an empty prefix, the others a place between the first word and the middle.
    """
    words = text.split()
    if draw < whole_share or len(words) < 2:
        return "", text
    place = 1 + int((draw - whole_share) / (1 - whole_share) * max(1, len(words) // 2))
    return " ".join(words[:place]), " ".join(words[place:])


LLMS: dict[str, tuple[type[OPT] | type[T5], Any]] = {
    "opt": (OPT, OPTForCausalLM),
    "t5": (T5, T5ForConditionalGeneration),
}
"""Family (transformers' model_type) → our class and transformers'."""


def wrap_llm(model: Any, tokenizer: Any) -> LanguageModel:
    """Our class around a transformers model, frozen and in eval mode."""
    model.requires_grad_(False)
    return LLMS[model.config.model_type][0](model, tokenizer).eval()


def _newline_token_id(tokenizer: Any) -> int:
    """The newline's only token; eos where the tokenizer has no newline of its own."""
    found = tokenizer("\n", add_special_tokens=False).input_ids
    single = len(found) == 1 and found[0] != tokenizer.unk_token_id
    return int(found[0] if single else tokenizer.eos_token_id)


def _pad(rows: Sequence[Sequence[int]], *, pad: int, device: torch.device, left: bool = False) -> tuple[Tensor, Tensor]:
    """Token ids (B, T) and a boolean mask, True at tokens."""
    longest = max(len(row) for row in rows)
    blanks = [longest - len(row) for row in rows]
    if left:
        tokens = [[pad] * n + list(row) for row, n in zip(rows, blanks, strict=True)]
        mask = [[False] * n + [True] * len(row) for row, n in zip(rows, blanks, strict=True)]
    else:
        tokens = [list(row) + [pad] * n for row, n in zip(rows, blanks, strict=True)]
        mask = [[True] * len(row) + [False] * n for row, n in zip(rows, blanks, strict=True)]
    return torch.tensor(tokens, device=device), torch.tensor(mask, device=device)


def _prepend(visual_BQW: Tensor, embedded_BTW: Tensor, mask_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Visual prompts before text, and the joint mask as int64, which transformers expects."""
    inputs = torch.cat([visual_BQW.to(embedded_BTW.dtype), embedded_BTW], dim=1)
    mask = torch.cat([mask_BT.new_ones(visual_BQW.shape[:2]), mask_BT], dim=1)
    return inputs, mask.long()


def _generation_config(end_token_id: int, pad_token_id: int, options: dict[str, Any]) -> GenerationConfig:
    return GenerationConfig(eos_token_id=end_token_id, pad_token_id=pad_token_id, **{"do_sample": False, **options})


def _decode(tokenizer: Any, tokens_BT: Tensor, end_token_id: int) -> list[str]:
    texts = []
    for row in tokens_BT.tolist():
        row = row[: row.index(end_token_id)] if end_token_id in row else row
        texts.append(tokenizer.decode(row, skip_special_tokens=True).strip())
    return texts
