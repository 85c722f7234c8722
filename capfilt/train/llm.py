"""Pre-train a small OPT or T5 so that what it writes goes by what stands before.

In: JSON lines of `LlmText` (preamble, question, text), a tokenizer's folder. Out: a folder that plain
transformers opens: config.json, generation_config.json, model.safetensors (float16) and the tokenizer's
files.

BLIP-2's stage 2 freezes the language model and puts visual prompts in front of its text (BLIP-2 §3.3). So the
preamble is put where they will stand, in the very forms that `capfilt.models.llms` builds around them:

    OPT   preamble </s> caption newline             preamble </s> Question: … Answer: answer newline
    T5    preamble prefix </s> -> rest </s>         preamble Question: … Short answer: </s> -> answer </s>

Words of a preamble that are joined by "+" stand at one place: their embeddings are summed there, as a visual
prompt says several things at once. The loss is on caption, rest and answer alone. A T5 caption is split as in
stage 2: before its first word, or between the first word and the middle.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    GenerationConfig,
    OPTConfig,
    OPTForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.utils import logging as transformers_logging

from capfilt.data.commit import file_sha256
from capfilt.data.llm_texts import LlmText, read_llm_texts
from capfilt.errors import UsageError
from capfilt.models.llms import OPT, T5, split_caption
from capfilt.progress import NullProgress, Progress
from capfilt.settings import LlmTrainSettings
from capfilt.train.batches import Batch, Cursor, Draws, draw
from capfilt.train.loop import TrainSummary, train
from capfilt.train.processes import join_processes
from capfilt.train.tokenizer_files import save_tokenizer
from capfilt.weights.model_files import load_tokenizer, save_tensors, weights_digest

HEAD_WIDTH = 32
"""Width of an attention head (OPT: 64); there are too few channels here for wider ones."""

POOL_BATCHES = 16
"""Texts of so many batches are sorted by length before they are cut into batches, to pad less."""

_SUMMED = re.compile(r"((?:^|\s)\S+\+\S+)")


@dataclass
class TextBatch(Batch):
    """A batch without pictures: the texts of a step, and the row of each in its file as key."""

    llm_texts: list[LlmText] = field(default_factory=list)
    epoch: int = 0


@dataclass(frozen=True, slots=True)
class Encoded:
    """A text in tokens: what is read, each place with the ids that are summed there, and what is to be written."""

    given: list[list[int]]
    written: list[int]


def train_llm(
    texts_file: str | Path,
    tokenizer_dir: Path,
    settings: LlmTrainSettings,
    output_dir: Path,
    progress: Progress | None = None,
) -> TrainSummary:
    """Trains on a file of texts. Errors as those of `read_llm_texts`, `load_tokenizer` and `train`."""
    texts = read_llm_texts(texts_file)
    fields = {"input": file_sha256(Path(texts_file)), "tokenizer_sha256": weights_digest(tokenizer_dir)}
    return train_llm_on(texts, tokenizer_dir, settings, output_dir, progress=progress, fields=fields)


def train_llm_on(
    texts: Sequence[LlmText],
    tokenizer_dir: Path,
    settings: LlmTrainSettings,
    output_dir: Path,
    *,
    progress: Progress | None = None,
    fields: Mapping[str, Any] | None = None,
) -> TrainSummary:
    """Trains on texts in memory; `fields` identify them."""
    processes = join_processes(settings)
    if processes.num > 1:
        raise UsageError("A small language model is trained by one process; start `capfilt train llm` by itself.")
    torch.manual_seed(settings.seed)
    tokenizer = load_tokenizer(tokenizer_dir)
    llm = ARCHITECTURES[settings.architecture].build(tokenizer, settings)
    llm.model.to(processes.device).train()

    def prepare(batch: Batch, _draws: Draws) -> dict[str, Any]:
        assert isinstance(batch, TextBatch)
        splits = [draw(settings.seed, batch.epoch, key, "split") / 2**64 for key in batch.keys]
        return {"encoded": [llm.encode(t, s) for t, s in zip(batch.llm_texts, splits, strict=True)]}

    return train(
        LlmLosses(llm),
        prepare,
        open_batches=lambda cursor: iterate_text_batches(texts, settings, cursor),
        settings=settings,
        output_dir=output_dir,
        save=lambda folder: _save(folder, llm),
        processes=processes,
        progress=progress or NullProgress(),
        name=settings.architecture,
        fields=fields,
    )


class LlmLosses(nn.Module):
    """Mean cross-entropy per written token."""

    def __init__(self, llm: Pretraining) -> None:
        super().__init__()
        self.model = llm.model
        self._llm = llm

    def forward(self, encoded: Sequence[Encoded]) -> dict[str, Tensor]:
        """`loss`."""
        return {"loss": self._llm.loss(encoded, self.model.device)}


def iterate_text_batches(texts: Sequence[LlmText], settings: LlmTrainSettings, cursor: Cursor) -> Iterator[TextBatch]:
    """The endless stream from `cursor` on; order pure in (seed, epoch), texts of about one length together.

    `cursor.position` counts texts. Raises UsageError where the texts do not fill one batch.
    """
    size = settings.batch_size
    if len(texts) < size:
        raise UsageError(f"{len(texts)} texts do not fill a batch of {size}. Lower --batch-size, or give more texts.")
    lengths = np.array([len(t.preamble) + len(t.question) + len(t.text) for t in texts])
    epoch, position = cursor.epoch, cursor.position
    no_pixels = np.empty((0, 0, 0, 3), np.uint8)
    while True:
        batches = _batches_of_epoch(lengths, size, settings.seed, epoch)
        while position + size <= size * len(batches):
            rows = batches[position // size]
            position += size
            chosen = [texts[row] for row in rows]
            yield TextBatch(
                no_pixels, [t.text for t in chosen], [f"{row:09d}" for row in rows], Cursor(epoch, position),
                rows, llm_texts=chosen, epoch=epoch,
            )  # fmt: skip
        epoch, position = epoch + 1, 0


class OptPretraining:
    """A decoder that learns captions and answers after a preamble."""

    def __init__(self, model: OPTForCausalLM, tokenizer: Any) -> None:
        self.model: Any = model
        self.tokenizer = tokenizer
        self.newline_id = int(tokenizer("\n", add_special_tokens=False).input_ids[-1])
        self.max_tokens = int(model.config.max_position_embeddings)
        self.generation = GenerationConfig(
            bos_token_id=tokenizer.bos_token_id, pad_token_id=tokenizer.pad_token_id,
            eos_token_id=[self.newline_id, tokenizer.eos_token_id], max_new_tokens=32,
        )  # fmt: skip

    @classmethod
    def build(cls, tokenizer: Any, settings: LlmTrainSettings) -> OptPretraining:
        """An untrained model of the settings' sizes; the weights start larger than OPT's where it is narrower."""
        config = OPTConfig(
            vocab_size=len(tokenizer), hidden_size=settings.width, word_embed_proj_dim=settings.width,
            num_hidden_layers=settings.depth, ffn_dim=settings.feed_forward,
            num_attention_heads=settings.width // HEAD_WIDTH, max_position_embeddings=settings.max_positions,
            dropout=0.0, attention_dropout=0.0, init_std=0.02 * math.sqrt(768 / settings.width),
            pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
        return cls(OPTForCausalLM(config), tokenizer)

    def encode(self, text: LlmText, _split: float = 0.0) -> Encoded:
        """Given: preamble, </s>, the question in its frame. Written: caption or answer, newline.

        What is too long for the position table is cut: what is given at its start, what is written at its end.
        """
        question = OPT.question_prompt.format(text.question) if text.question else ""
        asked = [self.tokenizer.bos_token_id, *_ids(self.tokenizer, question)]
        given = [*_places(self.tokenizer, text.preamble), *([token] for token in asked)]
        words = f" {text.text}" if text.question else text.text
        written = [*_ids(self.tokenizer, words), self.newline_id][: self.max_tokens - 1]
        return Encoded(given[len(written) - self.max_tokens :], written)

    def loss(self, encoded: Sequence[Encoded], device: torch.device) -> Tensor:
        """Mean cross-entropy per written token."""
        given, mask = self._embed([[*e.given, *([token] for token in e.written)] for e in encoded], device)
        first = torch.tensor([len(e.given) for e in encoded], device=device)
        places = torch.arange(mask.shape[1], device=device)
        target = mask.bool() & (places >= first[:, None])
        hidden = self.model.model(inputs_embeds=given, attention_mask=mask, use_cache=False).last_hidden_state
        logits = self.model.lm_head(hidden[:, :-1][target[:, 1:]])
        return F.cross_entropy(logits, torch.tensor([token for e in encoded for token in e.written], device=device))

    def write(self, encoded: Sequence[Encoded], device: torch.device) -> list[list[int]]:
        """Greedy continuations of what is given."""
        given, mask = self._embed([e.given for e in encoded], device, left=True)
        found = self.model.generate(inputs_embeds=given, attention_mask=mask, generation_config=self.generation)
        return found.tolist()

    def _embed(
        self, rows: Sequence[Sequence[Sequence[int]]], device: torch.device, *, left: bool = False
    ) -> tuple[Tensor, Tensor]:
        return _embed(self.model.get_input_embeddings(), rows, device, left=left)


class T5Pretraining:
    """An encoder-decoder that learns the rest of a caption, or an answer, after a preamble."""

    def __init__(self, model: T5ForConditionalGeneration, tokenizer: Any, whole_share: float = 1.0) -> None:
        self.model: Any = model
        self.tokenizer = tokenizer
        self.whole_share = whole_share
        self.generation = GenerationConfig(
            pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
            decoder_start_token_id=tokenizer.pad_token_id, max_new_tokens=32,
        )  # fmt: skip

    @classmethod
    def build(cls, tokenizer: Any, settings: LlmTrainSettings) -> T5Pretraining:
        """An untrained model of the settings' sizes, FlanT5's variant: gated GELU, outputs not scaled.

        The embeddings stay as large as T5 draws them: smaller ones drown in what the first layers add, and no
        word finds its like in the preamble. Since transformers 5 the vocabulary is always tied to them, and
        `tie_word_embeddings` says no more than whether outputs are scaled.
        """
        sizes: dict[str, Any] = {
            "vocab_size": len(tokenizer), "d_model": settings.width, "d_kv": HEAD_WIDTH,
            "d_ff": settings.feed_forward, "num_layers": settings.depth, "num_decoder_layers": settings.depth,
            "num_heads": settings.width // HEAD_WIDTH, "feed_forward_proj": "gated-gelu",
            "tie_word_embeddings": False, "dropout_rate": 0.0, "pad_token_id": tokenizer.pad_token_id,
            "eos_token_id": tokenizer.eos_token_id, "decoder_start_token_id": tokenizer.pad_token_id,
        }  # fmt: skip
        model = T5ForConditionalGeneration(T5Config(**sizes))
        return cls(model, tokenizer, settings.whole_caption_share)

    def encode(self, text: LlmText, split: float = 0.0) -> Encoded:
        """`split` in [0, 1) draws where a caption is split; 0 asks for the whole caption."""
        if text.question:
            asked, written = T5.question_prompt.format(text.question), text.text
        else:
            asked, written = split_caption(text.text, split, self.whole_share)
        end = self.tokenizer.eos_token_id
        after = [*_ids(self.tokenizer, asked), end]
        given = [*_places(self.tokenizer, text.preamble), *([token] for token in after)]
        return Encoded(given, [*_ids(self.tokenizer, written), end])

    def loss(self, encoded: Sequence[Encoded], device: torch.device) -> Tensor:
        """Mean cross-entropy per written token."""
        given, mask = _embed(self.model.get_input_embeddings(), [e.given for e in encoded], device)
        written = [torch.tensor(e.written) for e in encoded]
        labels = nn.utils.rnn.pad_sequence(written, batch_first=True, padding_value=-100).to(device)
        return self.model(inputs_embeds=given, attention_mask=mask, labels=labels, use_cache=False).loss

    def write(self, encoded: Sequence[Encoded], device: torch.device) -> list[list[int]]:
        """Greedy continuations of what is given."""
        given, mask = _embed(self.model.get_input_embeddings(), [e.given for e in encoded], device)
        found = self.model.generate(inputs_embeds=given, attention_mask=mask, generation_config=self.generation)
        return found[:, 1:].tolist()


Pretraining = OptPretraining | T5Pretraining

ARCHITECTURES: dict[str, type[OptPretraining] | type[T5Pretraining]] = {
    "opt": OptPretraining,
    "t5": T5Pretraining,
}
"""Name in the settings (transformers' model_type) → what builds, trains and asks it."""


def continue_texts(folder: Path, texts: Sequence[LlmText], batch_size: int = 64) -> list[str]:
    """What a saved model writes, greedily, after each preamble and question; `text` is not shown to it."""
    transformers_logging.disable_progress_bar()  # transformers' own; ours is shown
    llm = _load(folder)
    device = torch.device("cpu")
    written: list[str] = []
    with torch.inference_mode():
        for start in range(0, len(texts), batch_size):
            encoded = [llm.encode(text) for text in texts[start : start + batch_size]]
            for row in llm.write(encoded, device):
                ends = [row.index(e) for e in _end_ids(llm) if e in row]
                row = row[: min(ends)] if ends else row
                written.append(llm.tokenizer.decode(row, skip_special_tokens=True).strip())
    return written


def _load(folder: Path) -> Pretraining:
    config = AutoConfig.from_pretrained(folder)
    tokenizer = load_tokenizer(folder)
    if config.model_type == "opt":
        return OptPretraining(OPTForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), tokenizer)
    if config.model_type == "t5":
        model = T5ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
        return T5Pretraining(model, tokenizer)
    known = ", ".join(ARCHITECTURES)
    raise UsageError(f"{folder} holds a {config.model_type!r}; expected one of {known}.")


def _save(folder: Path, llm: Pretraining) -> None:
    """Writes transformers' folder layout: float16 on disk, float32 when opened without a dtype."""
    config = deepcopy(llm.model.config)
    config.architectures, config.dtype = [type(llm.model).__name__], "float32"
    config.save_pretrained(folder)
    llm.generation.save_pretrained(folder)
    first = {t.data_ptr(): name for name, t in reversed(llm.model.state_dict().items())}  # of tied ones
    state = llm.model.state_dict()
    save_tensors(folder / "model.safetensors", {name: state[name] for name in first.values()}, torch.float16)
    save_tokenizer(llm.tokenizer, folder)


def _batches_of_epoch(lengths: np.ndarray, size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """Rows of each batch: pools in random order are sorted by length, cut, and the batches shuffled."""
    rng = np.random.default_rng((seed, epoch))
    order = rng.permutation(len(lengths))
    batches: list[np.ndarray] = []
    for start in range(0, len(order) - size + 1, size * POOL_BATCHES):
        pool = order[start : start + size * POOL_BATCHES]
        pool = pool[np.argsort(lengths[pool], kind="stable")]
        batches += [pool[i : i + size] for i in range(0, len(pool) - size + 1, size)]
    return [batches[i] for i in rng.permutation(len(batches))]


def _ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids if text else []


def _places(tokenizer: Any, preamble: str) -> list[list[int]]:
    """The ids at each place of a preamble: one, or those of words that are joined by "+"."""
    places: list[list[int]] = []
    for piece in _SUMMED.split(preamble):
        if _SUMMED.fullmatch(piece):
            places.append([token for word in piece.split("+") for token in _ids(tokenizer, f" {word.strip()}")])
        else:
            places += [[token] for token in _ids(tokenizer, piece)]
    return places


def _end_ids(llm: Pretraining) -> list[int]:
    ends = llm.generation.eos_token_id
    return list(ends) if isinstance(ends, list) else [ends]


def _embed(
    embedding: nn.Module, rows: Sequence[Sequence[Sequence[int]]], device: torch.device, *, left: bool = False
) -> tuple[Tensor, Tensor]:
    """Embeddings (B, T, D), those of one place summed, and the mask (B, T), 1 where there is a place."""
    longest = max(len(row) for row in rows)
    most = max((len(place) for row in rows for place in row), default=1)
    tokens = torch.zeros(len(rows), longest, most, dtype=torch.long)
    is_token = torch.zeros(len(rows), longest, most)
    for number, row in enumerate(rows):
        first = longest - len(row) if left else 0
        for place, ids in enumerate(row, first):
            tokens[number, place, : len(ids)] = torch.tensor(ids)
            is_token[number, place, : len(ids)] = 1
    tokens, is_token = tokens.to(device), is_token.to(device)
    return (embedding(tokens) * is_token[..., None]).sum(dim=2), is_token[..., 0].long()
