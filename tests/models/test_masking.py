"""Masked tokens: which, how often, by what, and that they depend on their numbers alone."""

from __future__ import annotations

import torch

from capfilt.models.masking import NUM_DRAWS, MaskingConfig, mask_tokens

PAD, CLS, SEP, MASK = 0, 1, 2, 3
CONFIG = MaskingConfig(mask_token_id=MASK, special_token_ids=(PAD, CLS, SEP, MASK), vocab_size=1000)


def draw(num_texts: int, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(4, 1000, (num_texts, num_tokens), generator=generator)
    tokens[:, 0], tokens[:, -3], tokens[:, -2:] = CLS, SEP, PAD
    return tokens, torch.rand(NUM_DRAWS, num_texts, num_tokens, generator=generator)


def test_shares_of_what_is_masked_replaced_and_kept() -> None:
    tokens, uniform = draw(4000, 40)
    read, chosen = mask_tokens(tokens, uniform, CONFIG)
    words = tokens > MASK
    num_words = int(words.sum())
    assert not chosen[~words].any(), "special tokens and padding are never chosen"
    assert torch.equal(read[~chosen], tokens[~chosen])
    assert abs(int(chosen.sum()) / num_words - 0.15) < 0.005
    masked, kept = chosen & (read == MASK), chosen & (read == tokens)
    replaced = chosen & ~masked & ~kept
    for part, share in ((masked, 0.8), (replaced, 0.1), (kept, 0.1)):
        assert abs(int(part.sum()) / int(chosen.sum()) - share) < 0.01
    assert read[replaced].unique().numel() > 800, "any token of the vocabulary"
    assert int(read.max()) < 1000


def test_rows_and_padding_do_not_change_a_choice() -> None:
    tokens, uniform = draw(6, 12)
    read, chosen = mask_tokens(tokens, uniform, CONFIG)
    for row in range(6):
        alone, chosen_alone = mask_tokens(tokens[[row], :9], uniform[:, [row], :9], CONFIG)
        assert torch.equal(alone[0], read[row, :9])
        assert torch.equal(chosen_alone[0], chosen[row, :9])


def test_the_share_is_a_setting() -> None:
    tokens, uniform = draw(50, 20)
    everything = MaskingConfig(mask_token_id=MASK, special_token_ids=(PAD, CLS, SEP), vocab_size=1000, share=1.0)
    assert torch.equal(mask_tokens(tokens, uniform, everything)[1], tokens > MASK)
