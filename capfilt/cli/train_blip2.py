"""`capfilt train blip2-captions` and `capfilt train blip2-vqa`: a stage-2 BLIP-2, fine-tuned."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Unpack

import typer

from capfilt.cli.console import command, open_progress, say_result
from capfilt.cli.options import Output, Runs
from capfilt.cli.training_options import (
    EncoderDtype,
    SharedOptions,
    TrainedGeneration,
    open_runs,
    takes_shared_options,
    training_line,
    training_settings,
)
from capfilt.errors import UsageError
from capfilt.settings import Blip2CaptionsSettings, Blip2VqaSettings

if TYPE_CHECKING:
    from capfilt.train.question_pairs import QuestionFiles

UNUSED_BY_VQA = ("run_weights",)

Stage2Init = Annotated[
    str,
    typer.Option(
        "--init",
        metavar="PATH|ID",
        help="Stage-2 model to start from: ours, Blip2ForConditionalGeneration, LAVIS's.",
        show_default=False,
    ),
]
Llm = Annotated[
    str, typer.Option(metavar="PATH|ID", help="OPT or T5, for a .pth of LAVIS's, which has none.", show_default=False)
]
ImageSize = Annotated[
    int, typer.Option(min=0, help="Side of the images; positions are interpolated. 0: the model's own.")
]
TrainImageEncoder = Annotated[
    bool, typer.Option("--train-image-encoder", help="Train the image encoder too, as the paper does.")
]
ImageEncoder = Annotated[
    str, typer.Option(metavar="PATH|ID", help="Image encoder, for a .pth of LAVIS's that was saved without.")
]
FeatureCacheDir = Annotated[
    str | None,
    typer.Option(metavar="DIR", help="Keep the frozen image encoder's features there, for later trainings too."),
]


@takes_shared_options(Blip2CaptionsSettings)
def captions(
    runs: Runs,
    init: Stage2Init,
    output: Output,
    llm: Llm = "",
    generation: TrainedGeneration = None,
    prompt: Annotated[
        str, typer.Option(metavar="TEXT", help="Text before every caption, without loss.")
    ] = Blip2CaptionsSettings.prompt,
    image_size_px: ImageSize = Blip2CaptionsSettings.image_size_px,
    train_image_encoder: TrainImageEncoder = Blip2CaptionsSettings.train_image_encoder,
    image_encoder: ImageEncoder = Blip2CaptionsSettings.image_encoder,
    encoder_dtype: EncoderDtype = Blip2CaptionsSettings.encoder_dtype,
    feature_cache_dir: FeatureCacheDir = Blip2CaptionsSettings.feature_cache_dir,
    **shared: Unpack[SharedOptions],
) -> None:
    """Fine-tune a stage-2 BLIP-2 for captions."""
    settings = training_settings(Blip2CaptionsSettings, locals())
    opened = open_runs(runs, generation)
    from capfilt.train.blip2_tuning import train_blip2_captions

    summary = train_blip2_captions(opened, init, llm, settings, output, open_progress())
    asked = ["--prompt", settings.prompt] if settings.prompt else []
    next_command = command("generate", output, "IMAGE", *asked)
    say_result(summary, training_line("blip2-captions", summary, output), next_command, as_json=shared["as_json"])


@takes_shared_options(Blip2VqaSettings, UNUSED_BY_VQA)
def vqa(
    questions: Annotated[
        list[Path], typer.Option(metavar="FILE", help="VQA questions JSON; repeatable.", show_default=False)
    ],
    annotations: Annotated[
        list[Path],
        typer.Option(metavar="FILE", help="Its annotations JSON, one for each --questions.", show_default=False),
    ],
    images: Annotated[
        list[Path],
        typer.Option(metavar="DIR", help="Folder of the images; one for all, or for each.", show_default=False),
    ],
    init: Stage2Init,
    output: Output,
    llm: Llm = "",
    prompt: Annotated[
        str,
        typer.Option(
            metavar="TEXT", help='Frame with {} for the question. Unset: "Question: {} Answer:", T5: "… Short answer:".'
        ),
    ] = Blip2VqaSettings.prompt,
    image_size_px: ImageSize = Blip2VqaSettings.image_size_px,
    train_image_encoder: TrainImageEncoder = Blip2VqaSettings.train_image_encoder,
    image_encoder: ImageEncoder = Blip2VqaSettings.image_encoder,
    encoder_dtype: EncoderDtype = Blip2VqaSettings.encoder_dtype,
    feature_cache_dir: FeatureCacheDir = Blip2VqaSettings.feature_cache_dir,
    **shared: Unpack[SharedOptions],
) -> None:
    """Fine-tune a stage-2 BLIP-2 for questions about images."""
    settings = training_settings(Blip2VqaSettings, locals(), UNUSED_BY_VQA)
    files = _question_files(questions, annotations, images)
    from capfilt.train.blip2_tuning import train_blip2_vqa

    summary = train_blip2_vqa(files, init, llm, settings, output, open_progress())
    asked = ["--prompt", settings.prompt] if settings.prompt else []
    next_command = command(
        "evaluate", "vqa", output, *["--questions", "FILE", "--annotations", "FILE", "--images", "DIR"], *asked
    )
    say_result(summary, training_line("blip2-vqa", summary, output), next_command, as_json=shared["as_json"])


def _question_files(
    questions: Sequence[Path], annotations: Sequence[Path], images: Sequence[Path]
) -> list[QuestionFiles]:
    """Each questions file with its annotations and folder. UsageError where their numbers do not fit."""
    num = len(questions)
    if len(annotations) != num or len(images) not in (1, num):
        raise UsageError(
            f"{num} --questions, {len(annotations)} --annotations, {len(images)} --images; expected as many "
            "annotations as questions, and one folder of images or as many."
        )
    from capfilt.train.question_pairs import QuestionFiles

    folders = images if len(images) == num else [images[0]] * num
    return [QuestionFiles(*part) for part in zip(questions, annotations, folders, strict=True)]
