"""Recipes: one TOML file says what a run does.

A recipe has a `description`, an optional `run_dir` and sections. `[source]` says what is curated and may be
left out (the run then goes on from the shards it has); `[download]`, `[caption]`, `[rank]`, `[filter]` fill the
settings of that name, `[train.NAME]` those of a training (`capfilt/trainings.py` has their names); a stage or a
training without its section is not run (`[download]` may be left out: its defaults hold). Trainings come in the order
of the file, and a later one may start from what an earlier one trained: `init = "@stage1"`. Nothing is inherited or
merged: a recipe is complete by itself.
Every unknown section or key is refused with its line and the nearest valid name.

    recipe     what a recipe is
    reading    a file into a recipe
    complete   a recipe into a file, with every default
    schema     the JSON Schema for editors
"""

from capfilt.recipes.reading import (
    Mistake,
    bundled_recipes,
    examine_recipe,
    find_recipe,
    read_recipe,
)
from capfilt.recipes.recipe import Recipe, SourceSettings, TrainingData, TrainingSection

__all__ = [
    "Mistake",
    "Recipe",
    "SourceSettings",
    "TrainingData",
    "TrainingSection",
    "bundled_recipes",
    "examine_recipe",
    "find_recipe",
    "read_recipe",
]
