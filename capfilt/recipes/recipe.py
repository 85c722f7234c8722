"""What a recipe is, once it is read and checked: a `Recipe` of sections, each typed."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import ClassVar

from capfilt.errors import UsageError
from capfilt.settings import CaptionSettings, DownloadSettings, FilterSettings, RankSettings, TrainSettings
from capfilt.settings.checks import MAX_WORLD_URLS, require
from capfilt.trainings import MODEL_SETTINGS, RESULT, TRAININGS

TRAIN = "train."
"""Begins the name of a training's section."""

_OUTPUT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_TAKEN = ("shards", "captions", "clip", "itm", "manifest", "curated", "quarantine", "world")
"""Folders of a run that are no training's."""


@dataclass(frozen=True, kw_only=True)
class SourceSettings:
    """What is curated: a URL table, tars, or the built-in miniature world. One of the three."""

    alternatives: ClassVar[tuple[str, ...]] = ("table", "tars", "world_urls")
    """Settings of which one is given."""

    table: str | None = None
    """URL + text table (Parquet, CSV, TSV, JSONL, TXT; local or any address fsspec reads)."""
    tars: tuple[str, ...] = ()
    """WebDataset tars to import; braces and globs allowed."""
    world_urls: int | None = None
    """Number of URLs served on loopback by the built-in miniature world."""
    world_seed: int = 0
    """Seed of that world."""

    def __post_init__(self) -> None:
        given = [n for n in self.alternatives if getattr(self, n)]
        if len(given) != 1:
            found = " and ".join(given) or "none of them"
            raise UsageError(f"source gives {found}; expected one of {', '.join(self.alternatives)}.")
        num = self.world_urls
        require(num is None or 1 <= num <= MAX_WORLD_URLS, "world_urls", num, f"1 to {MAX_WORLD_URLS}")


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """What a section [train.NAME] says beside the settings of the training: what it reads, and where its model goes."""

    output: str = ""
    """Folder of the run that the model is saved in; empty for the name of the training (RUN/stage1)."""
    runs: tuple[str, ...] = ()
    """Further runs whose kept pairs it is trained on, after those of the recipe's own; run_weights has a weight for
    each."""
    own_run: bool = True
    """Train on the recipe's own run too; false for `runs` alone."""

    def __post_init__(self) -> None:
        name = self.output
        free = not name or (_OUTPUT.fullmatch(name) is not None and name not in _TAKEN)
        require(free, "output", name, "letters, digits, '.', '_', '-', and none of the run's own folders")
        require(self.own_run or bool(self.runs), "own_run", self.own_run, "true where no other runs are named")


@dataclass(frozen=True, kw_only=True)
class TrainingSection:
    """One training of a recipe."""

    name: str
    """Its entry of `TRAININGS`."""
    settings: TrainSettings
    """As read: `@NAME` stands for what an earlier section trains."""
    data: TrainingData = field(default_factory=TrainingData)

    @property
    def output(self) -> str:
        """Folder of the run that its model is saved in."""
        return self.data.output or self.name

    @property
    def results(self) -> dict[str, str]:
        """Setting → the earlier training whose result it names."""
        named = {setting: getattr(self.settings, setting, "") for setting in MODEL_SETTINGS}
        return {setting: name[len(RESULT) :] for setting, name in named.items() if name.startswith(RESULT)}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One recipe, read and checked. A stage that is None is not run; the trainings are, in their order."""

    name: str
    path: Path
    description: str = ""
    run_dir: str = ""
    source: SourceSettings | None = None
    download: DownloadSettings = field(default_factory=DownloadSettings)
    caption: CaptionSettings | None = None
    rank: RankSettings | None = None
    filter: FilterSettings | None = None
    trainings: tuple[TrainingSection, ...] = ()

    texts: ClassVar[dict[str, str]] = {
        "description": "What the recipe does, in a line.",
        "run_dir": "Directory of the run, where the command names none; empty for runs/NAME.",
    }
    """Keys before the first section, with their sentences."""
    sections: ClassVar[dict[str, type]] = {
        "source": SourceSettings,
        "download": DownloadSettings,
        "caption": CaptionSettings,
        "rank": RankSettings,
        "filter": FilterSettings,
    } | {f"{TRAIN}{name}": training.section for name, training in TRAININGS.items()}
    """Name of a section → what it fills."""

    def __post_init__(self) -> None:
        if self.caption is None and (self.rank is not None or self.filter is not None):
            raise UsageError(f"The recipe {self.name} has no [caption]; [rank] and [filter] work on its captions.")

    def line(self) -> str:
        """What it would do, in a line."""
        steps = [*self._curation(), *(f"train {t.name} to {t.output}" for t in self.trainings)]
        return ", then ".join(steps) or "nothing: it has no section"

    def _curation(self) -> list[str]:
        """The steps before the trainings."""
        steps: list[str] = []
        if self.source is not None:
            source = self.source
            what = f"download {source.table}" if source.table else f"import {', '.join(source.tars)}"
            steps.append(f"download {source.world_urls:,} URLs of the miniature world" if source.world_urls else what)
        if self.caption is not None:
            each = "caption" if self.caption.num_captions == 1 else "captions"
            writer = self.caption.captioner or "no captioner yet"
            steps.append(f"write {self.caption.num_captions} {each} an image ({writer})")
        if self.rank is not None:
            steps.append(f"rank them and keep {self.rank.keep} ({self.rank.clip_model})")
        if self.filter is not None:
            model = self.filter.filter_model or "no filter yet"
            steps.append(f"keep pairs with an ITM score of {self.filter.threshold:g} or more ({model})")
        return steps


def settings_of(section: str) -> dict[str, type]:
    """Setting that a section may have → the class that it fills a field of."""
    cls = Recipe.sections[section]
    if not section.startswith(TRAIN):
        return {f.name: cls for f in fields(cls)}
    unused = TRAININGS[section.removeprefix(TRAIN)].unused
    of_data: dict[str, type] = {f.name: TrainingData for f in fields(TrainingData)}
    return {f.name: cls for f in fields(cls) if f.name not in unused} | of_data
