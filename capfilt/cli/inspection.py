"""`capfilt stats` and `capfilt verify`: look at a run and change nothing."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from capfilt.cli.console import clean, command, note, open_progress, say, say_json
from capfilt.cli.engines import Address, CpusPerWorker, EngineName, GpusPerWorker, NumWorkers, engine_from
from capfilt.cli.options import AsJson, Generation, Run
from capfilt.errors import UsageError

if TYPE_CHECKING:
    from capfilt.data.paths import AnyPath
    from capfilt.data.rundir import RunDir

MAX_FINDINGS_SHOWN = 50


def stats(
    run: Run,
    engine: EngineName = "local",
    address: Address = None,
    num_workers: NumWorkers = None,
    cpus_per_worker: CpusPerWorker = None,
    gpus_per_worker: GpusPerWorker = None,
    generation: Generation = None,
    as_json: AsJson = False,
) -> None:
    """Counts, yields, failures by reason, sizes, captions, scores, kept rate against threshold, words."""
    from capfilt.progress import speaks_unicode
    from capfilt.report.stats import compute_stats
    from capfilt.report.stats_view import stats_lines

    engine_asked = engine_from(locals())
    found = compute_stats(open_run(run, generation), engine_asked, open_progress())
    if as_json:
        say_json(found)
        return
    for line in stats_lines(found, plain=not speaks_unicode(sys.stdout)):
        say(line)
    if found.pairs:
        next_command = command("select", run, "--threshold", "T", "--keep", "K", generation=generation)
        note(f"Next: {next_command}   (another choice, from the stored scores)")
    elif found.shards_by_stage["shards"] < found.expected_by_stage["shards"]:
        note(f"The download has not ended; it goes on when it is given again: {command('download', 'TABLE', run)}")
    else:
        note(f"Next: {command('run', 'capfilt', run, generation=generation)}")


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
    report = verify_run(open_run(run, generation), deep, open_progress(), engine=asked)
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


def open_run(run: AnyPath, generation: str | None) -> RunDir:
    """The run; a generation that it has not is refused."""
    from capfilt.data.rundir import RunDir

    opened = RunDir.open(run, generation)
    if generation is not None and generation not in opened.generations():
        known = ", ".join(opened.generations()) or "none"
        raise UsageError(f"{run} has no generation {generation}; those it has: {known}.")
    return opened
