"""ALBEF: pre-training with ITC + ITM + MLM and momentum distillation (ALBEF §3).

In: runs with a manifest, and an ALBEF to go on from, or BERT and a ViT to start with, or a tokenizer and sizes. Out: a
folder as `capfilt.weights.albef` has it, with momentum encoders and queue, from which training goes on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from capfilt.data.rundir import RunDir
from capfilt.errors import UsageError
from capfilt.models.albef import Albef, AlbefConfig, AlbefLosses
from capfilt.models.contrast import bound_temperature
from capfilt.models.convert_albef import from_bert
from capfilt.models.convert_blip2 import State, find_text_encoder
from capfilt.models.masking import NUM_DRAWS, MaskingConfig, mask_tokens
from capfilt.models.momentum import MomentumConfig
from capfilt.models.vit import change_image_size, interpolate_positions
from capfilt.progress import NullProgress, Progress
from capfilt.settings import AlbefTrainSettings
from capfilt.train.batches import Batch, Draws, image_ids, iterate_batches
from capfilt.train.loop import TrainSummary, train
from capfilt.train.optim import ramped_alpha
from capfilt.train.pairs import read_pairs, runs_digest
from capfilt.train.processes import Processes, join_processes
from capfilt.train.starts import bert_sizes, find_bert, new_vision, sizes_from_settings
from capfilt.train.tokens import refuse_longer_texts, tokenise
from capfilt.weights.albef import (
    LoadedAlbef,
    albef_digests,
    find_albef_dir,
    load_trainable_albef,
    refuse_unlike_original,
    save_albef,
)
from capfilt.weights.find import SIDE_FILES, find_model_dir
from capfilt.weights.model_files import (
    ImagePreparation,
    load_tokenizer,
    read_weights,
    refuse_odd_shapes,
    tokenizer_digest,
    weights_digest,
)
from capfilt.weights.vit import load_vit_start

DEFAULT_IMAGE_SIZE_PX = 256
"""Of a new one (ALBEF §3.5: 256 in pre-training)."""

ALL_LOSSES = ("itc", "itm", "mlm")


def train_albef(
    run_dirs: Sequence[RunDir | str | Path],
    settings: AlbefTrainSettings,
    output_dir: Path,
    progress: Progress | None = None,
) -> TrainSummary:
    """Pre-train an ALBEF.

    Errors are those of `read_pairs`, the model loaders and `train`; UsageError where nothing is given to start from.
    """
    torch.manual_seed(settings.seed)
    progress = progress or NullProgress()
    start = _start_from_init(settings) if settings.init else _start_anew(settings)
    refuse_longer_texts(settings.max_text_tokens, start.model.config.max_positions)
    if settings.save_original:
        refuse_unlike_original(start.model)
    objective = build_objective(start, settings)
    processes = join_processes(settings)
    objective.to(processes.device).train()
    dataset = read_pairs(
        run_dirs, image_size_px=start.preparation.image_size_px, smallest_crop=settings.random_crop,
        run_weights=settings.run_weights, progress=progress,
    )  # fmt: skip
    inputs = AlbefInputs(settings, start.tokenizer, processes, dataset.num_shown)

    def save(folder: Path) -> None:
        momentum = None if objective.momentum is None else objective.momentum.state_dict()
        temperature = objective.contrast.temperature.detach()
        saved = replace(start, model=objective.model, temperature=temperature, momentum=momentum)
        save_albef(folder, saved, original=settings.save_original)

    return train(
        objective,
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
        name="train albef",
        extra_tensors=lambda: momentum_tensors(objective),
        fields={"input": runs_digest(run_dirs), "origin_sha256": origin_digest(settings)},
        after_step=lambda _step: follow_model(objective),
        some_unused=set(settings.losses) != set(ALL_LOSSES),
    )  # fmt: skip


def origin_digest(settings: AlbefTrainSettings) -> str:
    """What identifies the files that a training starts from."""
    if settings.init:
        path = Path(settings.init).expanduser()
        digests = albef_digests(path if path.is_file() else find_albef_dir(settings.init))
        named = "".join(f"{name} {digest}\n" for name, digest in sorted(digests.items()))
        return hashlib.sha256(named.encode()).hexdigest()
    if settings.text_init:
        text = weights_digest(find_bert(settings.text_init))
    else:
        text = tokenizer_digest(_tokenizer_dir(settings))
    vision = load_vit_start(settings.vision_init).digest if settings.vision_init else ""
    return " ".join(part for part in (text, vision) if part)


def build_objective(start: LoadedAlbef, settings: AlbefTrainSettings) -> AlbefLosses:
    """The losses of a model, with its momentum encoders and queue where they are asked for.

    What was saved of them is gone on from; of a queue of another size, what fits. Otherwise they start as the model
    and empty.
    """
    config = MomentumConfig(settings.momentum, settings.queue_size) if settings.momentum else None
    objective = AlbefLosses(start.model, config)
    objective.contrast.start_at(start.temperature.item())
    if objective.momentum is not None and start.momentum is not None:
        copy = objective.momentum.model
        weights = {n.removeprefix("model."): t for n, t in start.momentum.items() if n.startswith("model.")}
        refuse_odd_shapes(weights, copy.state_dict())
        copy.load_state_dict(weights)
        images, texts, place = (start.momentum[f"queue.{name}"] for name in ("images", "texts", "place"))
        objective.momentum.queue.take_over(images, texts, int(place))
    return objective


def follow_model(objective: AlbefLosses) -> None:
    """After a step: the momentum encoders go the model's way, the queue takes their features, the temperature is kept
    in its bounds.
    """
    bound_temperature(objective.contrast.temperature)
    if objective.momentum is not None:
        objective.momentum.follow(objective.model)


def momentum_tensors(objective: AlbefLosses) -> dict[str, Tensor]:
    """What a checkpoint holds of momentum encoders and queue, each weight once."""
    if objective.momentum is None:
        return {}
    named = [*objective.momentum.named_parameters(), *objective.momentum.named_buffers()]
    return {f"momentum.{name}": tensor for name, tensor in named}


@dataclass(frozen=True)
class AlbefInputs:
    """Makes the objective's inputs of a batch."""

    settings: AlbefTrainSettings
    tokenizer: Any
    processes: Processes
    num_images: int
    """Of an epoch."""

    def __call__(self, batch: Batch, draws: Draws) -> dict[str, Any]:
        settings, device = self.settings, self.processes.device
        tokens_BT, _ = tokenise(
            self.tokenizer, batch.texts, settings.max_text_tokens, to_the_longest=self.processes.num == 1
        )
        num_texts, num_tokens = tokens_BT.shape
        numbers = draws.uniform(2 + NUM_DRAWS * settings.max_text_tokens, num_texts)  # whatever the padding
        by_token_3BT = numbers[2:].unflatten(0, (NUM_DRAWS, -1)).transpose(1, 2)[..., :num_tokens]
        masked_BT, is_masked_BT = mask_tokens(tokens_BT, by_token_3BT, self._masking())
        num_epochs = batch.cursor.num_epochs(self.num_images, len(batch.keys) * self.processes.num)
        return {
            "images_BCHW": batch.images_on(device), "tokens_BT": tokens_BT.to(device), "losses": settings.losses,
            "ids_B": image_ids(batch, device),
            "masked_tokens_BT": masked_BT.to(device), "is_masked_BT": is_masked_BT.to(device),
            "uniform_2B": numbers[:2].to(device), "ranks": self.processes.ranks,
            "alpha": ramped_alpha(settings.alpha, settings.alpha_epochs, num_epochs),
        }  # fmt: skip

    def _masking(self) -> MaskingConfig:
        tokenizer = self.tokenizer
        return MaskingConfig(
            mask_token_id=tokenizer.mask_token_id, special_token_ids=tuple(tokenizer.all_special_ids),
            vocab_size=len(tokenizer), share=self.settings.mlm_share,
        )  # fmt: skip


def _start_from_init(settings: AlbefTrainSettings) -> LoadedAlbef:
    """An earlier model, for images of the size asked for."""
    loaded = load_trainable_albef(settings.init)
    return loaded if settings.image_size_px is None else _at_image_size(loaded, settings.image_size_px)


def _at_image_size(loaded: LoadedAlbef, image_size_px: int) -> LoadedAlbef:
    """The same for images of another size: positions are interpolated, the momentum encoder's too."""
    try:
        change_image_size(loaded.model.vision, image_size_px)
    except ValueError as error:
        raise UsageError(f"--image-size-px {image_size_px}: {error}.") from None
    momentum = loaded.momentum
    if momentum is not None:
        name, side = "model.vision.position_embedding", image_size_px // loaded.model.vision.config.patch_size_px
        momentum = {**momentum, name: interpolate_positions(momentum[name], (side, side))}
    preparation = replace(loaded.preparation, image_size_px=image_size_px)
    return replace(loaded, momentum=momentum, preparation=preparation)


def _start_anew(settings: AlbefTrainSettings) -> LoadedAlbef:
    """A new model: at random, or its parts from published weights."""
    image_size_px = settings.image_size_px or DEFAULT_IMAGE_SIZE_PX
    vision = new_vision(settings, DEFAULT_IMAGE_SIZE_PX)
    config, tokenizer, weights = _new_text(settings, vision.config.width)
    model = Albef(vision, config, embed_dim=settings.embed_dim)
    if weights:
        state = model.state_dict()
        weights["head.vocabulary.weight"] = weights["text.word_embedding.weight"]
        refuse_odd_shapes(weights, state)
        model.load_state_dict(state | weights)
    return LoadedAlbef(model, tokenizer, ImagePreparation(image_size_px))


def _new_text(settings: AlbefTrainSettings, vision_width: int) -> tuple[AlbefConfig, Any, State]:
    """Sizes, tokenizer and first weights (none from nothing) of the text side."""
    shared: dict[str, Any] = {
        "text_depth": settings.text_depth, "vision_width": vision_width, "dropout": settings.dropout,
    }  # fmt: skip
    depth = settings.text_depth + settings.fusion_depth
    if settings.text_init:
        folder = find_bert(settings.text_init)
        tokenizer, state = _bert_tokenizer(folder), read_weights(folder)
        rows = len(state[find_text_encoder(state) + "embeddings.word_embeddings.weight"])
        sizes = {**bert_sizes(folder), "depth": depth, "vocab_size": rows}
        config = AlbefConfig(**sizes, **_token_ids(tokenizer), **shared)
        return config, tokenizer, from_bert(state, config)
    tokenizer = _bert_tokenizer(_tokenizer_dir(settings))
    sizes = {**sizes_from_settings(settings, depth), "vocab_size": len(tokenizer)}
    config = AlbefConfig(**sizes, **_token_ids(tokenizer), **shared)
    return config, tokenizer, {}


def _tokenizer_dir(settings: AlbefTrainSettings) -> Path:
    """The folder of the tokenizer that a model from nothing has."""
    if not settings.tokenizer:
        raise UsageError(
            "None of --init, --text-init and --tokenizer is given; name an ALBEF to go on from, a BERT to start from "
            "(google-bert/bert-base-uncased), or a tokenizer to start from nothing (`embedded`: the miniature world's)."
        )
    return find_model_dir(settings.tokenizer, "tokenizer", patterns=SIDE_FILES)


def _bert_tokenizer(folder: Path) -> Any:
    """A tokenizer with the tokens that BERT's has; UsageError for another kind."""
    tokenizer = load_tokenizer(folder)
    ids = _token_ids(tokenizer)
    if missing := sorted(f"[{name.split('_')[0].upper()}]" for name, token_id in ids.items() if token_id is None):
        raise UsageError(
            f"The tokenizer in {folder} has no {', '.join(missing)}; expected one of BERT's kind. "
            "Give such a one: --tokenizer google-bert/bert-base-uncased."
        )
    return tokenizer


def _token_ids(tokenizer: Any) -> dict[str, Any]:
    return {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "cls", "sep", "mask")}
