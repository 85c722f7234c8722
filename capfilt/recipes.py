"""Recipes: one TOML file says what a run does. In: a path or the name of a bundled recipe. Out: a `Recipe`.

A recipe has a `description`, an optional `run_dir` and sections. `[source]` says what is curated and may be
left out (the run then goes on from the shards it has); `[download]`, `[caption]`, `[rank]`, `[filter]`,
`[train.stage1]` and `[train.stage2]` fill the settings of that name; a stage without its section is not run
(`[download]` may be left out: its defaults hold). Nothing is inherited or merged: a recipe is complete by
itself.
Every unknown section or key is refused with its line and the nearest valid name.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, TypeVar, get_type_hints

from capfilt.errors import UsageError
from capfilt.settings import (
    CaptionSettings,
    DownloadSettings,
    FilterSettings,
    RankSettings,
    Stage1Settings,
    Stage2Settings,
)
from capfilt.settings.values import did_you_mean, typed

Settings = TypeVar("Settings")
MAX_RECIPE_BYTES = 1_000_000


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
class Stage2Section(Stage2Settings):
    """Stage 2 and the language model that it connects to."""

    llm: str = ""
    """Folder or hub id of an OPT or T5, `embedded-opt` or `embedded-t5`."""

    def settings(self) -> Stage2Settings:
        """The settings alone."""
        return Stage2Settings(**{f.name: getattr(self, f.name) for f in fields(Stage2Settings)})


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One recipe, read and checked. A stage that is None is not run."""

    name: str
    path: Path
    description: str = ""
    run_dir: str = ""
    source: SourceSettings | None = None
    download: DownloadSettings = field(default_factory=DownloadSettings)
    caption: CaptionSettings | None = None
    rank: RankSettings | None = None
    filter: FilterSettings | None = None
    stage1: Stage1Settings | None = None
    stage2: Stage2Section | None = None

    sections: ClassVar[dict[str, type]] = {
        "source": SourceSettings,
        "download": DownloadSettings,
        "caption": CaptionSettings,
        "rank": RankSettings,
        "filter": FilterSettings,
        "train.stage1": Stage1Settings,
        "train.stage2": Stage2Section,
    }
    """Name of a section → what it fills; the part behind the dot is the field."""

    def __post_init__(self) -> None:
        if self.stage2 is not None and self.stage1 is None:
            raise UsageError(f"{self.path} has [train.stage2] without [train.stage1], which it starts from.")
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
    for key, value in _flat(document):
        where = f"{path}:{line_of(text, None, key)}"
        if key in Recipe.sections:
            if not isinstance(value, dict):
                raise UsageError(f"{where}: {key} is {value!r}; expected a section [{key}].")
            values[key.rpartition(".")[2]] = _section_of(Recipe.sections[key], key, value, path, text)
        elif key not in texts:
            known = [*texts, *Recipe.sections]
            nearest = did_you_mean(key, known)
            raise UsageError(f"{where}: unknown {_kind(value)} {key}.{nearest} Known: {', '.join(known)}.")
        elif not isinstance(value, str):
            raise UsageError(f"{where}: {key} is {value!r}; expected a text in quotes.")
        else:
            values[key] = value
    return Recipe(**values)


def _flat(document: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The entries of the document, those of [train] as train.NAME."""
    for key, value in document.items():
        if key == "train" and isinstance(value, dict):
            yield from ((f"train.{name}", item) for name, item in value.items())
        else:
            yield key, value


def _kind(value: object) -> str:
    return "section" if isinstance(value, dict) else "key"


def _section_of(cls: type[Settings], section: str, values: Mapping[str, Any], path: Path, text: str) -> Settings:
    hints = get_type_hints(cls)
    names = [f.name for f in fields(cls)]  # type: ignore[arg-type]
    given: dict[str, Any] = {}
    for key, value in values.items():
        where = f"{path}:{line_of(text, section, key)}: [{section}]"
        if key not in names:
            raise UsageError(f"{where} has no setting {key}.{did_you_mean(key, names)} Known: {', '.join(names)}.")
        try:
            given[key] = typed(value, hints[key])
        except TypeError as error:
            raise UsageError(f"{where} {key} is {value!r}; expected {error}.") from None
    try:
        return cls(**given)
    except UsageError as error:
        key = str(error).split(" ", 1)[0]
        raise UsageError(f"{path}:{line_of(text, section, key)}: [{section}] {error}") from None


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
