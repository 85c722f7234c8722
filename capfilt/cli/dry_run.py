"""What `capfilt run --dry-run` shows: the plan, what is left, how long it takes and what room it needs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from capfilt.cli.console import clean, command, note, say, say_json
from capfilt.data.paths import AnyPath
from capfilt.errors import CapfiltError
from capfilt.progress import as_bytes, counted, format_rate, format_seconds
from capfilt.recipes import Recipe

if TYPE_CHECKING:
    from capfilt.estimate import Estimate
    from capfilt.plan import StepPlan


def show_plan(
    recipe: Recipe,
    named: str,
    path: AnyPath,
    generation: str | None,
    *,
    as_json: bool,
    num_probed: int,
    price_per_hour: float | None,
) -> None:
    """Print the plan of a recipe, called `named`, for the run at `path`. CapfiltError where the disk has no room."""
    from capfilt.estimate import estimate
    from capfilt.plan import plan_recipe

    plans = plan_recipe(recipe, path, generation)
    is_refused = any(plan.differences for plan in plans)
    found = None if is_refused else estimate(recipe, path, plans, generation, num_probed=num_probed)
    if as_json:
        steps = [{name: value for name, value in asdict(plan).items() if name != "lacking"} for plan in plans]
        told = found and asdict(found) | {
            "hours": found.hours, "cost": _cost(found, price_per_hour), "fits": found.fits,
        }  # fmt: skip
        say_json({"recipe": recipe.path, "run": str(path), "steps": steps, "estimate": told})
    else:
        say(f"{recipe.path}: {clean(recipe.description)}")
        say(f"run directory: {clean(path)}")
        width = max(len(plan.name) for plan in plans)
        for plan in plans:
            say(f"  {plan.name:<{width}} {plan.state:<18} {clean(plan.what, 500)}")
            if plan.differences:
                say(f"  {'':<{width}} {clean(plan.differences, 500)}")
        for name, text in _estimate_lines(found, price_per_hour) if found else ():
            say(f"  {name:<{width}} {text}")
    if found is not None and not found.fits:
        needed, free = as_bytes(found.bytes_needed or 0), as_bytes(found.bytes_free or 0)
        raise CapfiltError(f"{path} needs {needed}; its disk has {free} left. Make room, or name a run elsewhere.")
    if is_refused and num_probed:
        note("Not probed: what is there was made with other settings.")
    if not as_json:
        note(f"Nothing was changed. {_advice(plans, named, path, generation)}")


def _advice(plans: Sequence[StepPlan], named: str, path: AnyPath, generation: str | None) -> str:
    if plans[0].differences:
        return f"Shards are never rewritten; in another run: {command('run', named, 'RUN')}"
    if any(plan.differences for plan in plans):
        beside = command("run", named, path, generation="NAME")
        return f"The run would refuse the other settings; beside them: {beside}"
    return f"Next: {command('run', named, path, generation=generation)}"


def _cost(found: Estimate, price_per_hour: float | None) -> float | None:
    return None if found.hours is None or price_per_hour is None else found.hours * price_per_hour


def _estimate_lines(found: Estimate, price_per_hour: float | None) -> Iterator[tuple[str, str]]:
    """(name, text) of what is there, what is left, how long it takes and what room it needs."""
    free = "an object store" if found.bytes_free is None else f"{as_bytes(found.bytes_free)} free"
    if not found.num_shards:
        yield "disk", f"{free}; what is needed can be told when the first shard is there"
        return
    there = f"{counted(found.num_images, 'image')} in {counted(found.num_shards, 'shard')}"
    yield "there", f"{there}, {as_bytes(found.num_bytes)}"
    left = [f"{counted(found.images_left, 'image')} ({', '.join(found.stages_left)})"] if found.images_left else []
    if found.rows_left:
        left.insert(0, f"{counted(found.rows_left, 'row')} of the table to download")
    yield "left", "; ".join(left) or "nothing"
    if (probe := found.probe) is not None and found.hours is not None:
        rate = f"{format_rate(probe.images_per_second)} images/s, {probe.bytes_per_image:,.0f} bytes an image"
        yield "probe", f"{counted(probe.num_images, 'image')}, {probe.computing}: {rate}"
        cost = _cost(found, price_per_hour)
        priced = "" if cost is None else f", at {price_per_hour:g} an hour {cost:,.2f}"
        time = f"{found.hours:,.1f} hours" if found.hours >= 1 else format_seconds(found.hours * 3600)
        yield "time", f"{time} of one such device{priced}"
    yield "disk", f"{as_bytes(found.bytes_needed or 0)} needed, {free}"
