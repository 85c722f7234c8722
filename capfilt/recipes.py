"""Recipes: one TOML file says what a run does. In: a path or the name of a bundled recipe. Out: a `Recipe`.

A recipe has a `description`, an optional `run_dir` and sections. `[source]` says what is curated and may be
left out (the run then goes on from the shards it has); `[download]`, `[caption]`, `[rank]`, `[filter]` fill the
settings of that name, `[train.NAME]` those of a training (`capfilt/trainings.py` has their names); a stage or a
training without its section is not run (`[download]` may be left out: its defaults hold). Trainings come in the order
of the file, and a later one may start from what an earlier one trained: `init = "@stage1"`. Nothing is inherited or
merged: a recipe is complete by itself.
Every unknown section or key is refused with its line and the nearest valid name.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, TypeVar, get_type_hints

from capfilt.errors import UsageError
from capfilt.settings import CaptionSettings, DownloadSettings, FilterSettings, RankSettings, TrainSettings
from capfilt.settings.checks import require
from capfilt.settings.values import did_you_mean, typed
from capfilt.trainings import MODEL_SETTINGS, RESULT, TRAININGS

Settings = TypeVar("Settings")
MAX_RECIPE_BYTES = 1_000_000

_TRAIN = "train."
_OUTPUT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_TAKEN = ("shards", "captions", "clip", "itm", "manifest", "curated", "quarantine", "world")
"""Folders of a run that are no training's."""


@dataclass(frozen=True, kw_only=True)
class SourceSettings:
    """What is curated: a URL table, tars, or the built-in miniature world. One of the three."""

    table: str | None = None
    """URL + text table (Parquet, CSV, TSV, JSONL, TXT; local or any address fsspec reads)."""
    tars: tuple[str, ...] = ()
    """WebDataset tars to import; braces and globs allowed."""
    world_urls: int | None = None
    """Number of URLs served on loopback by the built-in miniature world."""
    world_seed: int = 0
    """Seed of that world."""

    def __post_init__(self) -> None:
        given = [n for n in ("table", "tars", "world_urls") if getattr(self, n)]
        if len(given) != 1:
            found = " and ".join(given) or "none of them"
            raise UsageError(f"source gives {found}; expected one of table, tars, world_urls.")


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

    sections: ClassVar[dict[str, type]] = {
        "source": SourceSettings,
        "download": DownloadSettings,
        "caption": CaptionSettings,
        "rank": RankSettings,
        "filter": FilterSettings,
    } | {f"train.{name}": training.section for name, training in TRAININGS.items()}
    """Name of a section → what it fills."""

    def __post_init__(self) -> None:
        if self.caption is None and (self.rank is not None or self.filter is not None):
            raise UsageError(f"{self.path} has no [caption]; [rank] and [filter] work on its captions.")


def bundled_dirs() -> list[Path]:
    """Where the recipes of the project are: inside the installed package, or beside it in the source tree."""
    package = Path(__file__).resolve().parent
    return [folder for folder in (package / "pipelines", package.parent / "pipelines") if folder.is_dir()]


def bundled_recipes() -> dict[str, Path]:
    """Name → file of every bundled recipe."""
    return {path.stem: path for folder in bundled_dirs() for path in sorted(folder.glob("*.toml"))}


def find_recipe(recipe: str) -> Path:
    """The file that `recipe` means: a path, or the name of a bundled recipe (with or without `.toml`)."""
    path = Path(recipe)
    if path.is_file():
        return path
    known = bundled_recipes()
    bundled = known.get(recipe.removesuffix(".toml")) if path.name == recipe else None
    if bundled is not None:
        return bundled
    nearest = did_you_mean(recipe, known)
    raise UsageError(f"No recipe {recipe}: neither a file nor one of {', '.join(sorted(known))}.{nearest}")


def read_recipe(recipe: str) -> Recipe:
    """Read, check and type the recipe that `recipe` means.

    Raises UsageError, with file and line, for a file that is not TOML, an unknown section or key, a value of
    the wrong type and a value out of range.
    """
    path = find_recipe(recipe)
    if path.stat().st_size > MAX_RECIPE_BYTES:
        raise UsageError(f"{path} has {path.stat().st_size:,} bytes; a recipe has {MAX_RECIPE_BYTES:,} at most.")
    try:
        text = path.read_text(encoding="utf-8")
        document = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not a TOML file: {error}. Correct the line and run again.") from error
    return _recipe_of(path, text, document)


def _recipe_of(path: Path, text: str, document: Mapping[str, Any]) -> Recipe:
    texts = ("description", "run_dir")
    values: dict[str, Any] = {"name": path.stem, "path": path}
    trainings: list[TrainingSection] = []
    for key, value in _flat(document):
        where = f"{path}:{line_of(text, None, key)}"
        if key in Recipe.sections:
            if not isinstance(value, dict):
                raise UsageError(f"{where}: {key} is {value!r}; expected a section [{key}].")
            section = _Section(key, value, path, text)
            if key.startswith(_TRAIN):
                trainings.append(_training_of(section, trainings))
            else:
                section.refuse_unknown(_names_of(Recipe.sections[key]))
                values[key] = section.fill(Recipe.sections[key], value)
        elif key not in texts:
            known = [*texts, *Recipe.sections]
            nearest = did_you_mean(key, known)
            raise UsageError(f"{where}: unknown {_kind(value)} {key}.{nearest} Known: {', '.join(known)}.")
        elif not isinstance(value, str):
            raise UsageError(f"{where}: {key} is {value!r}; expected a text in quotes.")
        else:
            values[key] = value
    return Recipe(**values, trainings=tuple(trainings))


def _flat(document: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The entries of the document, those of [train] as train.NAME."""
    for key, value in document.items():
        if key == "train" and isinstance(value, dict):
            yield from ((f"{_TRAIN}{name}", item) for name, item in value.items())
        else:
            yield key, value


def _kind(value: object) -> str:
    return "section" if isinstance(value, dict) else "key"


@dataclass(frozen=True)
class _Section:
    """A section as it stands in the file."""

    name: str
    values: Mapping[str, Any]
    path: Path
    text: str

    def where(self, key: str) -> str:
        """File, line and section of a key."""
        return f"{self.path}:{line_of(self.text, self.name, key)}: [{self.name}]"

    def refuse_unknown(self, known: Sequence[str]) -> None:
        """UsageError for the first key that is none of the `known` ones."""
        for key in self.values:
            if key not in known:
                nearest = did_you_mean(key, known)
                raise UsageError(f"{self.where(key)} has no setting {key}.{nearest} Known: {', '.join(known)}.")

    def fill(self, cls: type[Settings], values: Mapping[str, Any]) -> Settings:
        """The settings that `values` make, typed and checked; every mistake with its line."""
        hints = get_type_hints(cls)
        given: dict[str, Any] = {}
        for key, value in values.items():
            try:
                given[key] = typed(value, hints[key])
            except TypeError as error:
                raise UsageError(f"{self.where(key)} {key} is {value!r}; expected {error}.") from None
        try:
            return cls(**given)
        except UsageError as error:
            raise UsageError(f"{self.where(str(error).split(' ', 1)[0])} {error}") from None


def _names_of(cls: type) -> list[str]:
    return [f.name for f in fields(cls)]


# --- trainings ----------------------------------------------------------------------------------------------


def _training_of(section: _Section, earlier: Sequence[TrainingSection]) -> TrainingSection:
    """A section [train.NAME], after those before it."""
    name = section.name.removeprefix(_TRAIN)
    training = TRAININGS[name]
    of_data = _names_of(TrainingData)
    section.refuse_unknown([n for n in _names_of(training.section) if n not in training.unused] + of_data)
    given = section.values
    settings = section.fill(training.section, {key: given[key] for key in given if key not in of_data})
    data = section.fill(TrainingData, {key: given[key] for key in given if key in of_data})
    found = TrainingSection(name=name, settings=settings, data=data)
    _check_results(found, earlier, section)
    num_runs = len(data.runs) + data.own_run
    if settings.run_weights and len(settings.run_weights) != num_runs:
        raise UsageError(
            f"{section.where('run_weights')} run_weights has {len(settings.run_weights)} weights; expected {num_runs}, "
            f"for {'the own run and ' if data.own_run else ''}runs = {list(data.runs)}."
        )
    if found.output in [other.output for other in earlier]:
        raise UsageError(f"{section.where('output')} output is {found.output!r}, which an earlier section writes to.")
    return found


def _check_results(found: TrainingSection, earlier: Sequence[TrainingSection], section: _Section) -> None:
    """UsageError where a setting names a result that is none, is not there yet, or does not fit."""
    training, before = TRAININGS[found.name], [other.name for other in earlier]
    for setting, named in found.results.items():
        fitting = training.results.get(setting, ())
        where, said = section.where(setting), f"{setting} is {RESULT + named!r}"
        if named not in fitting:
            expected = " or ".join(RESULT + name for name in fitting)
            hint = f", or {expected} of an earlier section" if expected else ""
            raise UsageError(f"{where} {said}; expected a folder or a hub id{hint}.")
        if named not in before:
            raise UsageError(f"{where} {said}, but no section [{_TRAIN}{named}] stands before [{section.name}].")
    if training.needs_init and not getattr(found.settings, "init", ""):
        fitting = " or ".join(RESULT + name for name in training.results["init"])
        raise UsageError(f"{section.where('init')} init is not given; expected a BLIP model, or {fitting}.")


def line_of(text: str, section: str | None, key: str) -> int:
    """Line (from 1) where `key` stands in `[section]`; that of the section where the key is not written."""
    header = re.compile(r"\s*\[+\s*([^\]]+?)\s*\]+\s*(#.*)?$")
    wanted = re.compile(rf"""\s*["']?{re.escape(key)}["']?\s*(=|\.)""")
    current: str | None = None
    section_line = 1
    for number, line in enumerate(text.splitlines(), start=1):
        match = header.match(line)
        if match:
            current = str(match.group(1))
            if current == section or (section is None and key in (current, current.split(".")[0])):
                section_line = number
        elif current == section and wanted.match(line):
            return number
    return section_line
