"""`capfilt stats` and `capfilt verify`: look at a run and change nothing."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from capfilt.cli.console import clean, command, draw, note, open_progress, say, say_json
from capfilt.cli.engines import Address, CpusPerWorker, EngineName, GpusPerWorker, NumWorkers, engine_from
from capfilt.cli.options import AsJson, Generation, Run
from capfilt.errors import UsageError

if TYPE_CHECKING:
    from capfilt.data.paths import AnyPath
    from capfilt.data.rundir import RunDir
    from capfilt.report.stats import RunStats

MAX_FINDINGS_SHOWN = 50
ALL = "all"


def stats(
    run: Run,
    section: Annotated[
        list[str],
        typer.Option(
            "--section",
            metavar="NAME",
            help="A section in full, or several: run, shards, download, hosts, pairs, captions, scores, threshold, "
            "words, quarantine, or all of them. Without, the dashboard.",
            show_default=False,
        ),
    ] = [],  # noqa: B006 - Typer copies it
    engine: EngineName = "local",
    address: Address = None,
    num_workers: NumWorkers = None,
    cpus_per_worker: CpusPerWorker = None,
    gpus_per_worker: GpusPerWorker = None,
    generation: Generation = None,
    as_json: AsJson = False,
) -> None:
    """A run on one screen: shards, yields, failures, pictures, captions, scores, what is kept at which threshold."""
    from capfilt.report.stats import compute_stats

    sections, engine_asked = _sections(section), engine_from(locals())
    found = compute_stats(_open(run, generation), engine_asked, open_progress())
    if as_json:
        say_json(found)
        return
    show_stats(found, sections)
    if found.pairs:
        next_command = command("select", run, "--threshold", "T", "--keep", "K", generation=generation)
        note(f"Next: {next_command}   (another choice, from the stored scores)")
    elif found.shards_by_stage["shards"] < found.expected_by_stage["shards"]:
        note(f"The download has not ended; it goes on when it is given again: {command('download', 'TABLE', run)}")
    else:
        note(f"Next: {command('run', 'capfilt', run, generation=generation)}")


def show_stats(found: RunStats, sections: Sequence[str] | None = None) -> None:
    """The dashboard, or sections in full (none: every one)."""
    from capfilt.progress import speaks_unicode
    from capfilt.report.dashboard import dashboard
    from capfilt.report.stats_view import stats_lines

    plain = not speaks_unicode(sys.stdout)
    if sections is None:
        draw(lambda width: dashboard(found, width, plain=plain))
        return
    for line in stats_lines(found, sections, plain=plain):
        say(line)


def _sections(asked: list[str]) -> list[str] | None:
    """None for the dashboard, an empty list for all."""
    from capfilt.report.stats_view import SECTIONS

    unknown = [name for name in asked if name not in (*SECTIONS, ALL)]
    if unknown:
        raise UsageError(f"There is no section {', '.join(unknown)}; expected some of {', '.join(SECTIONS)}, or {ALL}.")
    return None if not asked else [] if ALL in asked else asked


def verify(
    run: Run,
    deep: Annotated[bool, typer.Option("--deep", help="Hash every byte of the tars and every image too.")] = False,
    engine: EngineName = "local",
    address: Address = None,
    num_workers: NumWorkers = None,
    cpus_per_worker: CpusPerWorker = None,
    gpus_per_worker: GpusPerWorker = None,
    generation: Generation = None,
    as_json: AsJson = False,
) -> None:
    """Reconcile everything on disk. Exit code 0: complete; 1: not finished; 5: damaged."""
    from capfilt.data.verify import verify_run

    asked = engine_from(locals())
    report = verify_run(_open(run, generation), deep, open_progress(), engine=asked)
    if as_json:
        say_json(report)
    else:
        for what, found in (("damaged", report.findings), ("unfinished", report.unfinished)):
            for finding in found[:MAX_FINDINGS_SHOWN]:
                where = f"{finding.stage}/{finding.shard}" if finding.shard else finding.stage
                say(f"{what}  {clean(where)}  {clean(finding.problem, 500)}")
            if len(found) > MAX_FINDINGS_SHOWN:
                say(f"{what}  and {len(found) - MAX_FINDINGS_SHOWN:,} more; --json lists all")
        say(f"{clean(run)}: {report.line()}")
        for remedy in report.remedies():
            note(remedy)
        if report.exit_code == 0:
            note(f"Next: {command('stats', run, generation=generation)}")
    raise typer.Exit(report.exit_code)


def _open(run: AnyPath, generation: str | None) -> RunDir:
    """The run; a generation that it has not is refused."""
    from capfilt.data.rundir import RunDir

    opened = RunDir.open(run, generation)
    if generation is not None and generation not in opened.generations():
        known = ", ".join(opened.generations()) or "none"
        raise UsageError(f"{run} has no generation {generation}; those it has: {known}.")
    return opened
