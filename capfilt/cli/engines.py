"""`--engine ray` and what belongs to it: options that commands which work shard by shard share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from capfilt.cli.completion import one_of
from capfilt.errors import UsageError
from capfilt.settings import ENGINES, RaySettings
from capfilt.settings.checks import not_one_of

if TYPE_CHECKING:
    from capfilt.engines.base import Engine

EngineName = Annotated[
    str,
    typer.Option(
        "--engine",
        metavar="NAME",
        help="local, or ray: workers of a Ray cluster.",
        autocompletion=one_of(*ENGINES),
    ),
]
Address = Annotated[
    str | None,
    typer.Option("--address", metavar="ADDRESS", help="Ray: the cluster, as ray.init takes it; unset: this machine."),
]
NumWorkers = Annotated[
    int | None, typer.Option("--num-workers", min=1, help="Ray: workers; unset: as many as there is room for.")
]
CpusPerWorker = Annotated[
    float | None,
    typer.Option("--cpus-per-worker", min=0, help="Ray: cores of a worker; unset: 1, or up to 8 for models on CPUs."),
]
GpusPerWorker = Annotated[
    float | None,
    typer.Option("--gpus-per-worker", min=0, help="Ray: GPUs of a worker, fractions too; unset: 1 for models."),
]
_OPTIONS = ("address", "num_workers", "cpus_per_worker", "gpus_per_worker")


def engine_from(values: Mapping[str, Any]) -> Engine:
    """The engine that a command's `locals()` ask for.

    Raises UsageError for another name, and for an option of Ray's without it.
    """
    name, options = values["engine"], {option: values[option] for option in _OPTIONS}
    if name not in ENGINES:
        raise UsageError(not_one_of("--engine", name, ENGINES))
    if name == "ray":
        from capfilt.engines.cluster import RayEngine

        return RayEngine(RaySettings(**options))
    if given := [f"--{option.replace('_', '-')}" for option, value in options.items() if value is not None]:
        raise UsageError(f"{', '.join(given)} belongs to --engine ray. Add it, or leave the option out.")
    from capfilt.engines.local import LocalEngine

    return LocalEngine(processes=True)
