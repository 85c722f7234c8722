"""BLIP-2 stage 2: connect a stage-1 Q-Former to a frozen language model (BLIP-2 §3.3).

In: runs with a manifest, a stage-1 folder, an OPT or T5. Out: a `Blip2ForConditionalGeneration` folder that
plain transformers opens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from capfilt.data.rundir import RunDir
from capfilt.models.llms import T5
from capfilt.progress import NullProgress, Progress
from capfilt.settings import Stage2Settings
from capfilt.train.batches import Batch, Draws, PairDataset
from capfilt.train.features import FrozenFeatures
from capfilt.train.loop import TrainSummary, train
from capfilt.train.pairs import read_pairs, runs_digest
from capfilt.train.processes import join_processes
from capfilt.train.saved import read_stage1_image_size_px, save_stage2, start_stage2
from capfilt.weights.devices import choose_dtype
from capfilt.weights.find import find_model_dir
from capfilt.weights.llms import load_llm
from capfilt.weights.model_files import weights_digest

GIVE_LLM = "a folder, a hub id (owner/name), `embedded-opt` or `embedded-t5`"
"""What can be given as a language model, in messages."""


def train_stage2(
    run_dirs: Sequence[RunDir | str | Path],
    init_dir: str | Path,
    llm: str,
    settings: Stage2Settings,
    output_dir: Path,
    progress: Progress | None = None,
) -> TrainSummary:
    """Trains on the kept pairs of `run_dirs`; errors are those of `read_pairs`, the loaders and `train`."""
    progress = progress or NullProgress()
    side = read_stage1_image_size_px(init_dir)
    dataset = read_pairs(run_dirs, image_size_px=side, run_weights=settings.run_weights, progress=progress)
    fields = {"input": runs_digest(run_dirs)}
    return train_stage2_on(dataset, init_dir, llm, settings, output_dir, progress=progress, fields=fields)


def train_stage2_on(
    dataset: PairDataset,
    init_dir: str | Path,
    llm: str,
    settings: Stage2Settings,
    output_dir: Path,
    *,
    progress: Progress | None = None,
    fields: Mapping[str, Any] | None = None,
) -> TrainSummary:
    """Trains on a dataset, whose pictures have the image encoder's size; `fields` identify it."""
    progress = progress or NullProgress()
    processes = join_processes(settings)
    device = processes.device
    torch.manual_seed(settings.seed)
    llm_dir = find_model_dir(llm, "language model", embedded=None, give=GIVE_LLM)
    language = load_llm(llm_dir, dtype=choose_dtype(settings.llm_dtype, device), device=device)
    if isinstance(language, T5):
        language.whole_caption_share = settings.whole_caption_share
    model = start_stage2(init_dir, language, settings.dropout, device)
    stage, encoder = model.stage.train(), model.encoder
    features = FrozenFeatures(encoder, dataset, settings, processes, progress)

    def prepare(batch: Batch, draws: Draws) -> dict[str, Any]:
        splits = draws.uniform(1, len(batch.texts))[0].tolist()
        return {"features_BPD": features(batch), "texts": batch.texts, "ranks": processes.ranks, "draws": splits}

    init_digest = weights_digest(find_model_dir(str(init_dir), "model of stage 1", embedded=None))
    return train(
        stage,
        prepare,
        open_batches=features.open_batches,
        settings=settings,
        output_dir=output_dir,
        save=lambda folder: save_stage2(folder, encoder, stage),
        processes=processes,
        progress=progress,
        name="stage2",
        fields={"init_sha256": init_digest, "llm_sha256": weights_digest(llm_dir), **(fields or {})},
    )
