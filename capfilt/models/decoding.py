"""Writing captions with BLIP's captioner: many captions of many images, one token at a time.

In: image features, a prompt, settings. Out: token ids of every caption, prompt and [SEP] left out.

- an image's cross-attention keys and values are computed once and shared by its captions; the prompt is read
  once an image; a caption leaves the batch when it ends (`models.rows`), or on a GPU is no longer looked at, where
  shapes stay the same for CUDA graphs (`models.static_rows`)
- beam search is transformers' (early_stopping False, length penalty 1), whose scores count the repetition
  penalty and divide by the number of tokens after the prompt
- in float32 on a CPU a caption does not depend on the batch around it, to the bit; in bfloat16 there none was seen
  to (AVX512_BF16); on a GPU rounding may depend on the shape of the batch, and so, rarely, may a caption

Legend: B images, N captions per image, R rows of text, T tokens, V vocabulary, P patches, D width.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from capfilt.models.med import Captioner
from capfilt.models.rows import Rows
from capfilt.models.sampling import adjust_logits, choose_tokens, uniforms
from capfilt.models.static_rows import DecodingSteps, StaticRows
from capfilt.settings import CaptionSettings

_IMPOSSIBLE = -1e9  # score of a beam that is none


def write_captions(
    model: Captioner,
    features_BPD: Tensor,
    keys: Sequence[str],
    prompt: Sequence[int],
    settings: CaptionSettings,
    steps: DecodingSteps | None = None,
) -> list[list[list[int]]]:
    """Write `settings.num_captions` captions of each image.

    Args:
        model: in eval mode.
        features_BPD: (B, P + 1, D) from `model.vision`.
        keys: B keys of the samples; with the seed they fix the draws.
        prompt: token ids the captions continue, [DEC] first, fewer than `settings.max_length`.
        settings: decoding and its parameters; lengths count the prompt.
        steps: of `model`, where shapes are to stay the same from step to step; beam search does without.

    Returns:
        Token ids by image and caption, without prompt and [SEP]; no caption of an image whose logits are not finite.
    """
    if len(prompt) >= settings.max_length:
        raise ValueError(f"the prompt has {len(prompt)} tokens, max_length is {settings.max_length}")
    with torch.inference_mode():
        if settings.decoding == "beam":
            written, is_sound = _search_beams(model, features_BPD, prompt, settings)
        else:
            written, is_sound = _sample(model, features_BPD, keys, prompt, settings, steps)
    end = model.decoder.config.sep_token_id
    texts = [_until(row, end) for row in written[:, len(prompt) :].tolist()]
    per_image = len(texts) // len(features_BPD)
    is_image_sound = is_sound.view(-1, per_image).all(dim=1).tolist()
    return [texts[n * per_image : (n + 1) * per_image] if sound else [] for n, sound in enumerate(is_image_sound)]


def _sample(
    model: Captioner,
    features_BPD: Tensor,
    keys: Sequence[str],
    prompt: Sequence[int],
    settings: CaptionSettings,
    steps: DecodingSteps | None,
) -> tuple[Tensor, Tensor]:
    """Nucleus, top-k or greedy: (B·N, max_length) token ids, filled up with [SEP], and (B·N,) if they are sound."""
    end, start, num = model.decoder.config.sep_token_id, len(prompt), settings.num_captions
    if steps is None:
        rows = Rows(model, features_BPD, prompt, settings.max_length)
    else:
        rows = StaticRows(model, features_BPD, prompt, settings.max_length, steps)
    image_of_row = torch.arange(len(keys), device=features_BPD.device).repeat_interleave(num)
    written = image_of_row.new_full((len(image_of_row), settings.max_length), end)
    written[:, :start] = torch.tensor(list(prompt), device=written.device)
    is_sound = torch.ones_like(image_of_row, dtype=torch.bool)
    num_steps = settings.max_length - start
    draws = np.stack([uniforms(settings.seed, key, index, num_steps) for key in keys for index in range(num)])
    device = features_BPD.device
    draw_on = torch.device("cpu") if device.type == "mps" else device  # Apple's GPUs have no float64
    draws_RT = torch.from_numpy(draws).to(draw_on)
    caption_of_row = torch.arange(len(written), device=written.device)  # the captions still under way
    logits_RV = rows.logits_BV[image_of_row]
    rows.repeat(num)
    for length in range(start, settings.max_length):
        tokens_RT = written[caption_of_row, :length]
        adjust_logits(
            logits_RV, tokens_RT, end_token_id=end, repetition_penalty=settings.repetition_penalty,
            min_length=settings.min_length,
        )  # fmt: skip
        draws_R = draws_RT[caption_of_row.to(draw_on), length - start]
        next_R = choose_tokens(logits_RV.to(draw_on), draws_R, settings).to(device)
        is_sound[caption_of_row] = next_R >= 0
        next_R = next_R.where(next_R >= 0, end)
        written[caption_of_row, length] = next_R
        live = (next_R != end).nonzero()[:, 0]
        if length + 1 == settings.max_length or not len(live):
            break
        if len(live) < len(next_R):
            live = rows.retain(live)
            caption_of_row = caption_of_row[live]
        logits_RV = rows.append(next_R[live])
    return written, is_sound


def _search_beams(
    model: Captioner, features_BPD: Tensor, prompt: Sequence[int], settings: CaptionSettings
) -> tuple[Tensor, Tensor]:
    """Beam search: (B, max_length) token ids of each image's best text, filled up with [SEP]; (B,) if it is sound."""
    config, start, beams, device = model.decoder.config, len(prompt), settings.num_beams, features_BPD.device
    end, batch = config.sep_token_id, len(features_BPD)
    rows = Rows(model, features_BPD, prompt, settings.max_length)
    best = torch.full((batch, settings.max_length), end, device=device)
    is_sound = torch.ones(batch, dtype=torch.bool, device=device)
    image_of_group = torch.arange(batch, device=device)  # the images still under way, `beams` rows each
    running = best[:, None].repeat(1, beams, 1)
    running[:, :, :start] = torch.tensor(list(prompt), device=device)
    finished, finished_scores = running.clone(), torch.full((batch, beams), _IMPOSSIBLE, device=device)
    running_scores = torch.full((batch, beams), _IMPOSSIBLE, device=device)
    running_scores[:, 0] = 0.0  # the beams are equal at first: only one may grow
    logits_RV = rows.logits_BV.repeat_interleave(beams, 0)
    rows.repeat(beams)
    for length in range(start, settings.max_length):
        scores_RV = adjust_logits(
            logits_RV.log_softmax(dim=1), running.flatten(0, 1)[:, :length], end_token_id=end,
            repetition_penalty=settings.repetition_penalty, min_length=settings.min_length,
        )  # fmt: skip
        is_sound[image_of_group] &= scores_RV.amax(dim=1).isfinite().view(-1, beams).all(dim=1)
        grown_scores, grown, parents = _grow(running, running_scores, scores_RV, length)
        ends = (grown[:, :, length] == end) | (length + 1 == settings.max_length)
        running_scores, kept = (grown_scores + ends * _IMPOSSIBLE).topk(beams)
        running, parents = _pick(grown, kept), parents.gather(1, kept)
        finished, finished_scores = _finish(finished, finished_scores, grown, grown_scores, ends, length + 1 - start)
        best[image_of_group] = finished[:, 0]
        # An image is done when no running text could replace its worst finished one, says transformers.
        open_ = (running_scores[:, 0] / (length + 1 - start) > finished_scores.amin(1)).nonzero()[:, 0]
        if length + 1 == settings.max_length or not len(open_):
            break
        rows.keep((parents + torch.arange(len(parents), device=device)[:, None] * beams)[open_].flatten())
        image_of_group, running, running_scores = image_of_group[open_], running[open_], running_scores[open_]
        finished, finished_scores = finished[open_], finished_scores[open_]
        logits_RV = rows.append(running[:, :, length].flatten())
    return best, is_sound


def _grow(running: Tensor, running_scores: Tensor, scores_RV: Tensor, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """The best 2·beams texts one token longer: scores (B, 2·beams), tokens, the beam each continues."""
    batch, beams = running_scores.shape
    vocab_size = scores_RV.shape[1]
    total = (scores_RV.view(batch, beams, vocab_size) + running_scores[:, :, None]).flatten(1)
    scores, index = total.topk(2 * beams)
    grown = _pick(running, index // vocab_size)
    grown[:, :, length] = index % vocab_size
    return scores, grown, index // vocab_size


def _finish(
    finished: Tensor, finished_scores: Tensor, grown: Tensor, grown_scores: Tensor, ends: Tensor, num_new: int
) -> tuple[Tensor, Tensor]:
    """The best texts that have ended, with those that end now and are among the best `beams` of all."""
    beams = finished_scores.shape[1]
    among_best = torch.arange(grown_scores.shape[1], device=ends.device) < beams
    scores = (grown_scores / num_new).masked_fill(~(ends & among_best), _IMPOSSIBLE)
    scores, kept = torch.cat([finished_scores, scores], dim=1).topk(beams)
    return _pick(torch.cat([finished, grown], dim=1), kept), scores


def _pick(texts_BNT: Tensor, index_BN: Tensor) -> Tensor:
    return texts_BNT.gather(1, index_BN[:, :, None].expand(-1, -1, texts_BNT.shape[2]))


def _until(tokens: list[int], end: int) -> list[int]:
    return tokens[: tokens.index(end)] if end in tokens else tokens
