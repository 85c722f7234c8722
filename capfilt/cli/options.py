"""Arguments and options that several commands share, each declared once. Defaults come from capfilt/settings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from capfilt.cli.completion import generations, names_of_setting
from capfilt.data.paths import AnyPath, path_of
from capfilt.errors import UsageError
from capfilt.settings import CaptionSettings

if TYPE_CHECKING:
    from capfilt.data.rundir import RunDir

_PLACE = "a folder, s3://BUCKET/RUN or gs://BUCKET/RUN"
Run = Annotated[AnyPath, typer.Argument(metavar="RUN", help=f"The run: {_PLACE}.", show_default=False, parser=path_of)]
Runs = Annotated[
    list[AnyPath],
    typer.Argument(metavar="RUN...", help=f"One or more runs: each {_PLACE}.", show_default=False, parser=path_of),
]
References = Annotated[
    AnyPath,
    typer.Option(
        metavar="FILE|RUN",
        help="COCO captions JSON, Karpathy JSON, Flickr8k token file, or a run.",
        show_default=False,
        parser=path_of,
    ),
]
Generation = Annotated[
    str | None,
    typer.Option(
        "--generation",
        metavar="NAME",
        help="Work in a named generation of results beside the default one.",
        autocompletion=generations,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
BatchSize = Annotated[
    int | None,
    typer.Option(
        "--batch-size",
        min=1,
        help="Images at a time; does not change the results (on a GPU, but for rounding). Unset: 32; CUDA: what fits.",
    ),
]
Device = Annotated[
    str,
    typer.Option(
        "--device", help="auto, cpu, cuda or mps.", autocompletion=names_of_setting(CaptionSettings, "device")
    ),
]
Dtype = Annotated[
    str,
    typer.Option(
        "--dtype",
        help="auto (bfloat16 where it is fast), float32, bfloat16 or float16.",
        autocompletion=names_of_setting(CaptionSettings, "dtype"),
    ),
]
Resizer = Annotated[
    str,
    typer.Option(
        "--resizer",
        help="What resizes pictures: torchvision (as transformers does) or pillow (as BLIP did).",
        autocompletion=names_of_setting(CaptionSettings, "resizer"),
    ),
]
Threshold = Annotated[float, typer.Option("--threshold", help="Pairs with a lower ITM score are dropped.")]
Keep = Annotated[int, typer.Option("--keep", min=1, help="Ranked captions kept for each image, best CLIP score first.")]
Output = Annotated[
    Path, typer.Option("--output", metavar="DIR", help="Directory of the trained model.", show_default=False)
]
NumBeams = Annotated[
    int | None,
    typer.Option(
        "--num-beams",
        min=1,
        help="Beams; 1 is greedy. Unset: captions 5 (BLIP: 3), answers 5, `generate` 1.",
        show_default=False,
    ),
]
MinNewTokens = Annotated[
    int | None,
    typer.Option(
        "--min-new-tokens", min=0,
        help="Shortest text in tokens, prompt not counted. Unset: captions 8 (BLIP: 5 with its prompt).",
        show_default=False,
    ),
]  # fmt: skip
MaxNewTokens = Annotated[
    int | None,
    typer.Option(
        "--max-new-tokens", min=1,
        help="Longest text in tokens, prompt not counted. Unset: 30 (BLIP: 20 with its prompt), answers 10.",
        show_default=False,
    ),
]  # fmt: skip
LengthPenalty = Annotated[
    float | None,
    typer.Option(
        "--length-penalty", help="Beam search of stage 2: below 0 favours short texts. Unset: 1, answers -1.",
        show_default=False,
    ),
]  # fmt: skip
WriterBatchSize = Annotated[
    int | None,
    typer.Option(
        "--batch-size", min=1, help="Images or questions at a time. Unset: 16; a captioner: 32, with CUDA what fits.",
        show_default=False,
    ),
]  # fmt: skip
WriterLlm = Annotated[
    str, typer.Option("--llm", metavar="PATH|ID", help="Language model, for a .pth of LAVIS's, which has none.")
]
WriterImageEncoder = Annotated[
    str,
    typer.Option(
        "--image-encoder", metavar="PATH|ID", help="Image encoder, for a .pth of LAVIS's that was saved without."
    ),
]

Settings = TypeVar("Settings")


def settings_from(cls: type[Settings], options: Mapping[str, Any]) -> Settings:
    """The settings that a command's options (its `locals()`) fill by name; the others keep their defaults."""
    return cls(**{f.name: options[f.name] for f in fields(cls) if f.name in options})  # type: ignore[arg-type]


def is_given(context: typer.Context, name: str) -> bool:
    """Whether the user gave a parameter, rather than its default."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def option_of(name: str) -> str:
    """The option of a parameter."""
    return f"--{name.replace('_', '-')}"


def refuse_idle(context: typer.Context, names: Iterable[str], because: str) -> None:
    """UsageError where the user gave one of these parameters, which do nothing here."""
    if idle := [option_of(name) for name in names if is_given(context, name)]:
        does = "does" if len(idle) == 1 else "do"
        raise UsageError(f"{', '.join(idle)} {does} nothing {because}. Leave {'it' if len(idle) == 1 else 'them'} out.")


def open_generation(run: AnyPath, generation: str | None) -> RunDir:
    """The run; a generation that it has not is refused."""
    from capfilt.data.rundir import RunDir

    opened = RunDir.open(run, generation)
    if generation is not None and generation not in opened.generations():
        known = ", ".join(opened.generations()) or "none"
        raise UsageError(f"{run} has no generation {generation}; those it has: {known}.")
    return opened
