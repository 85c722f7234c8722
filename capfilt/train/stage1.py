"""BLIP-2 stage 1: train a Q-Former on a frozen image encoder, from shards and manifest (BLIP-2 §3.2).

In: runs with a manifest. Out: a `Blip2ForImageTextRetrieval` folder that plain transformers opens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from capfilt.data.rundir import RunDir
from capfilt.models.blip2 import Stage1
from capfilt.progress import NullProgress, Progress
from capfilt.settings import Stage1Settings
from capfilt.train.batches import Batch, Draws, PairDataset
from capfilt.train.features import FrozenFeatures
from capfilt.train.loop import TrainSummary, train
from capfilt.train.pairs import read_pairs, runs_digest
from capfilt.train.pretrained import copy_start, load_image_encoder, load_qformer_start
from capfilt.train.processes import join_processes
from capfilt.train.saved import encode_texts, save_stage1
from capfilt.weights.blip import read_sizes
from capfilt.weights.find import find_model_dir
from capfilt.weights.model_files import weights_digest


def train_stage1(
    run_dirs: Sequence[RunDir | str | Path],
    settings: Stage1Settings,
    output_dir: Path,
    progress: Progress | None = None,
) -> TrainSummary:
    """Trains on the kept pairs of `run_dirs`; errors are those of `read_pairs`, the loaders and `train`."""
    progress = progress or NullProgress()
    vision, _, _ = read_sizes(find_model_dir(settings.image_encoder, "image encoder"))
    dataset = read_pairs(
        run_dirs, image_size_px=vision.image_size_px, run_weights=settings.run_weights, progress=progress
    )
    return train_stage1_on(dataset, settings, output_dir, progress=progress, fields={"input": runs_digest(run_dirs)})


def train_stage1_on(
    dataset: PairDataset,
    settings: Stage1Settings,
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
    encoder = load_image_encoder(settings.image_encoder, device)
    start = load_qformer_start(settings, encoder.vision.config.width)
    stage = Stage1(
        start.config,
        embed_dim=settings.embed_dim,
        dec_token_id=start.dec_token_id,
        vision_norm_eps=encoder.vision.config.layer_norm_eps,
    )
    copy_start(stage.qformer, start.weights)
    copy_start(stage.lm_head, start.head_weights)
    stage.vision_norm.load_state_dict(encoder.norm)
    stage.to(device).train()
    features = FrozenFeatures(encoder, dataset, settings, processes, progress)

    def prepare(batch: Batch, draws: Draws) -> dict[str, Any]:
        to_the_longest = processes.num == 1
        texts = encode_texts(
            start.tokenizer, batch.texts, settings.max_text_tokens, device, to_the_longest=to_the_longest
        )
        return {
            "features_BPD": features(batch), "texts": texts, "losses": settings.losses, "ranks": processes.ranks,
            "uniform_2B": draws.uniform(2, len(batch.keys)).to(device),
        }  # fmt: skip

    return train(
        stage,
        prepare,
        open_batches=features.open_batches,
        settings=settings,
        output_dir=output_dir,
        save=lambda folder: save_stage1(folder, encoder, stage, start.tokenizer, settings.embed_dim),
        processes=processes,
        progress=progress,
        name="stage1",
        fields={**_identity(settings), **(fields or {})},
        some_unused=set(settings.losses) != {"itc", "itm", "itg"},
    )


def _identity(settings: Stage1Settings) -> dict[str, str]:
    """What the models named in the settings contain; where they lie may change."""
    image_encoder = find_model_dir(settings.image_encoder, "image encoder")
    start = find_model_dir(settings.qformer_init or settings.image_encoder, "start of the Q-Former")
    return {
        "image_encoder_sha256": weights_digest(image_encoder),
        "qformer_init_sha256": weights_digest(start),
    }
