"""Train a small CLIP by image-text contrast, and save it as open_clip keeps a model in a folder (CLIP §2).

In: runs with a manifest (or a dataset), a folder with a tokenizer whose end token has the highest id. Out: a
folder that `open_clip.create_model_and_transforms("local-dir:FOLDER")` and `open_clip.get_tokenizer` open:
open_clip_config.json, open_clip_model.safetensors (float16) and the tokenizer's files.

The image tower is open_clip's ModifiedResNet rather than its ViT: at 64 px and 128 pairs a step it found
29% of 1,000 unseen scenes by their captions after 114 steps; a ViT (patch 8, width 128, 4 layers) 11% after
100. Its batch norms count a process's own batch, and the running statistics saved are the first process's; several
processes so take other steps than one with all of their pairs.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from open_clip.model import CLIP
from torch import Tensor, nn

from capfilt.data.rundir import RunDir
from capfilt.errors import UsageError
from capfilt.models.contrast import same_images
from capfilt.models.losses import cosines, itc_loss
from capfilt.models.ranks import ALONE, Ranks
from capfilt.progress import NullProgress, Progress
from capfilt.settings import ClipTrainSettings
from capfilt.train.batches import Batch, Draws, PairDataset, image_ids, iterate_batches, normalise
from capfilt.train.loop import TrainSummary, train
from capfilt.train.pairs import read_pairs, runs_digest
from capfilt.train.processes import join_processes
from capfilt.train.tokenizer_files import save_tokenizer
from capfilt.weights.model_files import CLIP_MEAN, CLIP_STD, load_tokenizer, save_tensors, weights_digest

HEAD_WIDTH = 32
"""Width of an attention head (CLIP: 64); there are too few channels here for wider ones."""

MAX_LOGIT_SCALE = math.log(100)
"""Highest logarithm of the inverse temperature (CLIP §2.5: logits are not scaled by more than 100)."""

CONFIG_FILE, WEIGHTS_FILE = "open_clip_config.json", "open_clip_model.safetensors"


def train_clip(
    run_dirs: Sequence[RunDir | str | Path],
    tokenizer_dir: Path,
    settings: ClipTrainSettings,
    output_dir: Path,
    progress: Progress | None = None,
) -> TrainSummary:
    """Trains on the kept pairs of `run_dirs`.

    Errors as those of `read_pairs`, `load_clip_tokenizer` and `train`.
    """
    progress = progress or NullProgress()
    dataset = read_pairs(
        run_dirs, image_size_px=settings.image_size_px, smallest_crop=settings.random_crop,
        run_weights=settings.run_weights, progress=progress,
    )  # fmt: skip
    fields = {"input": runs_digest(run_dirs), "tokenizer_sha256": weights_digest(tokenizer_dir)}
    return train_clip_on(dataset, tokenizer_dir, settings, output_dir, progress=progress, fields=fields)


def train_clip_on(
    dataset: PairDataset,
    tokenizer_dir: Path,
    settings: ClipTrainSettings,
    output_dir: Path,
    *,
    progress: Progress | None = None,
    fields: Mapping[str, Any] | None = None,
) -> TrainSummary:
    """Trains on a dataset whose pictures have `image_size_px`; `fields` identify it."""
    processes = join_processes(settings)
    if processes.num > 1 and settings.sharding == "full":
        raise UsageError("train clip has no --sharding full: open_clip's temperature is a scalar. Leave it out.")
    device = processes.device
    torch.manual_seed(settings.seed)
    tokenizer = load_clip_tokenizer(tokenizer_dir)
    model = build_clip(settings, len(tokenizer)).to(device).train()

    def prepare(batch: Batch, _draws: Draws) -> dict[str, Any]:
        tokens_BT = _encode(tokenizer, batch.texts, settings, device)
        images_BCHW, ids_B = batch.images_on(device), image_ids(batch, device)
        return {"images_BCHW": images_BCHW, "tokens_BT": tokens_BT, "ids_B": ids_B, "ranks": processes.ranks}

    def clamp_temperature(_step: int) -> None:
        with torch.no_grad():
            model.logit_scale.clamp_(0, MAX_LOGIT_SCALE)

    return train(
        ClipLosses(model),
        prepare,
        open_batches=lambda cursor: iterate_batches(dataset, settings, cursor, ranks=processes.ranks),
        settings=settings,
        output_dir=output_dir,
        save=lambda folder: save_clip(folder, model, settings, tokenizer),
        processes=processes,
        progress=progress,
        name="clip",
        extra_tensors=lambda: _saved_buffers(model),
        fields=fields,
        after_step=clamp_temperature,
    )


class ClipLosses(nn.Module):
    """Contrast of images and texts of all ranks (CLIP §2.3)."""

    def __init__(self, model: CLIP) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, images_BCHW: Tensor, tokens_BT: Tensor, ids_B: Tensor | None = None, ranks: Ranks = ALONE
    ) -> dict[str, Tensor]:
        """`loss`, and the inverse temperature for the log; pairs with equal `ids_B` share their target."""
        image_BE = self.model.encode_image(images_BCHW, normalize=True)
        text_BE = self.model.encode_text(tokens_BT, normalize=True)
        scale, offset = self.model.logit_scale.exp(), ranks.offset(len(image_BE))
        i2t = scale * cosines(image_BE, ranks.gather(text_BE))
        t2i = scale * cosines(text_BE, ranks.gather(image_BE))
        same_image_BA = same_images(ids_B, ranks)
        return {"loss": itc_loss(i2t, t2i, offset=offset, same_image_BA=same_image_BA), "logit_scale": scale}


def build_clip(settings: ClipTrainSettings, vocab_size: int) -> CLIP:
    """An untrained model of the settings' sizes."""
    sizes = deepcopy(_model_config(settings, vocab_size))
    sizes["text_cfg"].pop("hf_tokenizer_name")
    return CLIP(**sizes)


def load_clip_tokenizer(folder: Path) -> Any:
    """The tokenizer of a folder.

    Raises UsageError where its end token is not the last: open_clip pools at the highest id.
    """
    tokenizer = load_tokenizer(folder)
    if tokenizer.eos_token_id != len(tokenizer) - 1:
        raise UsageError(
            f"The end token of {folder} has id {tokenizer.eos_token_id}; expected the highest, "
            f"{len(tokenizer) - 1}. Give a CLIP tokenizer."
        )
    return tokenizer


def save_clip(folder: Path, model: CLIP, settings: ClipTrainSettings, tokenizer: Any) -> None:
    """Writes open_clip's folder layout; weights in float16, counters as they are."""
    preprocess = {"mean": CLIP_MEAN, "std": CLIP_STD, "interpolation": "bicubic", "resize_mode": "squash"}
    config = {"model_cfg": _model_config(settings, model.vocab_size), "preprocess_cfg": preprocess}
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")
    save_tensors(folder / WEIGHTS_FILE, model.state_dict(), torch.float16)
    save_tokenizer(tokenizer, folder)


def clip_similarity(folder: Path, images_NHWC: np.ndarray, texts: Sequence[str]) -> np.ndarray:
    """Cosine similarities (texts, images), float32, by plain open_clip; for the figures of a trained model.

    Args:
        folder: what `train_clip` saved.
        images_NHWC: uint8 pictures of the model's size.
        texts: any number of texts; with one an image, in order, the diagonal holds the true pairs.
    """
    logging.getLogger("open_clip").setLevel(logging.WARNING)
    model: Any = open_clip.create_model(f"local-dir:{folder}").eval()
    tokenize = open_clip.get_tokenizer(f"local-dir:{folder}")
    with torch.inference_mode():
        images = normalise(images_NHWC, CLIP_MEAN, CLIP_STD)
        image_NE = torch.cat([model.encode_image(part, normalize=True) for part in images.split(128)])
        tokens = tokenize(list(texts))
        text_ME = torch.cat([model.encode_text(part, normalize=True) for part in tokens.split(256)])
        return (text_ME @ image_NE.T).numpy()


def _model_config(settings: ClipTrainSettings, vocab_size: int) -> dict[str, Any]:
    """open_clip's `model_cfg`; `hf_tokenizer_name` makes it look for the tokenizer in the folder itself."""
    return {
        "embed_dim": settings.embed_dim,
        "vision_cfg": {
            "image_size": settings.image_size_px,
            "layers": list(settings.vision_stages),
            "width": settings.vision_width,
            "head_width": HEAD_WIDTH,
        },
        "text_cfg": {
            "context_length": settings.context_length,
            "vocab_size": vocab_size,
            "width": settings.text_width,
            "heads": settings.text_width // HEAD_WIDTH,
            "layers": settings.text_layers,
            "hf_tokenizer_name": "tokenizer.json",
        },
    }


def _encode(tokenizer: Any, texts: list[str], settings: ClipTrainSettings, device: torch.device) -> Tensor:
    """Token ids (B, context_length), padded, as open_clip's own tokenizer wrapper gives them."""
    return tokenizer(
        texts, padding="max_length", truncation=True, max_length=settings.context_length, return_tensors="pt"
    ).input_ids.to(device)


def _saved_buffers(model: CLIP) -> dict[str, Tensor]:
    """Batch norm's running statistics, which a resumed training needs; not the causal mask."""
    state = model.state_dict()
    return {name: state[name] for name, _ in model.named_buffers() if name in state}
