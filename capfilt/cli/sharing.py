"""`capfilt export` and `capfilt report`: a run's pairs for other tools, and for people."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from capfilt.cli.console import open_progress, say_result
from capfilt.cli.engines import Address, EngineName, NumWorkers, engine_from
from capfilt.cli.options import AsJson, Device, Generation, Run, open_generation

Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the file where it is there already.")]


def export(
    run: Run,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="File to write: .csv or .jsonl.", show_default=False)
    ],
    dropped: Annotated[
        bool, typer.Option("--dropped", help="Dropped pairs too, each with its reason; without it, kept ones alone.")
    ] = False,
    overwrite: Overwrite = False,
    engine: EngineName = "local",
    address: Address = None,
    num_workers: NumWorkers = None,
    generation: Generation = None,
    as_json: AsJson = False,
) -> None:
    """Write the pairs of the manifest to a CSV or JSONL file."""
    asked = engine_from(locals() | {"cpus_per_worker": None, "gpus_per_worker": None})
    from capfilt.curation.export import export_pairs
    from capfilt.data.rundir import RunDir

    opened, progress = RunDir.open(run, generation), open_progress()
    summary = export_pairs(opened, output, dropped=dropped, overwrite=overwrite, progress=progress, engine=asked)
    say_result(summary, summary.line(), None, as_json=as_json)


def report(
    run: Run,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="File to write, of HTML.", show_default=False)
    ],
    num_pairs: Annotated[
        int, typer.Option("--pairs", min=0, help="Kept and dropped pairs, so many each, nearest the threshold.")
    ] = 24,
    explain: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Draw where this model looks (Grad-CAM): a BLIP filter or captioner, as for `capfilt explain`.",
            show_default=False,
        ),
    ] = None,
    num_explained: Annotated[int, typer.Option("--explained", min=1, help="Images that are explained.")] = 6,
    device: Device = "auto",
    overwrite: Overwrite = False,
    generation: Generation = None,
    as_json: AsJson = False,
) -> None:
    """Write one HTML page: the statistics as charts, and pictures with their captions, kept beside dropped."""
    from capfilt.report.page import write_report

    drawer = None
    if explain is not None:
        from capfilt.explain import load_explainable, overlay_drawer

        drawer = overlay_drawer(load_explainable(explain, device=device))
    summary = write_report(
        open_generation(run, generation), output, num_pairs=num_pairs, overwrite=overwrite, progress=open_progress(),
        explain=drawer, num_explained=num_explained,
    )  # fmt: skip
    say_result(summary, summary.line(), None, as_json=as_json)
