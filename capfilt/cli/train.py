"""`capfilt train …`: every training, straight from runs with a manifest."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from capfilt.cli.console import open_progress, say_result
from capfilt.cli.options import AsJson, Device, Output, Runs, settings_from
from capfilt.progress import format_seconds
from capfilt.settings import (
    BlipTrainSettings,
    ClipTrainSettings,
    LlmTrainSettings,
    Stage1Settings,
    Stage2Settings,
)

if TYPE_CHECKING:
    from capfilt.train.loop import TrainSummary

app = typer.Typer(help="Train on curated runs.", no_args_is_help=True, rich_markup_mode=None)

MaxTextTokens = Annotated[int, typer.Option(min=4, help="Longest text in tokens.")]
MaxSteps = Annotated[int, typer.Option(min=1, help="Optimizer steps.")]
TrainBatchSize = Annotated[int, typer.Option("--batch-size", min=2, help="Images in a step.")]
LearningRate = Annotated[float, typer.Option(help="Peak learning rate.")]
MinLearningRate = Annotated[float, typer.Option(help="Learning rate at the end, at most --learning-rate.")]
WarmupSteps = Annotated[int, typer.Option(min=0, help="Steps of linear warm-up.")]
SaveEverySteps = Annotated[int, typer.Option(min=1, help="Steps between two checkpoints.")]
Seed = Annotated[int, typer.Option(help="Fixes initialisation, order and draws.")]
CaptionsPerImage = Annotated[int, typer.Option(min=1, help="LM: kept captions of an image in a step.")]
KnownFalse = Annotated[
    bool, typer.Option("--known-false", help="ITM: dropped captions marked known_false are the negative texts.")
]
Precision = Annotated[str, typer.Option(help="Precision of matrix products: float32 or bfloat16.")]
Size = Annotated[int, typer.Option(min=1, help="Size, when training starts from nothing.")]


@app.command("blip")
def blip(
    runs: Runs,
    output: Output,
    init: Annotated[
        str,
        typer.Option(metavar="DIR", help="What `train blip` saved; unset: from nothing, with --tokenizer."),
    ] = BlipTrainSettings.init,
    tokenizer: Annotated[
        str, typer.Option(metavar="PATH|ID", help="BERT-style tokenizer with [DEC] and [ENC].")
    ] = BlipTrainSettings.tokenizer,
    image_size_px: Size = BlipTrainSettings.image_size_px,
    patch_size_px: Size = BlipTrainSettings.patch_size_px,
    vision_width: Size = BlipTrainSettings.vision_width,
    vision_depth: Size = BlipTrainSettings.vision_depth,
    text_width: Size = BlipTrainSettings.text_width,
    text_depth: Size = BlipTrainSettings.text_depth,
    embed_dim: Size = BlipTrainSettings.embed_dim,
    head_width: Size = BlipTrainSettings.head_width,
    captions_per_image: CaptionsPerImage = BlipTrainSettings.captions_per_image,
    known_false: KnownFalse = BlipTrainSettings.known_false,
    max_text_tokens: MaxTextTokens = BlipTrainSettings.max_text_tokens,
    max_steps: MaxSteps = BlipTrainSettings.max_steps,
    batch_size: TrainBatchSize = BlipTrainSettings.batch_size,
    learning_rate: LearningRate = BlipTrainSettings.learning_rate,
    min_learning_rate: MinLearningRate = BlipTrainSettings.min_learning_rate,
    warmup_steps: WarmupSteps = BlipTrainSettings.warmup_steps,
    save_every_steps: SaveEverySteps = BlipTrainSettings.save_every_steps,
    seed: Seed = BlipTrainSettings.seed,
    device: Device = BlipTrainSettings.device,
    autocast: Precision = BlipTrainSettings.autocast,
    as_json: AsJson = False,
) -> None:
    """BLIP pre-training: captioner and filter together (ITC, ITM, LM)."""
    settings = settings_from(BlipTrainSettings, locals())
    from capfilt.train.blip import train_blip

    summary = train_blip(runs, settings, output, open_progress())
    following = f"capfilt train captioner {' '.join(map(str, runs))} --init {output} --output DIR"
    say_result(summary, training_line("blip", summary, output), following, as_json=as_json)


FineTuningInit = Annotated[
    str, typer.Option("--init", metavar="PATH|ID", help="BLIP to start from, or what `train blip` saved.")
]


@app.command("captioner")
def captioner(
    runs: Runs,
    init: FineTuningInit,
    output: Output,
    prompt: Annotated[
        str, typer.Option(metavar="TEXT", help="Text before every caption, without loss.")
    ] = BlipTrainSettings.prompt,
    captions_per_image: CaptionsPerImage = BlipTrainSettings.captions_per_image,
    max_text_tokens: MaxTextTokens = BlipTrainSettings.max_text_tokens,
    max_steps: MaxSteps = BlipTrainSettings.max_steps,
    batch_size: TrainBatchSize = BlipTrainSettings.batch_size,
    learning_rate: LearningRate = BlipTrainSettings.learning_rate,
    min_learning_rate: MinLearningRate = BlipTrainSettings.min_learning_rate,
    warmup_steps: WarmupSteps = BlipTrainSettings.warmup_steps,
    save_every_steps: SaveEverySteps = BlipTrainSettings.save_every_steps,
    seed: Seed = BlipTrainSettings.seed,
    device: Device = BlipTrainSettings.device,
    autocast: Precision = BlipTrainSettings.autocast,
    as_json: AsJson = False,
) -> None:
    """Fine-tune a BLIP captioner (LM)."""
    settings = settings_from(BlipTrainSettings, locals())
    from capfilt.train.blip import train_captioner

    summary = train_captioner(runs, settings, output, open_progress())
    following = f"capfilt caption RUN --captioner {output}"
    say_result(summary, training_line("captioner", summary, output), following, as_json=as_json)


@app.command("filter")
def filter_(
    runs: Runs,
    init: FineTuningInit,
    output: Output,
    known_false: KnownFalse = BlipTrainSettings.known_false,
    max_text_tokens: MaxTextTokens = BlipTrainSettings.max_text_tokens,
    max_steps: MaxSteps = BlipTrainSettings.max_steps,
    batch_size: TrainBatchSize = BlipTrainSettings.batch_size,
    learning_rate: LearningRate = BlipTrainSettings.learning_rate,
    min_learning_rate: MinLearningRate = BlipTrainSettings.min_learning_rate,
    warmup_steps: WarmupSteps = BlipTrainSettings.warmup_steps,
    save_every_steps: SaveEverySteps = BlipTrainSettings.save_every_steps,
    seed: Seed = BlipTrainSettings.seed,
    device: Device = BlipTrainSettings.device,
    autocast: Precision = BlipTrainSettings.autocast,
    as_json: AsJson = False,
) -> None:
    """Fine-tune a BLIP filter (ITC, ITM)."""
    settings = settings_from(BlipTrainSettings, locals())
    from capfilt.train.blip import train_filter

    summary = train_filter(runs, settings, output, open_progress())
    following = f"capfilt filter RUN --filter-model {output}"
    say_result(summary, training_line("filter", summary, output), following, as_json=as_json)


@app.command("stage1")
def stage1(
    runs: Runs,
    output: Output,
    image_encoder: Annotated[
        str,
        typer.Option(metavar="PATH|ID", help="BLIP model whose image encoder is taken, frozen; or embedded."),
    ] = Stage1Settings.image_encoder,
    qformer_init: Annotated[
        str,
        typer.Option(metavar="PATH|ID", help="BERT or BLIP the Q-Former starts from; unset: the image encoder's."),
    ] = Stage1Settings.qformer_init,
    init_cross_attention: Annotated[
        bool, typer.Option("--init-cross-attention", help="Start from BLIP's cross-attention too.")
    ] = Stage1Settings.init_cross_attention,
    num_queries: Annotated[int, typer.Option(min=1, help="Query tokens.")] = Stage1Settings.num_queries,
    max_steps: MaxSteps = Stage1Settings.max_steps,
    batch_size: TrainBatchSize = Stage1Settings.batch_size,
    learning_rate: LearningRate = Stage1Settings.learning_rate,
    min_learning_rate: MinLearningRate = Stage1Settings.min_learning_rate,
    warmup_steps: WarmupSteps = Stage1Settings.warmup_steps,
    save_every_steps: SaveEverySteps = Stage1Settings.save_every_steps,
    seed: Seed = Stage1Settings.seed,
    device: Device = Stage1Settings.device,
    as_json: AsJson = False,
) -> None:
    """BLIP-2 stage 1: a Q-Former on a frozen image encoder (ITC, ITM, ITG)."""
    settings = settings_from(Stage1Settings, locals())
    from capfilt.train.stage1 import train_stage1

    summary = train_stage1(runs, settings, output, open_progress())
    runs_text = " ".join(map(str, runs))
    following = f"capfilt train stage2 {runs_text} --init {output} --llm PATH --output DIR"
    say_result(summary, training_line("stage 1", summary, output), following, as_json=as_json)


@app.command("stage2")
def stage2(
    runs: Runs,
    init: Annotated[Path, typer.Option("--init", metavar="STAGE1_DIR", help="What stage 1 saved.", show_default=False)],
    llm: Annotated[
        str,
        typer.Option(
            metavar="PATH|ID",
            help="OPT or T5: folder, hub id, embedded-opt or embedded-t5.",
            show_default=False,
        ),
    ],
    output: Output,
    max_steps: MaxSteps = Stage2Settings.max_steps,
    batch_size: TrainBatchSize = Stage2Settings.batch_size,
    learning_rate: LearningRate = Stage2Settings.learning_rate,
    min_learning_rate: MinLearningRate = Stage2Settings.min_learning_rate,
    warmup_steps: WarmupSteps = Stage2Settings.warmup_steps,
    save_every_steps: SaveEverySteps = Stage2Settings.save_every_steps,
    seed: Seed = Stage2Settings.seed,
    device: Device = Stage2Settings.device,
    as_json: AsJson = False,
) -> None:
    """BLIP-2 stage 2: the Q-Former of stage 1 and a projection in front of a frozen language model."""
    settings = settings_from(Stage2Settings, locals())
    from capfilt.train.stage2 import train_stage2

    summary = train_stage2(runs, init, llm, settings, output, open_progress())
    following = f"capfilt generate {output} IMAGE"
    say_result(summary, training_line("stage 2", summary, output), following, as_json=as_json)


Tokenizer = Annotated[
    Path, typer.Option("--tokenizer", metavar="DIR", help="Folder of the tokenizer.", show_default=False)
]


@app.command("clip")
def clip(
    runs: Runs,
    tokenizer: Tokenizer,
    output: Output,
    image_size_px: Size = ClipTrainSettings.image_size_px,
    embed_dim: Size = ClipTrainSettings.embed_dim,
    vision_width: Size = ClipTrainSettings.vision_width,
    text_width: Size = ClipTrainSettings.text_width,
    text_layers: Size = ClipTrainSettings.text_layers,
    context_length: Size = ClipTrainSettings.context_length,
    max_steps: MaxSteps = ClipTrainSettings.max_steps,
    batch_size: TrainBatchSize = ClipTrainSettings.batch_size,
    learning_rate: LearningRate = ClipTrainSettings.learning_rate,
    min_learning_rate: MinLearningRate = ClipTrainSettings.min_learning_rate,
    warmup_steps: WarmupSteps = ClipTrainSettings.warmup_steps,
    save_every_steps: SaveEverySteps = ClipTrainSettings.save_every_steps,
    seed: Seed = ClipTrainSettings.seed,
    device: Device = ClipTrainSettings.device,
    as_json: AsJson = False,
) -> None:
    """A small CLIP of its own, in open_clip's layout."""
    settings = settings_from(ClipTrainSettings, locals())
    from capfilt.train.clip import train_clip

    summary = train_clip(runs, tokenizer, settings, output, open_progress())
    following = f"capfilt rank RUN --clip-model {output}"
    say_result(summary, training_line("clip", summary, output), following, as_json=as_json)


@app.command("llm")
def llm(
    texts: Annotated[
        Path, typer.Argument(metavar="TEXTS", help="JSONL of text, preamble, question.", show_default=False)
    ],
    tokenizer: Tokenizer,
    output: Output,
    architecture: Annotated[str, typer.Option(help="opt or t5.")] = LlmTrainSettings.architecture,
    width: Size = LlmTrainSettings.width,
    depth: Size = LlmTrainSettings.depth,
    feed_forward: Size = LlmTrainSettings.feed_forward,
    max_steps: MaxSteps = LlmTrainSettings.max_steps,
    batch_size: TrainBatchSize = LlmTrainSettings.batch_size,
    learning_rate: LearningRate = LlmTrainSettings.learning_rate,
    min_learning_rate: MinLearningRate = LlmTrainSettings.min_learning_rate,
    warmup_steps: WarmupSteps = LlmTrainSettings.warmup_steps,
    save_every_steps: SaveEverySteps = LlmTrainSettings.save_every_steps,
    seed: Seed = LlmTrainSettings.seed,
    device: Device = LlmTrainSettings.device,
    as_json: AsJson = False,
) -> None:
    """A small OPT or T5 for stage 2, pre-trained on texts."""
    settings = settings_from(LlmTrainSettings, locals())
    from capfilt.train.llm import train_llm

    summary = train_llm(texts, tokenizer, settings, output, open_progress())
    following = f"capfilt train stage2 RUN --init STAGE1_DIR --llm {output} --output DIR"
    say_result(summary, training_line(architecture, summary, output), following, as_json=as_json)


def training_line(what: str, summary: TrainSummary, output: Path) -> str:
    """One line: steps, losses from start to end, speed, where the model is."""
    first, last = summary.first_losses.get("loss"), summary.last_losses.get("loss")
    losses = f", loss {first:.3f} to {last:.3f}" if first is not None and last is not None else ""
    if summary.already_done:
        return f"{what}: nothing to do, {summary.steps:,} steps are done{losses}. The model is in {output}"
    speed = f"{summary.images_per_second:,.0f} images/s in {format_seconds(summary.seconds)}"
    return f"{what}: {summary.steps:,} steps{losses}, {speed}. The model is in {output}"
