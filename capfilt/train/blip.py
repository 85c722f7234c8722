"""BLIP: pre-training with ITC + ITM + LM, and fine-tuning of its captioner and its filter (BLIP §3.2, §3.3).

In: runs with a manifest, and a BLIP model to start from or a tokenizer and sizes. Out: folders in transformers'
layout that plain transformers opens; pre-training writes two, `captioner/` and `filter/`, with shared weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from capfilt.data.rundir import RunDir
from capfilt.errors import UsageError
from capfilt.models.blip import CaptionerLosses, FilterLosses, FineTuning
from capfilt.models.contrast import bound_temperature
from capfilt.models.med import Captioner, Filter
from capfilt.models.momentum import MomentumConfig
from capfilt.progress import NullProgress, Progress
from capfilt.settings import BlipTrainSettings
from capfilt.train.batches import Batch, Draws, draw, draw_captions, image_ids, iterate_batches
from capfilt.train.blip_start import load_part, origin_digest, start_blip
from capfilt.train.loop import TrainSummary, train
from capfilt.train.optim import ramped_alpha
from capfilt.train.pairs import RunPairs, read_pairs, runs_digest
from capfilt.train.processes import Processes, join_processes
from capfilt.train.tokens import refuse_longer_texts, tokenise
from capfilt.weights.blip import LoadedBlip, save_blip

RunDirs = Sequence[RunDir | str | Path]


def train_blip(
    run_dirs: RunDirs, settings: BlipTrainSettings, output_dir: Path, progress: Progress | None = None
) -> TrainSummary:
    """Pre-train captioner and filter together (ITC + ITM + LM).

    Momentum encoders begin as the model and the queue empty with `init` too, whose files have neither: both have caught
    up after a few hundred steps (the released code goes on with those of its checkpoint).
    Errors are those of `read_pairs`, the model loaders and `train`; UsageError where nothing says what it starts from.
    """
    settings = replace(settings, prompt="")  # that of the captioner's fine-tuning
    torch.manual_seed(settings.seed)
    model, start = start_blip(settings)
    model.start_momentum(_momentum_of(settings))

    def save(folder: Path) -> None:
        save_blip(folder / "captioner", "captioner", model.captioner, start, prompt="")
        temperature = model.filter_losses.contrast.value()
        save_blip(folder / "filter", "filter", model.filter, start, temperature=temperature)

    return _train(run_dirs, settings, output_dir, progress, _Part("blip", model, model.filter_losses), start, save)


def train_captioner(
    run_dirs: RunDirs, settings: BlipTrainSettings, output_dir: Path, progress: Progress | None = None
) -> TrainSummary:
    """Fine-tune a captioner with LM; the tokens of the prompt carry no loss (BLIP §3.3)."""
    settings = replace(settings, known_false=False, losses=("lm",))  # ITM's, pre-training's
    torch.manual_seed(settings.seed)
    start = load_part(settings, "captioner")
    assert isinstance(start.model, Captioner)
    prompt_tokens = start.tokenizer(settings.prompt, add_special_tokens=False).input_ids
    if settings.max_text_tokens < len(prompt_tokens) + _FEWEST_TOKENS:
        raise UsageError(
            f"max_text_tokens is {settings.max_text_tokens}, of which the prompt takes {len(prompt_tokens)}; expected "
            f"at least {len(prompt_tokens) + _FEWEST_TOKENS}, for [DEC], a word and [SEP]."
        )
    losses = CaptionerLosses(
        start.model, num_prompt_tokens=len(prompt_tokens), label_smoothing=settings.label_smoothing
    )

    def save(folder: Path) -> None:
        save_blip(folder, "captioner", losses.model, start, prompt=settings.prompt)

    part = _Part("captioner", FineTuning(losses), None)
    return _train(run_dirs, settings, output_dir, progress, part, start, save)


def train_filter(
    run_dirs: RunDirs, settings: BlipTrainSettings, output_dir: Path, progress: Progress | None = None
) -> TrainSummary:
    """Fine-tune a filter with ITC and ITM (BLIP §3.3)."""
    settings = replace(settings, captions_per_image=1, prompt="", losses=("itc", "itm"))  # LM's, pre-training's
    torch.manual_seed(settings.seed)
    start = load_part(settings, "filter")
    assert isinstance(start.model, Filter)
    losses = FilterLosses(start.model, _momentum_of(settings))
    losses.contrast.start_at(start.temperature)

    def save(folder: Path) -> None:
        save_blip(folder, "filter", losses.model, start, temperature=losses.contrast.value())

    part = _Part("filter", FineTuning(losses), losses)
    return _train(run_dirs, settings, output_dir, progress, part, start, save)


_FEWEST_TOKENS = 3
"""Of a caption without its prompt: [DEC], a word, [SEP]."""


@dataclass(frozen=True)
class _Part:
    """What is trained: its name, the module that gives losses, and the part of it with ITC, if there is one."""

    name: str
    objective: nn.Module
    contrast: FilterLosses | None


def _momentum_of(settings: BlipTrainSettings) -> MomentumConfig | None:
    return MomentumConfig(settings.momentum, settings.queue_size) if settings.momentum else None


def _train(
    run_dirs: RunDirs,
    settings: BlipTrainSettings,
    output_dir: Path,
    progress: Progress | None,
    part: _Part,
    start: LoadedBlip,
    save: Callable[[Path], None],
) -> TrainSummary:
    """The shared part: data, device, tokens; then the loop."""
    refuse_longer_texts(settings.max_text_tokens, _positions_of(start))
    progress = progress or NullProgress()
    processes = join_processes(settings)
    part.objective.to(processes.device).train()
    dataset = read_pairs(
        run_dirs, image_size_px=start.preparation.image_size_px, smallest_crop=settings.random_crop,
        run_weights=settings.run_weights, progress=progress, known_false=settings.known_false,
    )  # fmt: skip
    inputs = _Inputs(dataset, settings, start.tokenizer, part, processes)
    momentum = part.contrast.momentum if part.contrast else None

    def after_step(_step: int) -> None:
        if part.contrast is not None:
            bound_temperature(part.contrast.contrast.temperature)
        if momentum is not None:
            assert part.contrast is not None
            momentum.follow(part.contrast.model)

    return train(
        part.objective,
        inputs,
        open_batches=lambda cursor: iterate_batches(
            dataset, settings, cursor,
            ranks=processes.ranks, mean=start.preparation.mean, std=start.preparation.std,
        ),
        settings=settings,
        output_dir=output_dir,
        save=save,
        processes=processes,
        progress=progress,
        name=f"train {part.name}",
        extra_tensors=lambda: {f"momentum.{n}": t for n, t in momentum.state_dict().items()} if momentum else {},
        fields={"input": runs_digest(run_dirs), "origin_sha256": origin_digest(settings, part.name)},
        after_step=after_step,
        some_unused=part.name == "blip" and set(settings.losses) != {"itc", "itm", "lm"},
    )  # fmt: skip


def _positions_of(start: LoadedBlip) -> int:
    text = start.model.decoder if isinstance(start.model, Captioner) else start.model.encoder
    return text.config.max_positions


@dataclass(frozen=True)
class _Inputs:
    """Makes the objective's inputs of a batch."""

    dataset: RunPairs
    settings: BlipTrainSettings
    tokenizer: Any
    part: _Part
    processes: Processes

    def __call__(self, batch: Batch, draws: Draws) -> dict[str, Any]:
        settings, device = self.settings, self.processes.device
        texts = captions_of(self.dataset, batch, settings)
        false_texts = false_captions_of(self.dataset, batch, settings)
        prompt = settings.prompt.strip() + " " if settings.prompt.strip() else ""
        tokens_NT, _ = tokenise(
            self.tokenizer, [prompt + text for text in texts + false_texts], settings.max_text_tokens,
            to_the_longest=self.processes.num == 1,
        )  # fmt: skip
        false_tokens_BT = None
        if false_texts:
            false_tokens_BT = tokens_NT[len(texts) :].clone()
            false_tokens_BT[torch.tensor([not text for text in false_texts])] = self.tokenizer.pad_token_id
        inputs: dict[str, Any] = {
            "images_BCHW": batch.images_on(device), "tokens_RT": tokens_NT[: len(texts)].to(device),
            "losses": settings.losses, "ranks": self.processes.ranks,
        }  # fmt: skip
        if self.part.contrast is not None:
            inputs["false_tokens_BT"] = None if false_tokens_BT is None else false_tokens_BT.to(device)
            inputs["ids_B"] = image_ids(batch, device)
            inputs["uniform_2B"] = draws.uniform(2, len(batch.keys)).to(device)
            num_taken = len(batch.keys) * self.processes.num
            num_epochs = batch.cursor.num_epochs(self.dataset.num_shown, num_taken)
            inputs["alpha"] = ramped_alpha(settings.alpha, settings.alpha_epochs, num_epochs)
        return inputs


def captions_of(dataset: RunPairs, batch: Batch, settings: BlipTrainSettings) -> list[str]:
    """The texts of a batch, or several for each image, side by side."""
    if settings.captions_per_image == 1 or batch.rows is None:
        return batch.texts
    texts: list[str] = []
    for row, name in zip(batch.rows.tolist(), batch.names, strict=True):
        seed = draw(settings.seed, batch.cursor.epoch, name, "captions")
        texts += draw_captions(dataset.captions_of(row), settings.captions_per_image, seed)
    return texts


def false_captions_of(dataset: RunPairs, batch: Batch, settings: BlipTrainSettings) -> list[str]:
    """A caption known to be false of each image, "" where none is; an empty list if they are not asked for."""
    if not settings.known_false or batch.rows is None:
        return []
    texts: list[str] = []
    for row, name in zip(batch.rows.tolist(), batch.names, strict=True):
        known = dataset.false_captions_of(row)
        texts.append(known[draw(settings.seed, batch.cursor.epoch, name, "false") % len(known)] if known else "")
    return texts
