"""`capfilt caption`, `rank`, `filter` and `select`: from shards to the manifest, stage by stage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from capfilt.cli.completion import names_of_setting, one_of
from capfilt.cli.console import command, note, open_progress, say_result
from capfilt.cli.engines import Address, CpusPerWorker, EngineName, GpusPerWorker, NumWorkers, engine_from
from capfilt.cli.options import (
    AsJson,
    BatchSize,
    Device,
    Dtype,
    Generation,
    Keep,
    Resizer,
    Run,
    Threshold,
    settings_from,
)
from capfilt.data.paths import AnyPath
from capfilt.settings import EMBEDDED, CaptionSettings, FilterSettings, RankSettings

if TYPE_CHECKING:
    from capfilt.engines.base import Engine


def caption(
    run: Run,
    captioner: Annotated[
        str,
        typer.Option(metavar="PATH|ID", help="BLIP captioner: folder, hub id, original .pth, or embedded."),
    ] = CaptionSettings.captioner,
    num_captions: Annotated[
        int | None,
        typer.Option(
            min=1,
            help=f"Captions of each image; unset: {CaptionSettings.num_captions}, or 1 with greedy and beam.",
            show_default=False,
        ),
    ] = None,
    decoding: Annotated[
        str,
        typer.Option(
            help="nucleus, greedy, beam or top-k.", autocompletion=names_of_setting(CaptionSettings, "decoding")
        ),
    ] = CaptionSettings.decoding,
    top_p: Annotated[
        float, typer.Option(help="Nucleus: smallest set of tokens with this probability.")
    ] = CaptionSettings.top_p,
    top_k: Annotated[int, typer.Option(help="Tokens considered at each step; 0: all.")] = CaptionSettings.top_k,
    temperature: Annotated[float, typer.Option(help="Divides the logits.")] = CaptionSettings.temperature,
    repetition_penalty: Annotated[
        float, typer.Option(help="Penalty of tokens already written.")
    ] = CaptionSettings.repetition_penalty,
    num_beams: Annotated[int, typer.Option(help="Beams when decoding is beam.")] = CaptionSettings.num_beams,
    min_length: Annotated[
        int, typer.Option(help="Shortest text in tokens, prompt included.")
    ] = CaptionSettings.min_length,
    max_length: Annotated[
        int, typer.Option(help="Longest text in tokens, prompt included.")
    ] = CaptionSettings.max_length,
    prompt: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Text the captions continue; unset: the model's own.")
    ] = CaptionSettings.prompt,
    seed: Annotated[int, typer.Option(help="Fixes every draw.")] = CaptionSettings.seed,
    resizer: Resizer = CaptionSettings.resizer,
    batch_size: BatchSize = CaptionSettings.batch_size,
    device: Device = CaptionSettings.device,
    dtype: Dtype = CaptionSettings.dtype,
    engine: EngineName = "local",
    address: Address = None,
    num_workers: NumWorkers = None,
    cpus_per_worker: CpusPerWorker = None,
    gpus_per_worker: GpusPerWorker = None,
    generation: Generation = None,
    as_json: AsJson = False,
) -> None:
    """Write synthetic captions for every image of a run."""
    if num_captions is None:
        num_captions = 1 if decoding in ("greedy", "beam") else CaptionSettings.num_captions
    settings = settings_from(CaptionSettings, locals())
    model = ["--clip-model", EMBEDDED] if captioner == EMBEDDED else []
    _annotate(run, generation, as_json, ["rank", run, *model], ["captions"], engine_from(locals()), caption=settings)


def rank(
    run: Run,
    clip_model: Annotated[
        str, typer.Option(metavar="NAME", help="open_clip model, or embedded.")
    ] = RankSettings.clip_model,
    clip_weights: Annotated[
        str | None, typer.Option(metavar="TAG|PATH", help="open_clip tag or a local file; unset: openai.")
    ] = RankSettings.clip_weights,
    keep: Keep = RankSettings.keep,
    include_web: Annotated[
        bool, typer.Option("--include-web", help="Rank the web caption among the synthetic ones.")
    ] = RankSettings.include_web,
    batch_size: BatchSize = RankSettings.batch_size,
    device: Device = RankSettings.device,
    dtype: Dtype = RankSettings.dtype,
    engine: EngineName = "local",
    address: Address = None,
    num_workers: NumWorkers = None,
    cpus_per_worker: CpusPerWorker = None,
    gpus_per_worker: GpusPerWorker = None,
    generation: Generation = None,
    as_json: AsJson = False,
) -> None:
    """Score every caption by CLIP and rank the captions of each image."""
    settings = settings_from(RankSettings, locals())
    model = EMBEDDED if clip_model == EMBEDDED else "PATH"
    _annotate(
        run,
        generation,
        as_json,
        ["filter", run, "--filter-model", model],
        ["clip"],
        engine_from(locals()),
        rank=settings,
    )


def filter_(
    run: Run,
    filter_model: Annotated[
        str,
        typer.Option(metavar="PATH|ID", help="BLIP ITM model: folder, hub id, original .pth, or embedded."),
    ] = FilterSettings.filter_model,
    threshold: Threshold = FilterSettings.threshold,
    first_token: Annotated[
        str,
        typer.Option(
            help="First text token: enc (as trained) or cls (as transformers feeds it).",
            autocompletion=names_of_setting(FilterSettings, "first_token"),
        ),
    ] = FilterSettings.first_token,
    resizer: Resizer = FilterSettings.resizer,
    batch_size: BatchSize = FilterSettings.batch_size,
    device: Device = FilterSettings.device,
    dtype: Dtype = FilterSettings.dtype,
    engine: EngineName = "local",
    address: Address = None,
    num_workers: NumWorkers = None,
    cpus_per_worker: CpusPerWorker = None,
    gpus_per_worker: GpusPerWorker = None,
    generation: Generation = None,
    as_json: AsJson = False,
) -> None:
    """Score the web caption and the kept synthetic captions by ITM, and write the manifest."""
    settings = settings_from(FilterSettings, locals())
    _annotate(run, generation, as_json, ["stats", run], ["itm", "manifest"], engine_from(locals()), filter=settings)


def select(
    run: Run,
    threshold: Annotated[
        float | None, typer.Option(help="Pairs with a lower ITM score are dropped; unset: as it is now.")
    ] = None,
    keep: Annotated[int | None, typer.Option(min=1, help="Ranked captions kept for each image; unset: as now.")] = None,
    sources: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="web, synthetic or web,synthetic: captions taken at all; unset: as now.",
            autocompletion=one_of("web", "synthetic", "web,synthetic"),
        ),
    ] = None,
    engine: EngineName = "local",
    address: Address = None,
    num_workers: NumWorkers = None,
    cpus_per_worker: CpusPerWorker = None,
    gpus_per_worker: GpusPerWorker = None,
    generation: Generation = None,
    as_json: AsJson = False,
) -> None:
    """Choose anew from the stored scores: another threshold, top K or source. No model is run."""
    from capfilt.curation.selection import reselect
    from capfilt.data.rundir import RunDir

    chosen = engine_from(locals())
    opened = RunDir.open(run, generation)
    taken = None if sources is None else [name.strip() for name in sources.split(",")]
    summary = reselect(opened, threshold, keep, open_progress(), sources=taken, engine=chosen)
    stats = command("stats", run, generation=generation)
    say_result(summary, summary.line(), stats, as_json=as_json)
    if summary.num_pairs and not summary.num_kept:
        note(f"No pair is left to train on. `{stats}` shows the scores.")


def _annotate(
    run: AnyPath,
    generation: str | None,
    as_json: bool,
    following: Sequence[object],
    stages: list[str],
    engine: Engine | None,
    **settings: Any,
) -> None:
    """Run the shard loop for some stages, and say what it did."""
    from capfilt.data.rundir import RunDir

    opened = RunDir.open(run, generation)  # a wrong path is told at once: what follows loads torch
    from capfilt.curation.annotate import annotate

    chosen = {"caption": None, "rank": None, "filter": None, **settings}
    summary = annotate(opened, stages, **chosen, progress=open_progress(), engine=engine)
    say_result(summary, summary.line(), command(*following, generation=generation), as_json=as_json)
