"""Recipe files into settings. In: a path or the name of a bundled recipe. Out: a `Recipe`, or every mistake in the
file, each with its line."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from capfilt.errors import UsageError
from capfilt.recipes.recipe import TRAIN, Recipe, TrainingData, TrainingSection, settings_of
from capfilt.settings.values import did_you_mean, nearest_or_all, typed
from capfilt.trainings import RESULT, TRAININGS

Settings = TypeVar("Settings")
MAX_RECIPE_BYTES = 1_000_000


def bundled_dirs() -> list[Path]:
    """Where the recipes of the project are: inside the installed package, or beside it in the source tree."""
    package = Path(__file__).resolve().parent.parent
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


@dataclass(frozen=True, order=True)
class Mistake:
    """What is wrong in a recipe."""

    line: int
    """From 1."""
    said: str
    """What was found and what was expected."""


def read_recipe(recipe: str) -> Recipe:
    """Read, check and type the recipe that `recipe` means.

    Raises UsageError, with file and line of every mistake, for a file that is not TOML, an unknown section or key,
    a value of the wrong type and a value out of range.
    """
    path = find_recipe(recipe)
    found, mistakes = examine_recipe(path)
    if found is None:
        said = [f"{mistake.line}: {mistake.said}".replace("\n", "\\n") for mistake in mistakes]
        raise UsageError("\n".join(f"{path}:{one}" for one in said))
    return found


def examine_recipe(path: Path) -> tuple[Recipe | None, list[Mistake]]:
    """The recipe in a file; or None, and every mistake in the order of the lines.

    Raises UsageError for a file that is too large for a recipe.
    """
    if path.stat().st_size > MAX_RECIPE_BYTES:
        raise UsageError(f"{path} has {path.stat().st_size:,} bytes; a recipe has {MAX_RECIPE_BYTES:,} at most.")
    try:
        text = path.read_text(encoding="utf-8-sig")  # some editors of Windows begin a file with a mark
        document = tomllib.loads(text)
    except RecursionError:
        return None, [Mistake(1, "values are nested too deeply for a recipe. Correct them and run again.")]
    except ValueError as error:  # not TOML, not UTF-8, a number of thousands of digits
        line = re.search(r"at line (\d+)", str(error))
        number = int(line.group(1)) if line else 1
        return None, [Mistake(number, f"this is not a TOML file: {error}. Correct the line and run again.")]
    return _Reader(path, text).read(document)


class _Reader:
    """Reads one file, and collects its mistakes."""

    def __init__(self, path: Path, text: str) -> None:
        self.path, self.text = path, text
        self.mistakes: list[Mistake] = []
        self.trainings: list[tuple[str, str]] = []
        """Name and output of the trainings so far, wrong ones included."""

    def read(self, document: Mapping[str, Any]) -> tuple[Recipe | None, list[Mistake]]:
        values: dict[str, Any] = {"name": self.path.stem, "path": self.path}
        trainings: list[TrainingSection | None] = []
        for key, value in _flat(document):
            if key in Recipe.sections and isinstance(value, dict):
                section = _Section(key, value, self.text)
                if key.startswith(TRAIN):
                    trainings.append(self._training_of(section))
                else:
                    section.refuse_unknown()
                    values[key] = section.fill(Recipe.sections[key], value)
                self.mistakes += section.mistakes
            elif said := _what_is_wrong(key, value):
                self.mistakes.append(Mistake(line_of(self.text, None, key), said))
            else:
                values[key] = value
        if not self.mistakes:
            try:
                return Recipe(**values, trainings=tuple(filter(None, trainings))), []
            except UsageError as error:
                first = "rank" if values.get("rank") else "filter"
                self.mistakes.append(Mistake(line_of(self.text, None, first), str(error)))
        return None, sorted(self.mistakes)

    def _training_of(self, section: _Section) -> TrainingSection | None:
        """A section [train.NAME], after those before it; None where it has mistakes."""
        name, of_data = section.name.removeprefix(TRAIN), settings_of(section.name)
        section.refuse_unknown()
        parts = {True: {}, False: {}}
        for key, value in section.values.items():
            parts[of_data.get(key) is TrainingData][key] = value
        settings = section.fill(TRAININGS[name].section, parts[False])
        data = section.fill(TrainingData, parts[True])
        found = None
        if settings is not None and data is not None:
            found = TrainingSection(name=name, settings=settings, data=data)
            _check_results(found, [earlier for earlier, _ in self.trainings], section)
            _check_weights(found, section)
        output = str(section.values.get("output") or name)
        if output in [other for _, other in self.trainings]:
            section.note("output", f"output is {output!r}, which an earlier section writes to.")
        self.trainings.append((name, output))
        return found


def _what_is_wrong(key: str, value: object) -> str:
    """What is wrong with an entry of the document that is no right section; nothing for a right text."""
    if key in Recipe.sections:
        return f"{key} is {value!r}; expected a section [{key}]."
    if key in Recipe.texts:
        return "" if isinstance(value, str) else f"{key} is {value!r}; expected a text in quotes."
    known = [*Recipe.texts, *Recipe.sections]
    kind = "section" if isinstance(value, dict) else "key"
    sections = [name for name in Recipe.sections if key in settings_of(name)]
    belongs = f" It is a setting of [{'], ['.join(sections)}]; it stands before any section." if sections else ""
    return f"unknown {kind} {key}.{belongs or nearest_or_all(key, known)}"


def _flat(document: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The entries of the document, those of [train] as train.NAME, and so those of a misspelt [trian.NAME]."""
    for key, value in document.items():
        nested = isinstance(value, dict) and any(isinstance(item, dict) for item in value.values())
        if (key == "train" and isinstance(value, dict)) or (nested and key not in Recipe.sections):
            yield from ((f"{key}.{name}", item) for name, item in value.items())
        else:
            yield key, value


@dataclass(frozen=True)
class _Section:
    """A section as it stands in the file, and the mistakes in it."""

    name: str
    values: Mapping[str, Any]
    text: str
    mistakes: list[Mistake] = field(default_factory=list)

    def note(self, key: str, said: str) -> None:
        """A mistake at the line of a key."""
        self.mistakes.append(Mistake(line_of(self.text, self.name, key), f"[{self.name}] {said}"))

    def refuse_unknown(self) -> None:
        """Note every key that is no setting of the section."""
        known = list(settings_of(self.name))
        for key in self.values:
            if key not in known:
                self.note(key, f"has no setting {key}.{nearest_or_all(key, known)}")

    def fill(self, cls: type[Settings], values: Mapping[str, Any]) -> Settings | None:
        """The settings that `values` make, typed and checked; None where one is wrong, all of which are noted."""
        hints = get_type_hints(cls)
        given: dict[str, Any] = {}
        wrong = [key for key in values if key not in settings_of(self.name)]
        for key in values:
            try:
                if key not in wrong:
                    given[key] = typed(values[key], hints[key])
            except TypeError as error:
                self.note(key, f"{key} is {values[key]!r}; expected {error}.")
                wrong.append(key)
        while True:
            try:
                built = cls(**given)
                return None if wrong else built
            except UsageError as error:
                key = str(error).split(" ", 1)[0]
                # With a wrong value left out, what is said of others that depend on it may be wrong too.
                depends = re.findall(r"\w+", str(error).partition("; expected ")[2])
                if not wrong or (key in given and not set(wrong) & set(depends)):
                    self.note(key, str(error))
                if key not in given:
                    return None
                wrong.append(key)
                del given[key]


# --- trainings ----------------------------------------------------------------------------------------------


def _check_weights(found: TrainingSection, section: _Section) -> None:
    """Note run_weights that are not as many as the runs."""
    weights, data = found.settings.run_weights, found.data
    num_runs = len(data.runs) + data.own_run
    if weights and len(weights) != num_runs:
        runs = f"{'the own run and ' if data.own_run else ''}runs = {list(data.runs)}"
        section.note("run_weights", f"run_weights has {len(weights)} weights; expected {num_runs}, for {runs}.")


def _check_results(found: TrainingSection, before: list[str], section: _Section) -> None:
    """Note where a setting names a result that is none, is not there yet, or does not fit."""
    training = TRAININGS[found.name]
    for setting, named in found.results.items():
        fitting = training.results.get(setting, ())
        said = f"{setting} is {RESULT + named!r}"
        if named not in fitting:
            expected = " or ".join(RESULT + name for name in fitting)
            hint = f", or {expected} of an earlier section" if expected else ""
            section.note(setting, f"{said}; expected a folder or a hub id{hint}.{did_you_mean(named, fitting, RESULT)}")
        elif named not in before:
            section.note(setting, f"{said}, but no section [{TRAIN}{named}] stands before [{section.name}].")
    if training.needs_init and not getattr(found.settings, "init", ""):
        fitting = " or ".join(RESULT + name for name in training.results["init"])
        section.note("init", f"init is not given; expected a BLIP model, or {fitting}.")


_HEADER = re.compile(r"\s*\[+\s*([^\]]+?)\s*\]+\s*(#.*)?$")
_KEY = re.compile(r"""\s*([\w"'.\- ]+?)\s*=""")


def line_of(text: str, section: str | None, key: str) -> int:
    """Line (from 1) where `key` stands in `[section]`; that of the section where the key is not written."""
    wanted = [*section.split("."), key] if section is not None else key.split(".")
    nearest, depth = 1, 0
    for number, path in _written(text):
        if path[: len(wanted)] == wanted:
            return number
        shared = len(os.path.commonprefix([path, wanted]))
        if shared > depth:
            nearest, depth = number, shared
    return nearest


@lru_cache(maxsize=2)
def _written(text: str) -> list[tuple[int, list[str]]]:
    """Line and dotted name of every section and key."""
    found, current = list[tuple[int, list[str]]](), list[str]()
    for number, line in enumerate(text.split("\n"), start=1):
        if header := _HEADER.match(line):
            current = _parts(header.group(1))
            found.append((number, current))
        elif entry := _KEY.match(line):
            found.append((number, current + _parts(entry.group(1))))
    return found


def _parts(name: str) -> list[str]:
    """The parts of a dotted name, without their quotes."""
    return [part.strip().strip("\"'") for part in name.split(".")]
