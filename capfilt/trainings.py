"""The trainings that a recipe may have: one entry each in `TRAININGS`, and the class that its section fills.

In: the settings of a section [train.NAME] and runs with a manifest. Out: the trained model in a folder, and what its
record says of the models it started from. A model that an earlier section of the recipe trains is named `@NAME` there;
no folder and no hub id begins so (a folder of that name is `./@NAME`). torch is imported when something is asked of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from capfilt.progress import Progress
from capfilt.settings import (
    AlbefTrainSettings,
    BlipTrainSettings,
    CaptionerTrainSettings,
    FilterTrainSettings,
    Stage1Settings,
    Stage2Settings,
    TrainSettings,
)
from capfilt.settings.checks import require

if TYPE_CHECKING:
    from capfilt.data.rundir import RunDir
    from capfilt.train.loop import TrainSummary

Runs = Sequence["RunDir"]
Train = Callable[[Runs, Any, Path, Progress], "TrainSummary"]

RESULT = "@"
"""Begins the name of what an earlier section of a recipe trains."""
MODEL_SETTINGS = ("init", "image_encoder", "qformer_init", "text_init", "vision_init", "tokenizer", "llm")
"""Settings that name models."""

_FROM_NOTHING = (
    "text_init", "vision_init", "tokenizer", "patch_size_px", "vision_width", "vision_depth", "text_width",
    "text_depth", "max_positions", "embed_dim", "head_width",
)  # fmt: skip
UNUSED_BY_BLIP = ("prompt",)
UNUSED_BY_CAPTIONER = (*_FROM_NOTHING, "losses", "known_false")
UNUSED_BY_FILTER = (*_FROM_NOTHING, "losses", "prompt", "captions_per_image", "label_smoothing")
"""Settings that a training does not ask: recipes and `--set` refuse them instead of doing nothing."""


@dataclass(frozen=True, kw_only=True)
class Stage2Section(Stage2Settings):
    """Stage 2, the model that it starts from and the language model that it connects to."""

    init: str = "@stage1"
    """`@stage1`, what the section [train.stage1] before it trains; a folder or hub id of a stage-1 model, or of a
    stage-2 model to go on from; or empty for a new Q-Former on image_encoder, without stage 1."""
    llm: str = ""
    """Folder or hub id of an OPT or T5, `embedded-opt` or `embedded-t5`; empty where init is a stage-2 model."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init:
            self.refuse_new_qformer()
            return
        given, expected = self.image_encoder, "that of a new Q-Former where init is empty"
        require(bool(given), "image_encoder", given, expected)


@dataclass(frozen=True, kw_only=True)
class Training:
    """One training that a recipe may have."""

    section: type[TrainSettings]
    """What its section fills."""
    train: Train
    """Trains on runs, with a section's settings, into a folder."""
    identity: Callable[[Any], Mapping[str, str]]
    """What the models of a section's settings contain, as the record of the training has it; they have to be here."""
    results: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Setting → the trainings whose result it may name."""
    needs_init: bool = False
    """Whether it starts from a model in any case."""
    unused: tuple[str, ...] = ()
    """Settings of the class that it does not ask."""


def _train_blip(runs: Runs, settings: BlipTrainSettings, output_dir: Path, progress: Progress) -> TrainSummary:
    from capfilt.train.blip import train_blip

    return train_blip(runs, settings, output_dir, progress)


def _train_captioner(runs: Runs, settings: BlipTrainSettings, output_dir: Path, progress: Progress) -> TrainSummary:
    from capfilt.train.blip import train_captioner

    return train_captioner(runs, settings, output_dir, progress)


def _train_filter(runs: Runs, settings: BlipTrainSettings, output_dir: Path, progress: Progress) -> TrainSummary:
    from capfilt.train.blip import train_filter

    return train_filter(runs, settings, output_dir, progress)


def _blip_identity(part: str) -> Callable[[BlipTrainSettings], Mapping[str, str]]:
    def identity(settings: BlipTrainSettings) -> Mapping[str, str]:
        from capfilt.train.blip_start import origin_digest

        return {"origin_sha256": origin_digest(settings, part)}

    return identity


def _train_albef(runs: Runs, settings: AlbefTrainSettings, output_dir: Path, progress: Progress) -> TrainSummary:
    from capfilt.train.albef import train_albef

    return train_albef(runs, settings, output_dir, progress)


def _albef_identity(settings: AlbefTrainSettings) -> Mapping[str, str]:
    from capfilt.train.albef import origin_digest

    return {"origin_sha256": origin_digest(settings)}


def _train_stage1(runs: Runs, settings: Stage1Settings, output_dir: Path, progress: Progress) -> TrainSummary:
    from capfilt.train.stage1 import train_stage1

    return train_stage1(runs, settings, output_dir, progress)


def _stage1_identity(settings: Stage1Settings) -> Mapping[str, str]:
    from capfilt.train.stage1 import stage1_identity

    return stage1_identity(settings)


def _train_stage2(runs: Runs, section: Stage2Section, output_dir: Path, progress: Progress) -> TrainSummary:
    from capfilt.train.stage2 import train_stage2

    return train_stage2(runs, section.init, section.llm, section, output_dir, progress)


def _stage2_identity(section: Stage2Section) -> Mapping[str, str]:
    from capfilt.train.stage2 import stage2_identity

    return stage2_identity(section.init, section.llm, section)


_BLIP_PARTS = ("captioner", "filter")

TRAININGS: dict[str, Training] = {
    "blip": Training(
        section=BlipTrainSettings, train=_train_blip, identity=_blip_identity("blip"), unused=UNUSED_BY_BLIP,
    ),
    "captioner": Training(
        section=CaptionerTrainSettings, train=_train_captioner, identity=_blip_identity("captioner"),
        results={"init": ("blip",)}, needs_init=True, unused=UNUSED_BY_CAPTIONER,
    ),
    "filter": Training(
        section=FilterTrainSettings, train=_train_filter, identity=_blip_identity("filter"),
        results={"init": ("blip",)}, needs_init=True, unused=UNUSED_BY_FILTER,
    ),
    "albef": Training(section=AlbefTrainSettings, train=_train_albef, identity=_albef_identity),
    "stage1": Training(
        section=Stage1Settings, train=_train_stage1, identity=_stage1_identity,
        results={"image_encoder": _BLIP_PARTS, "qformer_init": _BLIP_PARTS},
    ),
    "stage2": Training(
        section=Stage2Section, train=_train_stage2, identity=_stage2_identity,
        results={"init": ("stage1",), "image_encoder": _BLIP_PARTS, "qformer_init": _BLIP_PARTS},
    ),
}  # fmt: skip
"""Name of a training → what it is. Its section is [train.NAME], its result RUN/NAME."""
