"""What the shell offers when Tab is pressed, beside commands, options and files. Nothing here imports torch."""

from __future__ import annotations

import textwrap
from collections.abc import Callable


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


def one_of(*names: str) -> Callable[[str], list[str]]:
    """A completion of some names."""

    def complete(incomplete: str) -> list[str]:
        return [name for name in names if name.startswith(incomplete)]

    return complete


def reasons(incomplete: str) -> list[tuple[str, str]]:
    """Reasons why a row has no image, each with its sentence."""
    from capfilt.data.reasons import REASON_SENTENCES

    return [(name, short(sentence)) for name, sentence in REASON_SENTENCES.items() if name.startswith(incomplete)]
