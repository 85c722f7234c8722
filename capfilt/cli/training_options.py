"""What the `train` commands share: options, settings given by name, the runs in a generation, the line at the end."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypedDict, TypeVar, get_type_hints

import typer

from capfilt.cli.completion import assignments, generations, names_of_setting
from capfilt.cli.options import AsJson, Device, is_given, option_of
from capfilt.data.paths import AnyPath
from capfilt.errors import UsageError
from capfilt.progress import format_seconds
from capfilt.settings import FrozenEncoderSettings, TrainSettings
from capfilt.settings.values import nearest_or_all, typed_text

if TYPE_CHECKING:
    from capfilt.data.rundir import RunDir
    from capfilt.train.loop import TrainSummary

TrainedGeneration = Annotated[
    str | None,
    typer.Option(
        "--generation",
        metavar="NAME",
        help="Train on the pairs that this generation of the runs keeps.",
        autocompletion=generations,
    ),
]


EncoderDtype = Annotated[
    str,
    typer.Option(
        help="Frozen image encoder: auto, float32, bfloat16 or float16.",
        autocompletion=names_of_setting(FrozenEncoderSettings, "encoder_dtype"),
    ),
]


class SharedOptions(TypedDict):
    """The options of every training, in the order of the help; `takes_shared_options` puts them into a command."""

    max_steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")]
    batch_size: Annotated[int, typer.Option(min=2, help="Images that a process works on at a time.")]
    accumulation_steps: Annotated[int, typer.Option(min=1, help="Batches whose gradients make one step.")]
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate.")]
    min_learning_rate: Annotated[float, typer.Option(help="Learning rate at the end, at most --learning-rate.")]
    warmup_steps: Annotated[int, typer.Option(min=0, help="Steps of linear warm-up.")]
    save_every_steps: Annotated[int, typer.Option(min=1, help="Steps between two checkpoints.")]
    seed: Annotated[int, typer.Option(help="Fixes initialisation, order and draws.")]
    device: Device
    autocast: Annotated[
        str,
        typer.Option(
            help="Precision of matrix products: float32, bfloat16, float16 or auto.",
            autocompletion=names_of_setting(TrainSettings, "autocast"),
        ),
    ]
    compile: Annotated[bool, typer.Option("--compile", help="Compile the layers with torch.compile.")]
    recompute: Annotated[bool, typer.Option("--recompute", help="Gradient checkpointing: less memory, more time.")]
    sharding: Annotated[
        str,
        typer.Option(
            help="Of several processes (torchrun): none, each has all weights; full, its share of them.",
            autocompletion=names_of_setting(TrainSettings, "sharding"),
        ),
    ]
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Write curves for TensorBoard too.")]
    assignments: list[str]
    as_json: AsJson
    context: typer.Context


Command = TypeVar("Command", bound=Callable[..., None])
Settings = TypeVar("Settings", bound=TrainSettings)


def takes_shared_options(cls: type[TrainSettings], unused: Collection[str] = ()) -> Callable[[Command], Command]:
    """Show Typer the shared options in the place of a command's `**shared`, with the defaults of `cls`.

    `unused` as in `training_settings`.
    """
    set_help = "Any setting by its name, tuples with commas; repeatable."
    any_setting = typer.Option("--set", metavar="NAME=VALUE", help=set_help, autocompletion=assignments(cls, unused))
    hints = get_type_hints(SharedOptions, include_extras=True) | {"assignments": Annotated[list[str], any_setting]}
    defaults = {f.name: f.default for f in fields(cls)} | {"assignments": [], "as_json": False}
    shared = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=defaults.get(name, inspect.Parameter.empty),
            annotation=hint,
        )
        for name, hint in hints.items()
    ]

    def declare(command: Command) -> Command:
        signature = inspect.signature(command, eval_str=True)
        own = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        command.__signature__ = signature.replace(parameters=[*own, *shared])  # type: ignore[attr-defined]
        return command

    return declare


def training_settings(cls: type[Settings], options: Mapping[str, Any], unused: Collection[str] = ()) -> Settings:
    """The settings that a command's options (its `locals()`, `shared` among them) and its `--set` fill by name.

    `unused` names settings of `cls` that this training does not ask; `--set` does not know them.

    Raises UsageError for a `--set` with an unknown name or a value of the wrong type, and for a setting given twice.
    """
    shared: SharedOptions = options["shared"]
    hints = get_type_hints(cls)
    names = [f.name for f in fields(cls) if f.name not in unused]
    given = {**options, **shared}
    filled = {name: given[name] for name in names if name in given}
    seen: set[str] = set()
    for assignment in shared["assignments"]:
        name, value = _read_assignment(assignment, names, hints)
        if name in given and is_given(shared["context"], name):
            raise UsageError(f"{option_of(name)} and --set {name} are both given; expected one of them.")
        if name in seen:
            raise UsageError(f"--set {name} is given twice; expected it once.")
        seen.add(name)
        filled[name] = value
    return cls(**filled)


def _read_assignment(assignment: str, names: Sequence[str], hints: Mapping[str, Any]) -> tuple[str, object]:
    """Name and typed value of one `--set`."""
    name, equals, text = assignment.partition("=")
    if not equals:
        raise UsageError(f"--set {assignment} has no value; expected NAME=VALUE, as in --set optimizer=muon.")
    if name not in names:
        raise UsageError(f"--set {assignment}: no setting {name}.{nearest_or_all(name, sorted(names))}")
    try:
        return name, typed_text(text, hints[name])
    except TypeError as error:
        raise UsageError(f"--set {assignment}: {name} is {text!r}; expected {error}.") from None


def open_runs(runs: Sequence[AnyPath], generation: str | None) -> list[RunDir]:
    """The runs, each seen in the generation. Raises UsageError where one is no run."""
    from capfilt.data.rundir import RunDir

    return [RunDir.open(path, generation) for path in runs]


def training_line(what: str, summary: TrainSummary, output: Path) -> str:
    """One line: steps, mean loss of the first and the last window of the log, speed, where the model is."""
    first, last = summary.first_losses.get("loss"), summary.last_losses.get("loss")
    losses = f", mean loss {first:.3f} to {last:.3f}" if first is not None and last is not None else ""
    if first == last and last is not None:  # too short for two windows of the log
        losses = f", mean loss {last:.3f}"
    if summary.already_done:
        return f"{what}: nothing to do, {summary.steps:,} steps are done{losses}. The model is in {output}"
    speed = f"{summary.images_per_second:,.0f} images/s in {format_seconds(summary.seconds)}"
    return f"{what}: {summary.steps:,} steps{losses}, {speed}. The model is in {output}"
