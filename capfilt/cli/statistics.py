"""`capfilt stats`: a run, or a folder of tars, on one screen; once, again and again, or beside another run."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from capfilt.cli.completion import generations, one_of
from capfilt.cli.console import clean, command, draw, note, open_progress, redraw, say, say_json
from capfilt.cli.engines import Address, CpusPerWorker, EngineName, GpusPerWorker, NumWorkers, engine_from
from capfilt.cli.options import AsJson, Generation, Run, open_generation
from capfilt.data.paths import AnyPath, path_of
from capfilt.errors import UsageError
from capfilt.settings.values import nearest_or_all

if TYPE_CHECKING:
    from rich.console import RenderableType

    from capfilt.engines.base import Engine
    from capfilt.report.stats import RunStats

ALL = "all"
SECTION_NAMES = (
    "run", "shards", "download", "hosts", "pairs", "captions", "scores", "threshold", "words", "quarantine", "time"
)  # fmt: skip
_WATCH_SHARE = 4
"""Watching waits at least that many times as long as it took to look."""


def stats(
    run: Run,
    section: Annotated[
        list[str],
        typer.Option(
            "--section",
            metavar="NAME",
            help=f"A section in full, or several: {', '.join(SECTION_NAMES)}, or {ALL} of them. Without, the "
            "dashboard.",
            show_default=False,
            autocompletion=one_of(*SECTION_NAMES, ALL),
        ),
    ] = [],  # noqa: B006 - Typer copies it
    compare: Annotated[
        AnyPath | None,
        typer.Option(
            metavar="RUN",
            help="What changed to this other run: yields, distributions, kept pairs.",
            show_default=False,
            parser=path_of,
        ),
    ] = None,
    compare_generation: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="A generation of the other run; alone, of this one.",
            show_default=False,
            autocompletion=generations,
        ),
    ] = None,
    svg: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The dashboard as a picture too.", show_default=False),
    ] = None,
    watch: Annotated[
        float | None,
        typer.Option(metavar="SECONDS", min=0.1, help="Look again so often, until the run is complete or Ctrl-C."),
    ] = None,
    engine: EngineName = "local",
    address: Address = None,
    num_workers: NumWorkers = None,
    cpus_per_worker: CpusPerWorker = None,
    gpus_per_worker: GpusPerWorker = None,
    generation: Generation = None,
    as_json: AsJson = False,
) -> None:
    """A run, or a folder of tars, on one screen: shards, yields, failures, pictures, captions, scores, what is kept."""
    sections, asked = _sections(section), engine_from(locals())
    is_compared = compare is not None or compare_generation is not None
    ways = sum((watch is not None, is_compared, sections is not None))
    if ways > 1 or (as_json and (watch is not None or sections is not None)):
        raise UsageError("--section, --compare, --watch and --json were given together; expected one of them.")
    if svg is not None:
        if is_compared:
            raise UsageError("--svg is a picture of one run; it was given with --compare. Leave one of them out.")
        from capfilt.data.whole_files import refuse_existing

        if svg.exists() and svg.suffix.lower() != ".svg":
            raise UsageError(f"--svg {svg} is there already and named like no picture. Name a file that ends in .svg.")
        refuse_existing(svg, overwrite=True)
    if is_compared:
        _compare(run, generation, compare or run, compare_generation, asked, as_json=as_json)
        return
    if watch is not None:
        found = _watch(run, generation, asked, watch)
    else:
        found = _look(run, generation, asked)
    if svg is not None:
        _write_picture(found, svg)
    if as_json:
        say_json(found)
        return
    if watch is None:
        show_stats(found, sections)
    _advise(found, run, generation)


def show_stats(found: RunStats, sections: Sequence[str] | None = None) -> None:
    """The dashboard, or sections in full (none: every one)."""
    from capfilt.report.stats_view import stats_lines

    if sections is None:
        draw(lambda width: _dashboard(found, width))
        return
    for line in stats_lines(found, sections, plain=_is_plain()):
        say(line)


def _look(run: AnyPath, generation: str | None, engine: Engine | None, *, quietly: bool = False) -> RunStats:
    from capfilt.data.rundir import is_run
    from capfilt.progress import NullProgress
    from capfilt.report.stats import compute_stats
    from capfilt.tar_stats import compute_tar_stats, is_folder_of_tars

    progress = NullProgress() if quietly else open_progress()
    if generation is None and isinstance(run, Path) and not is_run(run) and is_folder_of_tars(run):
        return compute_tar_stats(run, engine, progress)
    return compute_stats(open_generation(run, generation), engine, progress)


def _watch(run: AnyPath, generation: str | None, engine: Engine | None, seconds: float) -> RunStats:
    """Draw until all stages are complete."""
    if not sys.stdout.isatty():
        raise UsageError("--watch draws on a terminal, and this is none. Call `capfilt stats RUN --json` in a loop.")
    with redraw() as show:
        while True:
            started = time.monotonic()
            found = _look(run, generation, engine, quietly=True) if _has_shards(run, generation) else None
            if found is None:
                show(lambda _: f"No shards in {clean(run)} yet")
                time.sleep(seconds)
                continue
            show(lambda width, found=found: _dashboard(found, width))
            if found.shards_by_stage == found.expected_by_stage:
                return found
            time.sleep(max(seconds, _WATCH_SHARE * (time.monotonic() - started)))


def _has_shards(run: AnyPath, generation: str | None) -> bool:
    from capfilt.data.rundir import is_run

    return not is_run(run) or bool(open_generation(run, generation).shard_names())


def _compare(
    run: AnyPath,
    generation: str | None,
    other: AnyPath,
    other_generation: str | None,
    engine: Engine | None,
    *,
    as_json: bool,
) -> None:
    from capfilt.data.rundir import is_run
    from capfilt.report.compare import compare_runs, comparison_lines
    from capfilt.tar_stats import is_folder_of_tars

    for place in (run, other):
        if isinstance(place, Path) and not is_run(place) and is_folder_of_tars(place):
            made = command("import", place / "*.tar", "RUN")
            raise UsageError(f"{place} is a folder of tars; expected a run. `{made}` makes one of it.")
    runs = open_generation(run, generation), open_generation(other, other_generation)
    found = compare_runs(*runs, engine, open_progress())
    if as_json:
        say_json(found)
        return
    for line in comparison_lines(found, plain=_is_plain()):
        say(line)


def _write_picture(found: RunStats, file: Path) -> None:
    from capfilt.data.whole_files import whole_file
    from capfilt.report.dashboard import dashboard_svg

    with whole_file(file) as opened:
        opened.write(dashboard_svg(found))


def _advise(found: RunStats, run: AnyPath, generation: str | None) -> None:
    if found.has_manifest and "itm" not in found.shards_by_stage:
        note(f"Next: {command('train', 'captioner', run, '--init', 'MODEL', '--output', 'DIR', generation=generation)}")
    elif found.has_manifest:
        next_command = command("select", run, "--threshold", "T", "--keep", "K", generation=generation)
        note(f"Next: {next_command}   (another choice, from the stored scores)")
    elif found.shards_by_stage["shards"] < found.expected_by_stage["shards"]:
        note(f"The download has not ended; it goes on when it is given again: {command('download', 'TABLE', run)}")
    elif len(found.shards_by_stage) == 1:
        note(f"Next: {command('import', run / '*.tar', 'RUN')}")
    else:
        note(f"Next: {command('run', 'capfilt', run, generation=generation)}")


def _dashboard(found: RunStats, width: int) -> RenderableType:
    from capfilt.report.dashboard import dashboard

    return dashboard(found, width, plain=_is_plain())


def _is_plain() -> bool:
    from capfilt.progress import speaks_unicode

    return not speaks_unicode(sys.stdout)


def _sections(asked: list[str]) -> list[str] | None:
    """None for the dashboard, an empty list for all."""
    unknown = [name for name in asked if name not in (*SECTION_NAMES, ALL)]
    if unknown:
        raise UsageError(f"There is no section {unknown[0]}.{nearest_or_all(unknown[0], (*SECTION_NAMES, ALL))}")
    return None if not asked else [] if ALL in asked else asked
