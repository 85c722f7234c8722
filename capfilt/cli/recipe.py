"""`capfilt run`: everything that a recipe says, in order."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from capfilt.cli.console import clean, command, note, open_progress, say, say_json
from capfilt.cli.engines import Address, CpusPerWorker, EngineName, GpusPerWorker, NumWorkers, engine_from
from capfilt.cli.options import AsJson, Generation
from capfilt.cli.train import training_line
from capfilt.pipeline import StepResult, run_dir_of, run_recipe
from capfilt.recipes import Recipe, read_recipe


def run(
    recipe: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE", help="A recipe file, or the name of a bundled one: capfilt, blip, blip2, quickstart, …"
        ),
    ],
    run: Annotated[
        Path | None, typer.Argument(metavar="RUN", help="The run directory; unset: the recipe's run_dir.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan and what is already done; change nothing.")
    ] = False,
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
    chosen = read_recipe(recipe)
    path = run_dir_of(chosen, run)
    if dry_run:
        _show_plan(replace(chosen, trainings=()) if curate_only else chosen, recipe, path, generation, as_json)
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


def _show_plan(recipe: Recipe, named: str, path: Path, generation: str | None, as_json: bool) -> None:
    from capfilt.plan import plan_recipe

    plans = plan_recipe(recipe, path, generation)
    if as_json:
        say_json({"recipe": recipe.path, "run": path, "steps": plans})
        return
    say(f"{recipe.path}: {clean(recipe.description)}")
    say(f"run directory: {clean(path)}")
    width = max(len(plan.name) for plan in plans)
    for plan in plans:
        say(f"  {plan.name:<{width}} {plan.state:<18} {clean(plan.what, 500)}")
        if plan.differences:
            say(f"  {'':<{width}} {clean(plan.differences, 500)}")
    if plans[0].differences:
        note(f"Nothing was changed. Shards are never rewritten; in another run: {command('run', named, 'RUN')}")
    elif any(plan.differences for plan in plans):
        beside = command("run", named, path, generation="NAME")
        note(f"Nothing was changed. The run would refuse the other settings; beside them: {beside}")
    else:
        note(f"Nothing was changed. Next: {command('run', named, path, generation=generation)}")


def summary_line(step: StepResult) -> str:
    """One line about a step that has ended."""
    if step.output_dir is not None:
        return training_line(step.name, step.summary, step.output_dir)
    return step.summary.line()
