"""`capfilt export` and `capfilt report`: a run's pairs for other tools, and for people."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from capfilt.cli.completion import one_of
from capfilt.cli.console import note, open_progress, say_result
from capfilt.cli.engines import Address, EngineName, NumWorkers, engine_from
from capfilt.cli.options import AsJson, Device, Generation, Run, open_generation, refuse_idle, settings_from
from capfilt.errors import UsageError
from capfilt.settings.export import DEFAULT_CAPTIONS, FOLDER_FORMATS, UNCUT_FORMATS, ExportSettings

if TYPE_CHECKING:
    from capfilt.data.rundir import RunDir

Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there already.")]

FILES = {".csv": "csv", ".jsonl": "jsonl", ".parquet": "parquet"}
"""Ending of a file of pairs → its format."""
_OF_SHARDS, _OF_ENGINES = ("samples_per_shard", "shard_mb"), ("engine", "address", "num_workers")


def export(
    context: typer.Context,
    run: Run,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE|DIR",
            help="Where to write; unset: curated shards in RUN/curated.",
            show_default=False,
        ),
    ] = None,
    format_name: Annotated[
        str | None,
        typer.Option(
            "--format",
            metavar="NAME",
            help="A file of pairs: csv, jsonl or parquet (unset: by its ending). A folder with pictures: webdataset, "
            "datasets, img2dataset, llava or coco.",
            show_default=False,
            autocompletion=one_of(*FILES.values(), *FOLDER_FORMATS),
        ),
    ] = None,
    captions: Annotated[
        str | None,
        typer.Option(
            metavar="best|each",
            help="A folder's sample: an image with its best caption in front, or each kept caption "
            "with its image. Unset: best; coco: each.",
            show_default=False,
            autocompletion=one_of("best", "each"),
        ),
    ] = None,
    samples_per_shard: Annotated[
        int, typer.Option(min=1, help="Most samples of a shard.")
    ] = ExportSettings.samples_per_shard,
    shard_mb: Annotated[int, typer.Option(min=1, help="Most megabytes of a shard.")] = ExportSettings.shard_mb,
    dropped: Annotated[
        bool, typer.Option("--dropped", help="A file: dropped pairs too, each with its reason; else kept ones alone.")
    ] = False,
    overwrite: Overwrite = False,
    engine: EngineName = "local",
    address: Address = None,
    num_workers: NumWorkers = None,
    generation: Generation = None,
    as_json: AsJson = False,
) -> None:
    """Write the kept pairs: as a CSV, JSONL or Parquet file, or with their pictures as shards or a folder.

    With --engine ray the shards of a CSV or JSONL file are read by workers.
    """
    named = _format_of(output, format_name)
    _refuse_what_is_idle(context, named)
    asked = engine_from(locals() | {"cpus_per_worker": None, "gpus_per_worker": None})
    settings = settings_from(ExportSettings, locals() | {"captions": captions or DEFAULT_CAPTIONS.get(named, "best")})
    from capfilt.data.rundir import RunDir

    opened, progress = RunDir.open(run, generation), open_progress()
    if named not in FILES.values():
        from capfilt.export.folders import export_folder, how_to_read

        place = output or _curated(opened)
        found = export_folder(opened, place, named, settings, overwrite=overwrite, progress=progress)
        say_result(found, found.line(), None, as_json=as_json)
        if not as_json:
            note(f"Read by: {how_to_read(found)}")
        return
    from capfilt.export.pairs import export_pairs, export_parquet

    assert output is not None
    if named == "parquet":
        summary = export_parquet(opened, output, dropped=dropped, overwrite=overwrite, progress=progress)
    else:
        summary = export_pairs(
            opened, output, file_format=named, dropped=dropped, overwrite=overwrite, progress=progress, engine=asked
        )
    say_result(summary, summary.line(), None, as_json=as_json)


def _refuse_what_is_idle(context: typer.Context, named: str) -> None:
    """UsageError for options that do nothing with that format."""
    if named in FILES.values():
        refuse_idle(context, ["captions", *_OF_SHARDS], f"with a {named} file, which has a row for every pair")
    else:
        refuse_idle(context, ["dropped"], f"with {named}, which holds kept pairs")
    if named not in ("csv", "jsonl"):
        refuse_idle(context, _OF_ENGINES, f"with {named}, which this process writes alone")
    if named in UNCUT_FORMATS:
        refuse_idle(context, _OF_SHARDS, f"with {named}, which is one JSON file")


def _format_of(output: Path | None, named: str | None) -> str:
    """The format that was named, or that the output's ending tells. UsageError where neither does."""
    ending = output.suffix.lower() if output is not None else ""
    if named is None and output is not None:
        if ending not in FILES:
            tells = {".json": "may be LLaVA's or COCO's", ".tar": "is a tar; webdataset is a folder of them"}
            raise UsageError(
                f"{output} {tells.get(ending, 'tells no format')}; expected one of {', '.join(FILES)}, or a folder and "
                f"--format {', '.join(FOLDER_FORMATS)}."
            )
        return FILES[ending]
    if named is not None and named not in (*FILES.values(), *FOLDER_FORMATS):
        raise UsageError(f"--format is {named}; expected one of {', '.join((*FILES.values(), *FOLDER_FORMATS))}.")
    if named in FOLDER_FORMATS and ending in (*FILES, ".json", ".tar"):
        raise UsageError(f"--format {named} writes a folder, and {output} is named like a file. Name a folder.")
    if named in FILES.values() and output is None:
        raise UsageError(f"--format {named} writes a file. Name it: --output FILE.{named}.")
    return named or "webdataset"


def _curated(run: RunDir) -> Path:
    """Where curated shards lie in a run: curated, or curated@NAME of a generation."""
    if not isinstance(run.path, Path):
        raise UsageError(
            f"{run.path} is an address; an export is written to this machine. Name a folder: --output DIR."
        )
    return run.path / (f"curated@{run.generation}" if run.generation else "curated")


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
