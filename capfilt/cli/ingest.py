"""`capfilt download`, `retry` and `import`: images and web captions into the shards of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from capfilt.cli.completion import reasons
from capfilt.cli.console import command, note, open_progress, say_result
from capfilt.cli.engines import Address, CpusPerWorker, EngineName, NumWorkers, engine_from
from capfilt.cli.options import AsJson, Run, settings_from
from capfilt.progress import counted
from capfilt.settings import DownloadSettings

if TYPE_CHECKING:
    from capfilt.curation.download import DownloadSummary
    from capfilt.curation.import_shards import ImportSummary
    from capfilt.data.rundir import RunDir

NumProcesses = Annotated[int, typer.Option(min=1, help="Shards at the same time.")]

NumThreads = Annotated[int, typer.Option(min=1, help="Connections at the same time in one shard.")]

ConnectionsPerHost = Annotated[int, typer.Option(min=1, help="Connections at the same time to one host, in one shard.")]

RobotsTxt = Annotated[
    bool, typer.Option("--robots-txt", help="Ask every site for its robots.txt, and for nothing that it forbids.")
]

Timeout = Annotated[float, typer.Option("--timeout", help="Wall clock for one address, redirects included (seconds).")]

Retries = Annotated[int, typer.Option(min=0, help="Further tries where the failure may pass.")]

PrivateAddresses = Annotated[
    bool,
    typer.Option("--allow-private-addresses", help="Open loopback and private networks, and any port."),
]


def download(
    table: Annotated[
        str,
        typer.Argument(
            metavar="URLS",
            help="URL + text table: Parquet, CSV, TSV, JSONL or TXT; local, s3://, gs:// or hf://.",
        ),
    ],
    run: Run,
    url_column: Annotated[str, typer.Option(help="Column with the address.")] = DownloadSettings.url_column,
    caption_column: Annotated[str, typer.Option(help="Column with the web caption.")] = DownloadSettings.caption_column,
    samples_per_shard: Annotated[
        int, typer.Option(min=1, help="Rows of the table in one shard.")
    ] = DownloadSettings.samples_per_shard,
    num_shards: Annotated[
        int | None, typer.Option(min=1, help="Number of shards, instead of --samples-per-shard.")
    ] = None,
    image_size_px: Annotated[
        int, typer.Option("--image-size", help="Shorter edges above this are scaled down to it (pixels).")
    ] = DownloadSettings.image_size_px,
    num_processes: NumProcesses = DownloadSettings.num_processes,
    num_threads: NumThreads = DownloadSettings.num_threads,
    connections_per_host: ConnectionsPerHost = DownloadSettings.connections_per_host,
    robots_txt: RobotsTxt = False,
    timeout_seconds: Timeout = DownloadSettings.timeout_seconds,
    retries: Retries = DownloadSettings.retries,
    allow_private_addresses: PrivateAddresses = False,
    engine: EngineName = "local",
    address: Address = None,
    num_workers: NumWorkers = None,
    cpus_per_worker: CpusPerWorker = None,
    as_json: AsJson = False,
) -> None:
    """Download a URL table into WebDataset shards; every failure is kept with its reason.

    With --engine ray each worker downloads as many shards at a time as --num-processes says.
    """
    asked = engine_from(locals() | {"gpus_per_worker": None})
    settings = settings_from(DownloadSettings, locals())
    from capfilt.curation.download import download as download_table
    from capfilt.data.rundir import RunDir

    with RunDir.new(run) as opened:
        summary = download_table(table, opened, settings, open_progress(), engine=asked)
    _end(summary, opened, as_json)


def retry(
    run: Run,
    reasons: Annotated[
        list[str] | None,
        typer.Option(
            "--reason",
            metavar="REASON",
            help="Reason whose rows are tried, as in `capfilt stats`; repeatable. Unset: "
            "those that may pass (time-outs, broken connections, servers that are busy or down).",
            show_default=False,
            autocompletion=reasons,
        ),
    ] = None,
    num_processes: NumProcesses = DownloadSettings.num_processes,
    num_threads: NumThreads = DownloadSettings.num_threads,
    connections_per_host: ConnectionsPerHost = DownloadSettings.connections_per_host,
    timeout_seconds: Timeout = DownloadSettings.timeout_seconds,
    retries: Retries = DownloadSettings.retries,
    allow_private_addresses: PrivateAddresses = False,
    as_json: AsJson = False,
) -> None:
    """Try failed addresses of a finished download again, and only those, into the same run."""
    from capfilt.data.rundir import RunDir

    opened = RunDir.open(run)
    from capfilt.curation.retry import retry as try_again

    summary = try_again(opened, reasons or [], settings_from(DownloadSettings, locals()), open_progress())
    following = command("run", "RECIPE", run) if summary.num_succeeded else None
    say_result(summary, summary.line(), following, as_json=as_json)


def import_(
    tars: Annotated[
        list[str],
        typer.Argument(metavar="TARS...", help="Tars; braces ({00000..00099}) and globs allowed.", show_default=False),
    ],
    run: Run,
    human: Annotated[
        bool,
        typer.Option("--human", help="People wrote the captions: all of an image are kept, ready to train on."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Take WebDataset tars that you have, as img2dataset or webdataset wrote them, into a run."""
    from capfilt.curation.import_shards import import_shards
    from capfilt.data.rundir import RunDir

    with RunDir.new(run) as opened:
        summary = import_shards(tars, opened, DownloadSettings(), open_progress())
    if not human:
        _end(summary, opened, as_json)
        return
    from capfilt.curation.human_captions import write_human_manifest

    captions = write_human_manifest(opened, open_progress())
    found = {"import": summary, "captions": captions}
    train = command("train", "captioner", run, "--init", "MODEL", "--output", "DIR")
    say_result(found, f"{summary.line()} {captions.line()}", train, as_json=as_json)


def _end(summary: DownloadSummary | ImportSummary, run: RunDir, as_json: bool) -> None:
    """The result, then the next command; CapfiltError where there is no image to go on with."""
    from capfilt.curation.require_images import require_images

    say_result(summary, summary.line(), None, as_json=as_json)
    require_images(run)
    if as_json:
        return
    from capfilt.curation.download import has_open_networks
    from capfilt.curation.retry import RETRIED_BY_DEFAULT

    num_passing = sum(getattr(summary, "failures", {}).get(reason, 0) for reason in RETRIED_BY_DEFAULT)
    if num_passing:
        networks = ["--allow-private-addresses"] if has_open_networks(run) else []
        note(f"{counted(num_passing, 'failure')} may pass: {command('retry', run.path, *networks)} asks again.")
    note(f"Next: {command('run', 'capfilt', run.path)}")
