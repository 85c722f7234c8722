"""What the shell offers when Tab is pressed, beside commands, options and files. Nothing here imports torch."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import fields
from pathlib import Path

import typer


def recipe_names(incomplete: str) -> list[tuple[str, str]]:
    """Bundled recipes that begin so, each with its description."""
    from capfilt.recipes import bundled_recipes, examine_recipe

    found = []
    for name, path in bundled_recipes().items():
        if name.startswith(incomplete):
            recipe, _ = examine_recipe(path)
            found.append((name, short(recipe.description if recipe is not None else "")))
    return found


def short(text: str) -> str:
    """A text in one line of a shell's list: Typer breaks longer ones, and a shell takes the rest for another answer."""
    return textwrap.shorten(text, 60, placeholder=" …")


def names_of_setting(cls: type, setting: str) -> Callable[[str], list[str]]:
    """A completion of the names that a setting of `cls` may have."""

    def complete(incomplete: str) -> list[str]:
        from capfilt.settings.described import names_of

        return [name for name in names_of(cls, setting) if name.startswith(incomplete)]

    return complete


def assignments(cls: type, unused: Collection[str] = ()) -> Callable[[str], list[str]]:
    """A completion of `--set`: the settings of `cls` but `unused`, each with its equals sign."""

    def complete(incomplete: str) -> list[str]:
        return [f"{f.name}=" for f in fields(cls) if f.name not in unused and f.name.startswith(incomplete)]

    return complete


def generations(ctx: typer.Context, incomplete: str) -> list[str]:
    """Generations of the runs that the line names so far, where they are folders of this machine."""
    # a command whose last option has no value yet has parsed nothing: the words themselves are with its parent
    words = ctx.parent.args if ctx.parent is not None else []
    names: set[str] = set()
    for word in words:
        with suppress(OSError, ValueError):
            names |= {folder.name.partition("@")[2] for folder in Path(word).glob("*@*")}
    return sorted(name for name in names if name.startswith(incomplete))


def one_of(*names: str) -> Callable[[str], list[str]]:
    """A completion of some names."""

    def complete(incomplete: str) -> list[str]:
        return [name for name in names if name.startswith(incomplete)]

    return complete


def reasons(incomplete: str) -> list[tuple[str, str]]:
    """Reasons why a row has no image, each with its sentence."""
    from capfilt.data.reasons import REASON_SENTENCES

    return [(name, short(sentence)) for name, sentence in REASON_SENTENCES.items() if name.startswith(incomplete)]


def all_reasons(incomplete: str) -> list[tuple[str, str]]:
    """Reasons why a pair is dropped, then `reasons`."""
    from capfilt.data.reasons import DROP_REASON_SENTENCES

    dropped = [(name, short(text)) for name, text in DROP_REASON_SENTENCES.items() if name.startswith(incomplete)]
    return dropped + reasons(incomplete)
