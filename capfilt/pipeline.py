"""Runs one recipe in order: source → shards → captions → clip → itm → manifest → stage 1 → stage 2.

In: a `Recipe` and a run directory. Out: the run, and the summary of each step as it ends. Every step knows
what it has done already, so a recipe that was interrupted is run again, and one that is complete does
nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from capfilt.errors import UsageError
from capfilt.progress import NullProgress, Progress
from capfilt.recipes import Recipe, SourceSettings
from capfilt.settings import DownloadSettings

WORLD_PORTS = range(20080, 22080)
"""The miniature world's site prefers one of these, by its seed: runs of one world have equal addresses."""


@dataclass(frozen=True)
class StepResult:
    """One step that has ended, with the summary of what it did."""

    name: str
    summary: Any


def run_dir_of(recipe: Recipe, given: Path | None) -> Path:
    """The run directory: the one given, the recipe's own, or runs/NAME."""
    return given or Path(recipe.run_dir or f"runs/{recipe.name}")


def run_recipe(
    recipe: Recipe, run_path: Path, *, generation: str | None = None, progress: Progress | None = None
) -> Iterator[StepResult]:
    """Do what the recipe says, step by step; a step is done when its result is yielded.

    Raises UsageError when the recipe has no [source] and the run no shards, and what the steps raise.
    """
    from capfilt.data.rundir import RunDir

    progress = progress or NullProgress()
    opened = RunDir.new(run_path, generation) if recipe.source else nullcontext(RunDir.open(run_path, generation))
    with opened as run, run.lock():
        if recipe.source is not None:
            yield _take_source(recipe.source, download_settings(recipe), run, progress)
        if not run.shard_names():
            raise UsageError(
                f"No shards in {run.path}/shards, and {recipe.path} has no [source]. Run "
                f"`capfilt download URLS {run.path}` or `capfilt import TARS {run.path}` first."
            )
        if recipe.caption is not None:
            yield StepResult("annotate", _annotate(recipe, run, progress))
    yield from _train(recipe, run, progress)


def _annotate(recipe: Recipe, run: Any, progress: Progress) -> Any:
    from capfilt.curate.annotate import annotate

    return annotate(run, stages_of(recipe), recipe.caption, recipe.rank, recipe.filter, progress)


def stages_of(recipe: Recipe) -> list[str]:
    """The stages that the recipe asks for, in order."""
    stages = {
        "captions": recipe.caption,
        "clip": recipe.rank,
        "itm": recipe.filter,
        "manifest": recipe.filter,
    }
    return [stage for stage, settings in stages.items() if settings is not None]


def training_dir(run_path: Path, name: str, generation: str | None) -> Path:
    """Where a recipe's training of that name saves its model: RUN/stage1, or RUN/stage1@NAME in a generation."""
    return run_path / (name if generation is None else f"{name}@{generation}")


def _train(recipe: Recipe, run: Any, progress: Progress) -> Iterator[StepResult]:
    stage1_dir, stage2_dir = (training_dir(run.path, name, run.generation) for name in ("stage1", "stage2"))
    if recipe.stage1 is not None:
        from capfilt.train.stage1 import train_stage1

        yield StepResult("stage1", train_stage1([run], recipe.stage1, stage1_dir, progress))
    if recipe.stage2 is not None:
        from capfilt.train.stage2 import train_stage2

        llm, settings = recipe.stage2.llm, recipe.stage2.settings()
        yield StepResult("stage2", train_stage2([run], stage1_dir, llm, settings, stage2_dir, progress))


def download_settings(recipe: Recipe) -> DownloadSettings:
    """Those of the recipe; a miniature world is served on loopback, and its table has columns of known names."""
    if recipe.source is None or not recipe.source.world_urls:
        return recipe.download
    return replace(recipe.download, allow_private_addresses=True, url_column="url", caption_column="text")


# --- sources ------------------------------------------------------------------------------------------------


def _take_source(source: SourceSettings, settings: DownloadSettings, run: Any, progress: Progress) -> StepResult:
    if source.tars:
        from capfilt.curate.import_shards import import_shards

        return StepResult("import", import_shards(source.tars, run, settings, progress))
    from capfilt.curate.download import download
    from capfilt.curate.parts import plan_shards

    if source.table:
        return StepResult("download", download(source.table, run, settings, progress))
    num_urls = source.world_urls or 0
    done = len(plan_shards(num_urls, settings.samples_per_shard, settings.num_shards)) == len(run.shard_names())
    with open_world(run.path, num_urls, source.world_seed, serve=not done) as table:
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
