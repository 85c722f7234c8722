"""Runs one recipe in order: source → shards → captions → clip → itm → manifest → its trainings.

In: a `Recipe` and a run directory. Out: the run, and the summary of each step as it ends. Every step knows
what it has done already, so a recipe that was interrupted is run again, and one that is complete does
nothing. Of several processes that torchrun started, none curates: they train on the manifest that is there.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from capfilt.data.paths import AnyPath, local_path, path_of
from capfilt.errors import UsageError
from capfilt.progress import NullProgress, Progress
from capfilt.recipes import Recipe, SourceSettings, TrainingSection
from capfilt.settings import DownloadSettings, TrainSettings
from capfilt.trainings import TRAININGS

if TYPE_CHECKING:
    from capfilt.data.rundir import RunDir
    from capfilt.engines.base import Engine

WORLD_PORTS = range(20080, 22080)
"""The miniature world's site prefers one of these, by its seed: runs of one world have equal addresses."""


@dataclass(frozen=True)
class StepResult:
    """One step that has ended, with the summary of what it did."""

    name: str
    summary: Any
    output_dir: Path | None = None
    """Where a training saved its model."""


def run_dir_of(recipe: Recipe, given: AnyPath | None) -> AnyPath:
    """The run directory: the one given, the recipe's own, or runs/NAME."""
    return given or path_of(recipe.run_dir or f"runs/{recipe.name}")


def run_recipe(
    recipe: Recipe,
    run_path: AnyPath,
    *,
    generation: str | None = None,
    curate_only: bool = False,
    progress: Progress | None = None,
    engine: Engine | None = None,
) -> Iterator[StepResult]:
    """Do what the recipe says, step by step; a step is done when its result is yielded.

    With `curate_only` the trainings are left out. `engine` downloads (but from the miniature world, whose site is of
    this machine), captions, ranks and filters; unset: this process.

    Raises UsageError when the recipe has no [source] and the run no shards, when a further run that a training names
    is none or has no manifest, and what the steps raise.
    """
    from capfilt.data.rundir import RunDir

    require_place(recipe, run_path)
    progress = progress or NullProgress()
    trainings = () if curate_only else recipe.trainings
    further = {section.name: open_further_runs(section, run_path) for section in trainings}
    if not _curates(recipe):
        run = RunDir.open(run_path, generation)
        _require_shards(recipe, run)
    else:
        opened = RunDir.new(run_path, generation) if recipe.source else nullcontext(RunDir.open(run_path, generation))
        with opened as run, run.lock():
            if recipe.source is not None:
                yield _take_source(recipe.source, download_settings(recipe), run, progress, engine)
            _require_shards(recipe, run)
            if recipe.caption is not None:
                yield StepResult("annotate", _annotate(recipe, run, progress, engine))
    for section in trainings:
        output_dir = training_dir(run.path, section.output, run.generation)
        settings = resolved_settings(recipe, section, run)
        runs = [*([run] if section.data.own_run else []), *further[section.name]]
        yield StepResult(section.name, TRAININGS[section.name].train(runs, settings, output_dir, progress), output_dir)


def _curates(recipe: Recipe) -> bool:
    """Whether this process does what comes before the trainings."""
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    return alone and (recipe.source is not None or recipe.caption is not None)


def _require_shards(recipe: Recipe, run: RunDir) -> None:
    if not run.shard_names():
        raise no_shards(recipe, run.path)


def no_shards(recipe: Recipe, run_path: AnyPath) -> UsageError:
    """The error for a run without shards and a recipe that makes none."""
    return UsageError(
        f"No shards in {run_path}/shards, and {recipe.path} has no [source]. Run `capfilt download URLS {run_path}` or "
        f"`capfilt import TARS {run_path}` first."
    )


def require_place(recipe: Recipe, run_path: AnyPath) -> None:
    """UsageError where the recipe's source and the run's place do not go together."""
    if recipe.source is not None and recipe.source.world_urls:
        world_dir(run_path)


def world_dir(run_path: AnyPath) -> Path:
    """Where a run keeps its miniature world. UsageError where that is no folder."""
    return local_path(run_path, "The miniature world keeps its site beside the run, not on")


def require_manifest(run: RunDir) -> None:
    """UsageError where the run has no manifest, CapfiltError where shards lack in it."""
    from capfilt.data.manifest import iterate_manifest

    next(iterate_manifest([run], ["key"]), None)


def _annotate(recipe: Recipe, run: RunDir, progress: Progress, engine: Engine | None) -> Any:
    from capfilt.curation.annotate import annotate

    return annotate(run, stages_of(recipe), recipe.caption, recipe.rank, recipe.filter, progress, engine=engine)


def stages_of(recipe: Recipe) -> list[str]:
    """The stages that the recipe asks for, in order."""
    stages = {
        "captions": recipe.caption,
        "clip": recipe.rank,
        "itm": recipe.filter,
        "manifest": recipe.filter,
    }
    return [stage for stage, settings in stages.items() if settings is not None]


def training_dir(run_path: AnyPath, name: str, generation: str | None) -> Path:
    """Where a training with that `output` saves its model: RUN/stage1, or RUN/stage1@NAME in a generation.

    Of a run on an object store: runs/BUCKET/RUN of this machine.
    """
    folder = run_path if isinstance(run_path, Path) else Path("runs", *str(run_path).split("/")[2:])
    return folder / (name if generation is None else f"{name}@{generation}")


def resolved_settings(recipe: Recipe, section: TrainingSection, run: RunDir) -> TrainSettings:
    """The settings of a training, each `@NAME` made the folder of that section's result."""
    outputs = {other.name: other.output for other in recipe.trainings}
    folders = {
        setting: str(training_dir(run.path, outputs[name], run.generation)) for setting, name in section.results.items()
    }
    return replace(section.settings, **folders)


def open_further_runs(section: TrainingSection, run_path: AnyPath) -> list[RunDir]:
    """The runs that a training names beside the recipe's own, each in its default generation.

    Raises UsageError, naming it, for one that is no run, has no manifest, or is the recipe's own.
    """
    from capfilt.data.rundir import RunDir

    found = []
    for name in section.data.runs:
        path = path_of(name)
        path = path.expanduser().resolve() if isinstance(path, Path) else path
        if path == (run_path.resolve() if isinstance(run_path, Path) else run_path):
            raise UsageError(f"[train.{section.name}] names {name} in runs, which is the recipe's own. Leave it out.")
        try:
            run = RunDir.open(path)
            require_manifest(run)
        except UsageError as error:
            raise UsageError(
                f"[train.{section.name}] is to be trained on {name}. {error} People's own captions become one by "
                f"`capfilt import TARS {name} --human`; `--curate-only` leaves the trainings out."
            ) from None
        found.append(run)
    return found


def download_settings(recipe: Recipe) -> DownloadSettings:
    """Those of the recipe; a miniature world is served on loopback, and its table has columns of known names."""
    if recipe.source is None or not recipe.source.world_urls:
        return recipe.download
    return replace(recipe.download, allow_private_addresses=True, url_column="url", caption_column="text")


# --- sources ------------------------------------------------------------------------------------------------


def _take_source(
    source: SourceSettings, settings: DownloadSettings, run: Any, progress: Progress, engine: Engine | None
) -> StepResult:
    if source.tars:
        from capfilt.curation.import_shards import import_shards

        return StepResult("import", import_shards(source.tars, run, settings, progress))
    from capfilt.curation.download import download
    from capfilt.curation.parts import plan_shards
    from capfilt.data.retries import planned_shards

    if source.table:
        return StepResult("download", download(source.table, run, settings, progress, engine=engine))
    num_urls = source.world_urls or 0
    done = len(plan_shards(num_urls, settings.samples_per_shard, settings.num_shards)) == len(planned_shards(run))
    with open_world(world_dir(run.path), num_urls, source.world_seed, serve=not done) as table:
        return StepResult("download", download(str(table), run, settings, progress))


@contextmanager
def open_world(run_path: Path, num_urls: int, seed: int, *, serve: bool = True) -> Iterator[Path]:
    """Serve a miniature world while the context lasts; gives its URL table, RUN/world/urls.parquet.

    Without `serve`, a world that the run knows is not served again. RUN/world/site.json
    keeps the port, which is part of the addresses, for the next time; RUN/world/truth.parquet is what only
    the judge may read. Raises UsageError when the run has another world.
    """
    from capfilt.world.site import SiteSettings, WorldSite

    folder = run_path / "world"
    folder.mkdir(parents=True, exist_ok=True)
    table, described = folder / "urls.parquet", folder / "site.json"
    wanted = {"num_urls": num_urls, "seed": seed}
    known = read_site(run_path)
    if known is not None and {name: known[name] for name in wanted} != wanted:
        raise UsageError(f"{run_path} was made from the world {known}; the recipe asks for {wanted}. Name another run.")
    if known is not None and not serve:
        yield table
        return
    site_settings = SiteSettings(num_urls=num_urls, seed=seed)
    with _start_site(lambda port: WorldSite(site_settings, port=port), seed, known) as site:
        if known is None:
            site.write_table(table)
            site.write_truth(folder / "truth.parquet")
            staged = described.with_suffix(".tmp")
            staged.write_text(json.dumps({**wanted, "port": site.port}), encoding="utf-8")
            staged.replace(described)
        yield table


def _start_site(make: Callable[[int], Any], seed: int, known: dict[str, int] | None) -> Any:
    """The site on the port of its addresses; a new one on the port of its seed, or on any that is free."""
    if known is not None:
        return make(known["port"])
    preferred = make(WORLD_PORTS[seed % len(WORLD_PORTS)])
    try:
        preferred.__enter__()
    except UsageError:
        return make(0)
    preferred.__exit__()
    return make(preferred.port)


def read_site(run_path: Path) -> dict[str, int] | None:
    """`num_urls`, `seed` and `port` of the world that the run was made from; None where it was not."""
    path = run_path / "world" / "site.json"
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        return {name: int(known[name]) for name in ("num_urls", "seed", "port")}
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path} cannot be read ({error}). Remove the run and start anew.") from None
