"""A recipe written out: every setting with its value, its default where that differs, and its sentence as a comment."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import Any

from capfilt.data.texts import clean_for_terminal
from capfilt.recipes.recipe import TRAIN, Recipe, SourceSettings, settings_of
from capfilt.recipes.schema import section_sentence, settings_in

WIDTH = 110
_EXAMPLES = {"table": '"urls.parquet"', "tars": '["shards/{00000..00099}.tar"]', "world_urls": "300"}
"""What a [source] may say, where a recipe has none."""


def complete_text(recipe: Recipe, *, head: str = "", schema: str = "") -> str:
    """A TOML file that reads as the same recipe.

    Args:
        head: what the file begins with, as a comment.
        schema: file of the JSON Schema that editors check it with.
    """
    lines = [f"#:schema {schema}"] if schema else []
    lines += [*_comment(head)] if head else []
    for key, sentence in Recipe.texts.items():
        lines += [*_comment(sentence), f"{key} = {toml_value(getattr(recipe, key))}"]
    sections = values_of(recipe)
    for name in dict.fromkeys((*(name for name in Recipe.sections if not name.startswith(TRAIN)), *sections)):
        lines += ["", *(_section(name, sections[name]) if name in sections else _left_out(name))]
    return "\n".join(lines) + "\n"


def values_of(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """The sections that a recipe has, in their order, with the value of every setting they may have."""
    stages = [name for name in Recipe.sections if not name.startswith(TRAIN)]
    parts = {name: (getattr(recipe, name),) for name in stages if getattr(recipe, name) is not None}
    parts |= {f"{TRAIN}{training.name}": (training.settings, training.data) for training in recipe.trainings}
    return {
        name: {
            setting: next(getattr(p, setting) for p in found if hasattr(p, setting)) for setting in settings_of(name)
        }
        for name, found in parts.items()
    }


def toml_value(value: Any) -> str:
    """A value as TOML has it; what a terminal or an editor acts upon is escaped."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f'"{"".join(map(_escaped, value))}"'
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(toml_value, value))}]"
    return repr(value)


def _escaped(char: str) -> str:
    if char in '"\\':
        return f"\\{char}"
    if char.isprintable():
        return char
    return f"\\u{ord(char):04X}" if ord(char) < 1 << 16 else f"\\U{ord(char):08X}"


def _comment(text: str) -> Iterator[str]:
    for line in text.split("\n"):
        clean = clean_for_terminal(line, 10_000)
        yield from textwrap.wrap(clean, WIDTH, initial_indent="# ", subsequent_indent="# ", break_on_hyphens=False)


def _section(name: str, values: dict[str, Any]) -> Iterator[str]:
    """A section with all its settings."""
    yield from _comment(section_sentence(name))
    yield f"[{name}]"
    for setting in settings_in(name):
        value = values[setting.name]
        is_alternative = name == "source" and setting.name in SourceSettings.alternatives
        yield from _comment(setting.sentence)
        if value is None or (is_alternative and not value):
            example = _EXAMPLES.get(setting.name, "…")
            yield f"# {setting.name} = {example}  # not set"
        elif value == setting.default or is_alternative:
            yield f"{setting.name} = {toml_value(value)}"
        else:
            default = "not set" if setting.default is None else toml_value(setting.default)
            yield f"{setting.name} = {toml_value(value)}  # default: {default}"


def _left_out(name: str) -> Iterator[str]:
    """What is said of a section that a recipe does not have."""
    if name != "source":
        yield f"# [{name}] is left out: this is not done."
        return
    yield from _comment("[source] is left out: the run goes on from the shards that it has. It may name one of these:")
    yield "# [source]"
    for setting in settings_in(name):
        if setting.name in SourceSettings.alternatives:
            yield from _comment(setting.sentence)
            yield f"# {setting.name} = {_EXAMPLES[setting.name]}"
