"""`capfilt verify`: looks at a run and changes nothing."""

from __future__ import annotations

from typing import Annotated

import typer

from capfilt.cli.console import clean, command, note, open_progress, say, say_json, to_plain
from capfilt.cli.engines import Address, CpusPerWorker, EngineName, GpusPerWorker, NumWorkers, engine_from
from capfilt.cli.options import AsJson, Generation, Run, open_generation

MAX_FINDINGS_SHOWN = 50


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
    report = verify_run(open_generation(run, generation), deep, open_progress(), engine=asked)
    if as_json:
        say_json({**to_plain(report), "remedies": report.remedies()})
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
        if not deep:
            note("The bytes of the tars were not hashed; --deep does that.")
        if report.exit_code == 0:
            note(f"Next: {command('stats', run, generation=generation)}")
    raise typer.Exit(report.exit_code)
