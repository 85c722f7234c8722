"""`capfilt run`: everything that a recipe says, in order."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import typer

from capfilt.cli.completion import recipe_names
from capfilt.cli.console import command, note, open_progress, say, say_json
from capfilt.cli.dry_run import show_plan
from capfilt.cli.engines import Address, CpusPerWorker, EngineName, GpusPerWorker, NumWorkers, engine_from
from capfilt.cli.options import AsJson, Generation
from capfilt.cli.train import training_line
from capfilt.data.paths import AnyPath, path_of
from capfilt.errors import UsageError
from capfilt.pipeline import StepResult, run_dir_of, run_recipe
from capfilt.recipes import read_recipe


def run(
    recipe: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE",
            help="A recipe file, or the name of a bundled one: capfilt, blip, blip2, quickstart, …",
            autocompletion=recipe_names,
        ),
    ],
    run: Annotated[
        AnyPath | None,
        typer.Argument(metavar="RUN", help="The run; unset: the recipe's run_dir.", parser=path_of),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan and what is already done; change nothing.")
    ] = False,
    probe: Annotated[
        int | None,
        typer.Option(
            "--probe",
            min=1,
            metavar="N",
            help="With --dry-run: time N images, after N to warm up, in a temporary directory; tell how long all take.",
        ),
    ] = None,
    price_per_hour: Annotated[
        float | None,
        typer.Option("--price-per-hour", min=0, help="With --probe: what an hour of the device costs."),
    ] = None,
    curate_only: Annotated[
        bool,
        typer.Option("--curate-only", help="Leave the trainings out: `torchrun … -m capfilt run` can do them then."),
    ] = False,
    engine: EngineName = "local",
    address: Address = None,
    num_workers: NumWorkers = None,
    cpus_per_worker: CpusPerWorker = None,
    gpus_per_worker: GpusPerWorker = None,
    generation: Generation = None,
    as_json: AsJson = False,
) -> None:
    """Run a recipe: download or import, caption, rank, filter, train. What is done is not done again.

    Started by torchrun, it does the trainings alone, on the manifest that is there.
    """
    asked = engine_from(locals())
    if (probe and not dry_run) or (price_per_hour is not None and not probe):
        raise UsageError("--probe belongs to --dry-run, and --price-per-hour to --probe. Add it, or leave it out.")
    chosen = read_recipe(recipe)
    path = run_dir_of(chosen, run)
    if dry_run:
        chosen = replace(chosen, trainings=()) if curate_only else chosen
        show_plan(
            chosen, recipe, path, generation, as_json=as_json, num_probed=probe or 0, price_per_hour=price_per_hour
        )
        return
    progress = open_progress()
    results = {}
    steps = run_recipe(chosen, path, generation=generation, curate_only=curate_only, progress=progress, engine=asked)
    for step in steps:
        results[step.name] = step.summary
        if not as_json:
            say(summary_line(step))
    if as_json:
        say_json(results)
    else:
        note(f"Next: {command('stats', path, generation=generation)}")


def summary_line(step: StepResult) -> str:
    """One line about a step that has ended."""
    if step.output_dir is not None:
        return training_line(step.name, step.summary, step.output_dir)
    return step.summary.line()
