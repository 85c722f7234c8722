"""BLIP-2 stage 1: train a Q-Former on a frozen image encoder, from shards and manifest (BLIP-2 §3.2).

In: runs with a manifest. Out: a `Blip2ForImageTextRetrieval` folder that plain transformers opens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from capfilt.data.rundir import RunDir
from capfilt.errors import UsageError
from capfilt.models.blip2 import Stage1
from capfilt.models.contrast import bound_temperature
from capfilt.progress import NullProgress, Progress
from capfilt.settings import QFormerSettings, Stage1Settings
from capfilt.train.batches import Batch, Draws, PairDataset, image_ids
from capfilt.train.blip2_files import blip2_digest
from capfilt.train.features import FrozenFeatures
from capfilt.train.loop import TrainSummary, train
from capfilt.train.pairs import kept_images_digest, read_pairs, runs_digest
from capfilt.train.pretrained import copy_start, find_qformer_start, load_qformer_start
from capfilt.train.processes import join_processes
from capfilt.train.saved import SavedStage1, encode_texts, load_stage1, save_stage1
from capfilt.train.tokens import refuse_longer_texts
from capfilt.weights.devices import choose_dtype
from capfilt.weights.image_encoders import image_encoder_digest, load_image_encoder
from capfilt.weights.model_files import weights_digest


def train_stage1(
    run_dirs: Sequence[RunDir | str | Path],
    settings: Stage1Settings,
    output_dir: Path,
    progress: Progress | None = None,
) -> TrainSummary:
    """Trains on the kept pairs of `run_dirs`; errors are those of `read_pairs`, the loaders and `train`."""
    progress = progress or NullProgress()
    model = start_stage1(settings)
    side = model.encoder.preparation.image_size_px
    dataset = read_pairs(
        run_dirs, image_size_px=side, smallest_crop=settings.random_crop, run_weights=settings.run_weights,
        progress=progress,
    )  # fmt: skip
    fields = {"input": runs_digest(run_dirs)}
    return _train(model, dataset, settings, output_dir, progress, fields, lambda: kept_images_digest(run_dirs))


def train_stage1_on(
    dataset: PairDataset,
    settings: Stage1Settings,
    output_dir: Path,
    *,
    progress: Progress | None = None,
    fields: Mapping[str, Any] | None = None,
) -> TrainSummary:
    """Trains on a dataset, whose pictures have the image encoder's size; `fields` identify it."""
    return _train(start_stage1(settings), dataset, settings, output_dir, progress or NullProgress(), fields or {}, None)


def start_stage1(settings: Stage1Settings) -> SavedStage1:
    """The model as training begins: that of `init`, else a new one; the seed decides what is drawn."""
    if not settings.init:
        return build_new(settings, settings.embed_dim)
    device = join_processes(settings).device
    return _continued(settings, device, choose_dtype(settings.encoder_dtype, device))


def build_new(settings: QFormerSettings, embed_dim: int = Stage1Settings.embed_dim) -> SavedStage1:
    """A new Q-Former on the frozen image encoder that the settings name; the seed decides what is drawn."""
    device = join_processes(settings).device
    dtype = choose_dtype(settings.encoder_dtype, device)
    encoder = load_image_encoder(
        settings.image_encoder,
        device,
        layer=settings.image_encoder_layer,
        image_size_px=settings.image_size_px,
        dtype=dtype,
    )
    start = load_qformer_start(settings, encoder.vision.config.width)
    torch.manual_seed(settings.seed)
    stage = Stage1(
        start.config,
        embed_dim=embed_dim,
        dec_token_id=start.dec_token_id,
        vision_norm_eps=encoder.vision.config.layer_norm_eps,
    )
    copy_start(stage.qformer, start.weights)
    copy_start(stage.lm_head, start.head_weights)
    stage.vision_norm.load_state_dict(encoder.norm)
    return SavedStage1(encoder, stage.to(device), start.tokenizer, embed_dim)


def _continued(settings: Stage1Settings, device: torch.device, dtype: torch.dtype) -> SavedStage1:
    if settings.qformer_init:
        raise UsageError("--init brings a Q-Former of its own. Leave --qformer-init out.")
    torch.manual_seed(settings.seed)
    return load_stage1(
        settings.init,
        device,
        image_encoder=settings.image_encoder,
        layer=settings.image_encoder_layer,
        image_size_px=settings.image_size_px,
        dtype=dtype,
        dropout=settings.dropout,
    )


def _train(
    model: SavedStage1,
    dataset: PairDataset,
    settings: Stage1Settings,
    output_dir: Path,
    progress: Progress,
    fields: Mapping[str, Any],
    images_digest: Callable[[], str] | None,
) -> TrainSummary:
    refuse_longer_texts(settings.max_text_tokens, model.stage.qformer.config.max_positions)
    processes = join_processes(settings)
    encoder, stage = model.encoder, model.stage.train()
    features = FrozenFeatures(encoder, dataset, settings, processes, progress, images_digest)

    def prepare(batch: Batch, draws: Draws) -> dict[str, Any]:
        texts = encode_texts(
            model.tokenizer, batch.texts, settings.max_text_tokens, processes.device,
            to_the_longest=processes.num == 1,
        )  # fmt: skip
        return {
            "features_BPD": features(batch), "texts": texts, "losses": settings.losses, "ranks": processes.ranks,
            "ids_B": image_ids(batch, processes.device),
            "uniform_2B": draws.uniform(2, len(batch.keys)).to(processes.device),
        }  # fmt: skip

    return train(
        stage,
        prepare,
        open_batches=features.open_batches,
        settings=settings,
        output_dir=output_dir,
        save=lambda folder: save_stage1(folder, encoder, stage, model.tokenizer, model.embed_dim),
        processes=processes,
        progress=progress,
        name="stage1",
        fields={**stage1_identity(settings), **fields},
        after_step=lambda _step: bound_temperature(stage.temperature),
        some_unused=set(settings.losses) != {"itc", "itm", "itg"},
    )


def stage1_identity(settings: Stage1Settings) -> dict[str, str]:
    """What the models named in the settings contain; where they lie may change."""
    if not settings.init:
        return new_identity(settings)
    found = {"init_sha256": blip2_digest(settings.init)}
    if settings.image_encoder:
        found["image_encoder_sha256"] = image_encoder_digest(settings.image_encoder)
    return found


def new_identity(settings: QFormerSettings) -> dict[str, str]:
    """The same of the models that `build_new` takes."""
    return {
        "qformer_init_sha256": weights_digest(find_qformer_start(settings)),
        "image_encoder_sha256": image_encoder_digest(settings.image_encoder),
    }
