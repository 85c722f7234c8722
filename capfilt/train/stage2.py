"""BLIP-2 stage 2: connect a stage-1 Q-Former to a frozen language model (BLIP-2 §3.3), or go on from a stage-2 model.

In: runs with a manifest, and a stage-1 model and an OPT or T5, or an image encoder for a new Q-Former and an OPT or T5
(BLIP-2 without stage 1, Figure 5), or a stage-2 model that has its own. Out: a `Blip2ForConditionalGeneration` folder
that plain transformers opens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from capfilt.data.rundir import RunDir
from capfilt.errors import UsageError
from capfilt.models.llms import T5, LanguageModel
from capfilt.progress import NullProgress, Progress
from capfilt.settings import Stage2Settings
from capfilt.train.batches import Batch, Draws, PairDataset
from capfilt.train.blip2_files import blip2_digest, find_stage
from capfilt.train.features import FrozenFeatures
from capfilt.train.loop import TrainSummary, train
from capfilt.train.pairs import kept_images_digest, read_pairs, runs_digest
from capfilt.train.processes import join_processes
from capfilt.train.saved import SavedStage2, connect_llm, load_stage2, save_stage2, start_stage2
from capfilt.train.stage1 import build_new, new_identity
from capfilt.weights.devices import choose_dtype
from capfilt.weights.find import find_model_dir
from capfilt.weights.image_encoders import image_encoder_digest
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
    """Trains on the kept pairs of `run_dirs`; errors are those of `read_pairs`, the loaders and `train`.

    `init_dir` is a stage-1 model, or "" for a new Q-Former on the settings' image encoder, and `llm` names the language
    model; or `init_dir` is a stage-2 model that has one, and `llm` is "".
    """
    progress = progress or NullProgress()
    model = load_start(init_dir, llm, settings)
    side = model.encoder.preparation.image_size_px
    dataset = read_pairs(
        run_dirs, image_size_px=side, smallest_crop=settings.random_crop, run_weights=settings.run_weights,
        progress=progress,
    )  # fmt: skip
    fields = {"input": runs_digest(run_dirs), **stage2_identity(init_dir, llm, settings)}
    return _train(model, dataset, settings, output_dir, progress, fields, lambda: kept_images_digest(run_dirs))


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
    model = load_start(init_dir, llm, settings)
    fields = {**stage2_identity(init_dir, llm, settings), **(fields or {})}
    return _train(model, dataset, settings, output_dir, progress or NullProgress(), fields, None)


def load_start(init_dir: str | Path, llm: str, settings: Stage2Settings) -> SavedStage2:
    """The model as training begins; the seed decides what is drawn."""
    _check_start(init_dir, settings)
    device = join_processes(settings).device
    llm_dtype, dtype = (choose_dtype(name, device) for name in (settings.llm_dtype, settings.encoder_dtype))
    is_stage2 = bool(init_dir) and find_stage(init_dir) == "stage2"
    language: LanguageModel | None = None
    if llm or not is_stage2:
        language = load_llm(find_llm(llm), dtype=llm_dtype, device=device)
    torch.manual_seed(settings.seed)
    if is_stage2:
        model = load_stage2(
            init_dir, device, llm_dtype, llm=language, dropout=settings.dropout, image_encoder=settings.image_encoder,
            dtype=dtype,
        )  # fmt: skip
    else:
        assert language is not None
        model = _connect(init_dir, language, settings, device, dtype)
    if isinstance(model.stage.llm, T5):
        model.stage.llm.whole_caption_share = settings.whole_caption_share
    return model


def _connect(
    init_dir: str | Path, llm: LanguageModel, settings: Stage2Settings, device: torch.device, dtype: torch.dtype
) -> SavedStage2:
    """The Q-Former of stage 1, or a new one, in front of the language model."""
    if not init_dir:
        return connect_llm(build_new(settings), llm, settings.dropout, device)
    return start_stage2(init_dir, llm, settings.dropout, device, image_encoder=settings.image_encoder, dtype=dtype)


def _check_start(init_dir: str | Path, settings: Stage2Settings) -> None:
    """UsageError where neither a model nor an image encoder for a new Q-Former is named, or settings of both are."""
    if init_dir:
        settings.refuse_new_qformer()
    elif not settings.image_encoder:
        raise UsageError(
            "Neither --init nor --image-encoder is given. Name what stage 1 saved (--init RUN/stage1), or the image "
            "encoder that a new Q-Former is to be put on, without stage 1."
        )


def _train(
    model: SavedStage2,
    dataset: PairDataset,
    settings: Stage2Settings,
    output_dir: Path,
    progress: Progress,
    fields: Mapping[str, Any],
    images_digest: Callable[[], str] | None,
) -> TrainSummary:
    stage, encoder = model.stage.train(), model.encoder
    processes = join_processes(settings)
    features = FrozenFeatures(encoder, dataset, settings, processes, progress, images_digest)

    def prepare(batch: Batch, draws: Draws) -> dict[str, Any]:
        splits = draws.uniform(1, len(batch.texts))[0].tolist()
        return {"features_BPD": features(batch), "texts": batch.texts, "ranks": processes.ranks, "draws": splits}

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
        fields=fields,
    )


def find_llm(llm: str) -> Path:
    """The folder of the language model that `llm` means. UsageError where there is none."""
    return find_model_dir(llm, "language model", embedded=None, give=GIVE_LLM)


def stage2_identity(init_dir: str | Path, llm: str, settings: Stage2Settings) -> dict[str, str]:
    """What the models named contain; where they lie may change."""
    if init_dir:
        return digests_of(init_dir, llm, settings.image_encoder)
    return new_identity(settings) | ({"llm_sha256": weights_digest(find_llm(llm))} if llm else {})


def digests_of(init_dir: str | Path, llm: str, image_encoder: str) -> dict[str, str]:
    """What the models named contain, for those that are; where they lie may change."""
    found = {"init_sha256": blip2_digest(init_dir)}
    if llm:
        found["llm_sha256"] = weights_digest(find_llm(llm))
    if image_encoder:
        found["image_encoder_sha256"] = image_encoder_digest(image_encoder)
    return found
