"""`capfilt recipe …`: recipes listed, shown whole, begun, checked, and their schema for editors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from capfilt.cli.commands import CapfiltTyper
from capfilt.cli.completion import recipe_names
from capfilt.cli.console import clean, command, note, say, say_json
from capfilt.cli.options import AsJson
from capfilt.errors import UsageError

if TYPE_CHECKING:
    from capfilt.recipes import Mistake, Recipe

app = CapfiltTyper(name="recipe", help="List, show, begin and check recipes.")

MAX_CHARS = 2000
MAX_FILE_CHARS = 1_000_000
Named = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE",
        help="A recipe file, or the name of a bundled one.",
        show_default=False,
        autocompletion=recipe_names,
    ),
]


@app.command("list")
def list_(as_json: AsJson = False) -> None:
    """Name the bundled recipes, with what each does."""
    from capfilt.recipes import bundled_recipes, read_recipe

    found = {name: read_recipe(str(path)).description for name, path in bundled_recipes().items()}
    if as_json:
        say_json(found)
        return
    width = max(map(len, found))
    for name, description in sorted(found.items()):
        say(f"{name:<{width}}  {description}")
    note(f"Next: {command('recipe', 'show', 'capfilt')}")


@app.command("show")
def show(
    recipe: Named,
    as_written: Annotated[
        bool, typer.Option("--as-written", help="Print the file as it stands, with its authors' reasons.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Print a recipe with every setting, its sentence, and its default where that is another; it may be saved so."""
    from capfilt.recipes import find_recipe, read_recipe
    from capfilt.recipes.complete import complete_text

    if as_written and as_json:
        raise UsageError("--as-written prints the file, --json what it says. Give one of them.")
    found = read_recipe(recipe)
    if as_json:
        say_json(_plain(found))
    elif as_written:
        for line in find_recipe(recipe).read_text(encoding="utf-8").splitlines():
            say(clean(line, MAX_FILE_CHARS))
    else:
        written = command("recipe", "show", recipe, "--as-written")
        head = f"{recipe}: every setting with its value, and its default where that is another one.\n"
        say(complete_text(found, head=f"{head}As its authors wrote it, with their reasons: {written}").rstrip("\n"))


@app.command("new")
def new(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="File to write, of TOML.", show_default=False)],
    origin: Annotated[
        str,
        typer.Option("--from", metavar="RECIPE", help="Recipe that it begins as.", autocompletion=recipe_names),
    ] = "capfilt",
    no_schema: Annotated[
        bool, typer.Option("--no-schema", help="Write no JSON Schema for editors beside it, and do not name one.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file where it is there already.")] = False,
) -> None:
    """Write a recipe file of your own: complete, valid at once, every setting with its sentence.

    Beside it lies the JSON Schema by which editors (taplo, Even Better TOML) complete and check it.
    """
    from capfilt.data.whole_files import refuse_existing, whole_file
    from capfilt.recipes import read_recipe
    from capfilt.recipes.complete import complete_text
    from capfilt.recipes.schema import SCHEMA_FILE

    if file.suffix != ".toml":
        raise UsageError(f"{file} ends in {file.suffix or 'nothing'}; expected a name that ends in .toml.")
    refuse_existing(file, overwrite=overwrite)
    found = read_recipe(origin)
    look = command("recipe", "check", file.name)
    head = f"Begun as the recipe {origin}. Change what you like; `{look}` looks for mistakes.\n"
    head += f"It is run by `{command('run', file.name, 'RUN')}`."
    schema = "" if no_schema else SCHEMA_FILE
    if schema:
        _write_schema(file.with_name(schema), overwrite)
    with whole_file(file) as target:
        target.write(complete_text(found, head=head, schema=schema))
    say(f"{clean(file)}: a recipe as {clean(origin)}{f'; editors check it by {schema}' if schema else ''}")
    note(f"Next: {command('recipe', 'check', file)}")


@app.command("check")
def check(
    recipes: Annotated[
        list[str],
        typer.Argument(
            metavar="FILE...", help="Recipe files, or names of bundled ones.", show_default=False,
            autocompletion=recipe_names,
        ),
    ],
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """Look for mistakes, all at once, each with its line; of a recipe without any, say what it would do.

    Exit code 2 where there is one.
    """
    from capfilt.recipes import Mistake, examine_recipe, find_recipe

    rows: list[dict[str, Any]] = []
    for recipe in recipes:
        try:
            found, mistakes = examine_recipe(find_recipe(recipe))
        except UsageError as error:
            found, mistakes = None, [Mistake(0, str(error))]
        does = found.line() if found is not None else None
        rows.append({"recipe": recipe, "does": does, "mistakes": mistakes})
        if not as_json:
            _say_checked(recipe, does, mistakes)
    if as_json:
        say_json([row | {"mistakes": [vars(mistake) for mistake in row["mistakes"]]} for row in rows])
    if any(row["mistakes"] for row in rows):
        raise typer.Exit(2)
    if not as_json:
        note(f"Next: {command('run', recipes[0], '--dry-run')}")


@app.command("schema")
def schema() -> None:
    """Print the JSON Schema of recipes. A first line `#:schema FILE` in a recipe names it to editors."""
    from capfilt.recipes.schema import schema_text

    say(schema_text().rstrip("\n"))


def _say_checked(recipe: str, does: str | None, mistakes: list[Mistake]) -> None:
    if does is not None:
        say(f"{clean(recipe)}: no mistakes. It would {clean(does, MAX_CHARS)}.")
    for mistake in mistakes:
        where = f"{clean(recipe)}:{mistake.line}: " if mistake.line else ""
        say(f"{where}{clean(mistake.said, MAX_CHARS)}")


def _write_schema(path: Path, overwrite: bool) -> None:
    """The schema for editors. UsageError where another file has its name."""
    from capfilt.data.whole_files import refuse_existing, whole_file
    from capfilt.recipes.schema import TITLE, schema_text

    try:
        is_ours = json.loads(path.read_text(encoding="utf-8")).get("title") == TITLE
    except (OSError, ValueError, AttributeError):
        is_ours = False
    refuse_existing(path, overwrite=overwrite or is_ours)
    with whole_file(path) as target:
        target.write(schema_text())


def _plain(recipe: Recipe) -> dict[str, Any]:
    """A recipe for JSON: every section with every setting, in its order."""
    from capfilt.recipes.complete import values_of

    return {
        "name": recipe.name, "path": recipe.path, "description": recipe.description, "run_dir": recipe.run_dir,
        "does": recipe.line(), "sections": values_of(recipe),
    }  # fmt: skip
