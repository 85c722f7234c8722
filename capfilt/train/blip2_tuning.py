"""Fine-tuning a stage-2 BLIP-2 for captions (BLIP-2 §4.2) or for questions about images (§4.3).

In: a stage-2 model, and runs with a manifest or questions with people's answers. Out: a
`Blip2ForConditionalGeneration` folder that plain transformers opens.

The language model is frozen. Q-Former and projection train on its loss of a caption behind a prompt, or of an answer
behind a question in the model's frame. With `train_image_encoder` the image encoder trains too, as in the paper; a
CLIP's patches keep having no bias. Without, its features are computed once, as in stage 2.

Deviations from the paper: the Q-Former does not read the question (`models.blip2.Blip2FineTuning`), and the image
encoder is frozen unless asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from capfilt.data.rundir import RunDir
from capfilt.models.blip2 import Blip2FineTuning
from capfilt.progress import NullProgress, Progress
from capfilt.settings import Blip2CaptionsSettings, Blip2TuningSettings, Blip2VqaSettings
from capfilt.train.batches import Batch, Cursor, Draws, PairDataset, iterate_batches
from capfilt.train.features import FrozenFeatures
from capfilt.train.loop import OpenBatches, TrainSummary, train
from capfilt.train.optim import vision_rate_scales
from capfilt.train.pairs import kept_images_digest, read_pairs, runs_digest
from capfilt.train.processes import Processes, join_processes
from capfilt.train.question_pairs import QuestionFiles, read_question_pairs
from capfilt.train.saved import SavedStage2, load_stage2, save_stage2
from capfilt.train.stage2 import digests_of, find_llm
from capfilt.weights.devices import choose_dtype
from capfilt.weights.image_encoders import ImageEncoder
from capfilt.weights.llms import load_llm


def train_blip2_captions(
    run_dirs: Sequence[RunDir | str | Path],
    init: str | Path,
    llm: str,
    settings: Blip2CaptionsSettings,
    output_dir: Path,
    progress: Progress | None = None,
) -> TrainSummary:
    """Trains on the kept captions of `run_dirs`; errors are those of `read_pairs`, the loaders and `train`.

    `init` is a stage-2 model; `llm` names the language model of one that was saved without (a .pth of LAVIS's).
    """
    progress = progress or NullProgress()
    model = load_start(init, llm, settings)
    side, prompt = model.encoder.preparation.image_size_px, settings.prompt.strip()
    dataset = read_pairs(
        run_dirs, image_size_px=side, smallest_crop=settings.random_crop, run_weights=settings.run_weights,
        progress=progress,
    )  # fmt: skip
    data = _Data(
        dataset=dataset,
        digest=runs_digest(run_dirs),
        prompts=lambda batch: [prompt] * len(batch.texts),
        images_digest=lambda: kept_images_digest(run_dirs),
    )
    identity = digests_of(init, llm, settings.image_encoder)
    return _train("blip2-captions", model, data, settings, output_dir, progress, identity)


def train_blip2_vqa(
    files: Sequence[QuestionFiles],
    init: str | Path,
    llm: str,
    settings: Blip2VqaSettings,
    output_dir: Path,
    progress: Progress | None = None,
) -> TrainSummary:
    """Trains on questions and people's answers; errors are those of `read_question_pairs`, the loaders and `train`.

    `init` and `llm` as for `train_blip2_captions`.
    """
    progress = progress or NullProgress()
    model = load_start(init, llm, settings)
    side, frame = model.encoder.preparation.image_size_px, settings.prompt.strip() or model.stage.llm.question_prompt
    dataset = read_question_pairs(files, image_size_px=side, smallest_crop=settings.random_crop, progress=progress)

    def prompts_of(batch: Batch) -> list[str]:
        assert batch.rows is not None, "a dataset's batches carry rows"
        return [frame.replace("{}", dataset.question_of(row)) for row in batch.rows.tolist()]

    data = _Data(
        dataset=dataset,
        digest=dataset.digest(),
        prompts=prompts_of,
        images_digest=dataset.images_digest,
        image_rows=dataset.image_rows,
    )
    identity = digests_of(init, llm, settings.image_encoder)
    return _train("blip2-vqa", model, data, settings, output_dir, progress, identity)


def load_start(init: str | Path, llm: str, settings: Blip2TuningSettings) -> SavedStage2:
    """The model as training begins: images of the size asked for, the image encoder in float32 where it trains."""
    device = join_processes(settings).device
    language = None
    if llm:
        language = load_llm(find_llm(llm), dtype=choose_dtype(settings.llm_dtype, device), device=device)
    model = load_stage2(
        init,
        device,
        choose_dtype(settings.llm_dtype, device),
        llm=language,
        image_encoder=settings.image_encoder,
        image_size_px=settings.image_size_px or None,
        dtype=torch.float32 if settings.train_image_encoder else choose_dtype(settings.encoder_dtype, device),
        dropout=settings.dropout,
    )
    if settings.train_image_encoder:
        model.encoder.vision.requires_grad_(True)
        bias = model.encoder.vision.patch_embedding.bias
        if bias is not None and not model.encoder.fits_blip2:  # saved as a CLIP, whose layout has no place for it
            bias.requires_grad_(False)
    return model


@dataclass(frozen=True)
class _Data:
    """What is trained on."""

    dataset: PairDataset
    digest: str
    """Identifies it."""
    prompts: Callable[[Batch], list[str]]
    """The prompts of a batch's texts."""
    images_digest: Callable[[], str]
    """Identifies its images, where their features go to disk."""
    image_rows: np.ndarray | None = None
    """For each row the first that shows the same image; None: each has its own."""


def _train(
    name: str,
    model: SavedStage2,
    data: _Data,
    settings: Blip2TuningSettings,
    output_dir: Path,
    progress: Progress,
    identity: dict[str, str],
) -> TrainSummary:
    encoder, stage, processes = model.encoder, model.stage, join_processes(settings)
    trained = encoder.vision if settings.train_image_encoder else None
    objective = Blip2FineTuning(stage, trained).train()
    take_inputs = _frozen_inputs if trained is None else _trained_inputs
    open_batches, inputs_of = take_inputs(encoder, data, settings, processes, progress)

    def prepare(batch: Batch, _draws: Draws) -> dict[str, Any]:
        texts = {"prompts": data.prompts(batch), "texts": batch.texts, "ranks": processes.ranks}
        return {**texts, **inputs_of(batch)}

    scales = None
    if trained is not None:
        names = [name for name, _ in objective.named_parameters()]
        scales = vision_rate_scales(names, trained.config.depth, settings.image_encoder_decay)
    return train(
        objective,
        prepare,
        open_batches=open_batches,
        settings=settings,
        output_dir=output_dir,
        save=lambda folder: save_stage2(folder, encoder, stage),
        processes=processes,
        progress=progress,
        name=name,
        fields={"training": name, "input": data.digest, **identity},
        rate_scales=scales,
    )


ImageInputs = tuple[OpenBatches, Callable[[Batch], dict[str, Tensor]]]
"""What opens the stream of batches, and what the objective gets of a batch's images."""


def _frozen_inputs(
    encoder: ImageEncoder, data: _Data, settings: Blip2TuningSettings, processes: Processes, progress: Progress
) -> ImageInputs:
    """Features of a frozen image encoder, kept where they can be."""
    features = FrozenFeatures(
        encoder, data.dataset, settings, processes, progress, data.images_digest, data.image_rows
    )  # fmt: skip
    return features.open_batches, lambda batch: {"features_BPD": features(batch)}


def _trained_inputs(
    encoder: ImageEncoder, data: _Data, settings: Blip2TuningSettings, processes: Processes, _progress: Progress
) -> ImageInputs:
    """The images themselves, for an image encoder that trains."""
    preparation = encoder.preparation

    def open_batches(cursor: Cursor) -> Iterator[Batch]:
        return iterate_batches(
            data.dataset, settings, cursor, ranks=processes.ranks, mean=preparation.mean, std=preparation.std
        )  # fmt: skip

    return open_batches, lambda batch: {"images_BCHW": batch.images_on(processes.device)}
