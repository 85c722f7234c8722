"""What the shell offers when Tab is pressed, beside commands, options and files. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable


def recipe_names(incomplete: str) -> list[tuple[str, str]]:
    """Bundled recipes that begin so, each with its description."""
    from capfilt.recipes import bundled_recipes, examine_recipe

    found = []
    for name, path in bundled_recipes().items():
        if name.startswith(incomplete):
            recipe, _ = examine_recipe(path)
            found.append((name, recipe.description if recipe is not None else ""))
    return found


def one_of(names: Iterable[str]) -> Callable[[str], list[str]]:
    """A completion of some names."""

    def complete(incomplete: str) -> list[str]:
        return [name for name in names if name.startswith(incomplete)]

    return complete
