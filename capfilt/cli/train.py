"""`capfilt train …`: every training, straight from runs with a manifest."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Unpack

import typer

from capfilt.cli import train_blip2
from capfilt.cli.commands import CapfiltTyper
from capfilt.cli.completion import names_of_setting
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
from capfilt.settings import (
    AlbefTrainSettings,
    BlipTrainSettings,
    CaptionerTrainSettings,
    ClipTrainSettings,
    FilterTrainSettings,
    LlmTrainSettings,
    Stage1Settings,
    Stage2Settings,
)
from capfilt.trainings import UNUSED_BY_BLIP, UNUSED_BY_CAPTIONER, UNUSED_BY_FILTER

app = CapfiltTyper(help="Train on curated runs.")

MaxTextTokens = Annotated[int, typer.Option(min=4, help="Longest text in tokens.")]
CaptionsPerImage = Annotated[int, typer.Option(min=1, help="LM: kept captions of an image in a step.")]
KnownFalse = Annotated[
    bool, typer.Option("--known-false", help="ITM: dropped captions marked known_false are the negative texts.")
]
Size = Annotated[int, typer.Option(min=1, help="Size, when training starts from nothing.")]

ImageSize = Annotated[
    int | None, typer.Option(min=1, help="Side of the square input (pixels); unset: that of the start, else 224.")
]

UNUSED_BY_LLM = ("random_crop", "random_flip")
"""Settings that it does not ask: `--set` refuses them instead of doing nothing."""


@app.command("blip")
@takes_shared_options(BlipTrainSettings, UNUSED_BY_BLIP)
def blip(
    runs: Runs,
    output: Output,
    generation: TrainedGeneration = None,
    init: Annotated[
        str,
        typer.Option(metavar="DIR", help="What `train blip` saved; unset: --text-init or --tokenizer."),
    ] = BlipTrainSettings.init,
    tokenizer: Annotated[
        str, typer.Option(metavar="PATH|ID", help="BERT-style tokenizer; [DEC] and [ENC] are added if it lacks them.")
    ] = BlipTrainSettings.tokenizer,
    text_init: Annotated[
        str, typer.Option(metavar="PATH|ID", help="BERT that the text side starts from, with its tokenizer and sizes.")
    ] = BlipTrainSettings.text_init,
    vision_init: Annotated[
        str, typer.Option(metavar="PATH|ID", help="ViT or DeiT that the image encoder starts from, with its sizes.")
    ] = BlipTrainSettings.vision_init,
    image_size_px: ImageSize = BlipTrainSettings.image_size_px,
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
    **shared: Unpack[SharedOptions],
) -> None:
    """BLIP pre-training: captioner and filter together (ITC, ITM, LM)."""
    settings = training_settings(BlipTrainSettings, locals(), UNUSED_BY_BLIP)
    opened = open_runs(runs, generation)
    from capfilt.train.blip import train_blip

    summary = train_blip(opened, settings, output, open_progress())
    next_command = command("train", "captioner", *runs, "--init", output, "--output", "DIR", generation=generation)
    say_result(summary, training_line("blip", summary, output), next_command, as_json=shared["as_json"])


FineTuningInit = Annotated[
    str, typer.Option("--init", metavar="PATH|ID", help="BLIP to start from, or what `train blip` saved.")
]


@app.command("captioner")
@takes_shared_options(CaptionerTrainSettings, UNUSED_BY_CAPTIONER)
def captioner(
    runs: Runs,
    init: FineTuningInit,
    output: Output,
    generation: TrainedGeneration = None,
    prompt: Annotated[
        str, typer.Option(metavar="TEXT", help="Text before every caption, without loss.")
    ] = CaptionerTrainSettings.prompt,
    image_size_px: ImageSize = CaptionerTrainSettings.image_size_px,
    captions_per_image: CaptionsPerImage = CaptionerTrainSettings.captions_per_image,
    max_text_tokens: MaxTextTokens = CaptionerTrainSettings.max_text_tokens,
    **shared: Unpack[SharedOptions],
) -> None:
    """Fine-tune a BLIP captioner (LM)."""
    settings = training_settings(CaptionerTrainSettings, locals(), UNUSED_BY_CAPTIONER)
    opened = open_runs(runs, generation)
    from capfilt.train.blip import train_captioner

    summary = train_captioner(opened, settings, output, open_progress())
    next_command = command("caption", "RUN", "--captioner", output)
    say_result(summary, training_line("captioner", summary, output), next_command, as_json=shared["as_json"])


@app.command("filter")
@takes_shared_options(FilterTrainSettings, UNUSED_BY_FILTER)
def filter_(
    runs: Runs,
    init: FineTuningInit,
    output: Output,
    generation: TrainedGeneration = None,
    image_size_px: ImageSize = FilterTrainSettings.image_size_px,
    known_false: KnownFalse = FilterTrainSettings.known_false,
    max_text_tokens: MaxTextTokens = FilterTrainSettings.max_text_tokens,
    **shared: Unpack[SharedOptions],
) -> None:
    """Fine-tune a BLIP filter (ITC, ITM)."""
    settings = training_settings(FilterTrainSettings, locals(), UNUSED_BY_FILTER)
    opened = open_runs(runs, generation)
    from capfilt.train.blip import train_filter

    summary = train_filter(opened, settings, output, open_progress())
    next_command = command("filter", "RUN", "--filter-model", output)
    say_result(summary, training_line("filter", summary, output), next_command, as_json=shared["as_json"])


@app.command("albef")
@takes_shared_options(AlbefTrainSettings)
def albef(
    runs: Runs,
    output: Output,
    generation: TrainedGeneration = None,
    init: Annotated[
        str, typer.Option(metavar="PATH|ID", help="ALBEF to go on from: what this command saved, or ALBEF.pth.")
    ] = AlbefTrainSettings.init,
    text_init: Annotated[
        str, typer.Option(metavar="PATH|ID", help="BERT that text and fusion encoder start from.")
    ] = AlbefTrainSettings.text_init,
    vision_init: Annotated[
        str, typer.Option(metavar="PATH|ID", help="ViT that the image encoder starts from: DeiT's .pth, or a folder.")
    ] = AlbefTrainSettings.vision_init,
    tokenizer: Annotated[
        str, typer.Option(metavar="PATH|ID", help="BERT-style tokenizer, where there is no --init and no --text-init.")
    ] = AlbefTrainSettings.tokenizer,
    image_size_px: ImageSize = AlbefTrainSettings.image_size_px,
    patch_size_px: Size = AlbefTrainSettings.patch_size_px,
    vision_width: Size = AlbefTrainSettings.vision_width,
    vision_depth: Size = AlbefTrainSettings.vision_depth,
    text_width: Size = AlbefTrainSettings.text_width,
    text_depth: Size = AlbefTrainSettings.text_depth,
    fusion_depth: Size = AlbefTrainSettings.fusion_depth,
    embed_dim: Size = AlbefTrainSettings.embed_dim,
    head_width: Size = AlbefTrainSettings.head_width,
    max_text_tokens: MaxTextTokens = AlbefTrainSettings.max_text_tokens,
    save_original: Annotated[
        bool, typer.Option("--save-original", help="Write albef.pth too, in the original release's layout.")
    ] = AlbefTrainSettings.save_original,
    **shared: Unpack[SharedOptions],
) -> None:
    """ALBEF pre-training (ITC, ITM, MLM)."""
    settings = training_settings(AlbefTrainSettings, locals())
    opened = open_runs(runs, generation)
    from capfilt.train.albef import train_albef

    summary = train_albef(opened, settings, output, open_progress())
    next_command = command("evaluate", "retrieval", output, "--references", "FILE")
    say_result(summary, training_line("albef", summary, output), next_command, as_json=shared["as_json"])


FeatureCacheDir = Annotated[
    str | None,
    typer.Option(metavar="DIR", help="Keep the image encoder's features there, for this and later trainings."),
]


@app.command("stage1")
@takes_shared_options(Stage1Settings)
def stage1(
    runs: Runs,
    output: Output,
    generation: TrainedGeneration = None,
    init: Annotated[
        str,
        typer.Option(metavar="PATH|ID", help="Stage-1 model to go on from: ours, Blip2ForImageTextRetrieval, LAVIS's."),
    ] = Stage1Settings.init,
    image_encoder: Annotated[
        str,
        typer.Option(
            metavar="PATH|ID",
            help="Frozen: a CLIP, BLIP or BLIP-2, open_clip:NAME:WEIGHTS, a .pth of EVA-CLIP, or embedded.",
        ),
    ] = Stage1Settings.image_encoder,
    image_encoder_layer: Annotated[
        str,
        typer.Option(
            help="Block that gives the features: auto (as in BLIP-2), second-last or last.",
            autocompletion=names_of_setting(Stage1Settings, "image_encoder_layer"),
        ),
    ] = Stage1Settings.image_encoder_layer,
    image_size_px: Annotated[
        int | None, typer.Option(min=1, help="Side of the images; unset: the image encoder's own.", show_default=False)
    ] = Stage1Settings.image_size_px,
    encoder_dtype: EncoderDtype = Stage1Settings.encoder_dtype,
    feature_cache_dir: FeatureCacheDir = Stage1Settings.feature_cache_dir,
    qformer_init: Annotated[
        str,
        typer.Option(metavar="PATH|ID", help="BERT or BLIP the Q-Former starts from; unset: the image encoder's BLIP."),
    ] = Stage1Settings.qformer_init,
    init_cross_attention: Annotated[
        bool, typer.Option("--init-cross-attention", help="Start from BLIP's cross-attention too.")
    ] = Stage1Settings.init_cross_attention,
    num_queries: Annotated[int, typer.Option(min=1, help="Query tokens.")] = Stage1Settings.num_queries,
    **shared: Unpack[SharedOptions],
) -> None:
    """BLIP-2 stage 1: a Q-Former on a frozen image encoder (ITC, ITM, ITG)."""
    settings = training_settings(Stage1Settings, locals())
    opened = open_runs(runs, generation)
    from capfilt.train.stage1 import train_stage1

    summary = train_stage1(opened, settings, output, open_progress())
    options = ("--init", output, "--llm", "PATH", "--output", "DIR")
    next_command = command("train", "stage2", *runs, *options, generation=generation)
    say_result(summary, training_line("stage 1", summary, output), next_command, as_json=shared["as_json"])


@app.command("stage2")
@takes_shared_options(Stage2Settings)
def stage2(
    runs: Runs,
    output: Output,
    init: Annotated[
        str,
        typer.Option(
            "--init",
            metavar="PATH|ID",
            help="What stage 1 saved, or a stage-2 model to go on from; published ones too. Unset: a new Q-Former "
            "on --image-encoder, without stage 1.",
            show_default=False,
        ),
    ] = "",
    llm: Annotated[
        str,
        typer.Option(
            metavar="PATH|ID",
            help="OPT or T5: folder, hub id, embedded-opt or embedded-t5; unset: that of a stage-2 model.",
            show_default=False,
        ),
    ] = "",
    generation: TrainedGeneration = None,
    image_encoder: Annotated[
        str,
        typer.Option(
            metavar="PATH|ID",
            help="Frozen image encoder of a new Q-Former, or of a .pth of LAVIS's that was saved without.",
        ),
    ] = Stage2Settings.image_encoder,
    qformer_init: Annotated[
        str,
        typer.Option(
            metavar="PATH|ID", help="BERT or BLIP a new Q-Former starts from; unset: the image encoder's BLIP."
        ),
    ] = Stage2Settings.qformer_init,
    encoder_dtype: EncoderDtype = Stage2Settings.encoder_dtype,
    feature_cache_dir: FeatureCacheDir = Stage2Settings.feature_cache_dir,
    **shared: Unpack[SharedOptions],
) -> None:
    """BLIP-2 stage 2: the Q-Former of stage 1 and a projection in front of a frozen language model."""
    settings = training_settings(Stage2Settings, locals())
    opened = open_runs(runs, generation)
    from capfilt.train.stage2 import train_stage2

    summary = train_stage2(opened, init, llm, settings, output, open_progress())
    next_command = command("generate", output, "IMAGE")
    say_result(summary, training_line("stage 2", summary, output), next_command, as_json=shared["as_json"])


Tokenizer = Annotated[
    Path, typer.Option("--tokenizer", metavar="DIR", help="Folder of the tokenizer.", show_default=False)
]


@app.command("clip")
@takes_shared_options(ClipTrainSettings)
def clip(
    runs: Runs,
    tokenizer: Tokenizer,
    output: Output,
    generation: TrainedGeneration = None,
    image_size_px: Size = ClipTrainSettings.image_size_px,
    embed_dim: Size = ClipTrainSettings.embed_dim,
    vision_width: Size = ClipTrainSettings.vision_width,
    text_width: Size = ClipTrainSettings.text_width,
    text_layers: Size = ClipTrainSettings.text_layers,
    context_length: Size = ClipTrainSettings.context_length,
    **shared: Unpack[SharedOptions],
) -> None:
    """A small CLIP of its own, in open_clip's layout."""
    settings = training_settings(ClipTrainSettings, locals())
    opened = open_runs(runs, generation)
    from capfilt.train.clip import train_clip

    summary = train_clip(opened, tokenizer, settings, output, open_progress())
    next_command = command("rank", "RUN", "--clip-model", output)
    say_result(summary, training_line("clip", summary, output), next_command, as_json=shared["as_json"])


@app.command("llm")
@takes_shared_options(LlmTrainSettings, UNUSED_BY_LLM)
def llm(
    texts: Annotated[
        Path, typer.Argument(metavar="TEXTS", help="JSONL of text, preamble, question.", show_default=False)
    ],
    tokenizer: Tokenizer,
    output: Output,
    architecture: Annotated[
        str, typer.Option(help="opt or t5.", autocompletion=names_of_setting(LlmTrainSettings, "architecture"))
    ] = LlmTrainSettings.architecture,
    width: Size = LlmTrainSettings.width,
    depth: Size = LlmTrainSettings.depth,
    feed_forward: Size = LlmTrainSettings.feed_forward,
    **shared: Unpack[SharedOptions],
) -> None:
    """A small OPT or T5 for stage 2, pre-trained on texts."""
    settings = training_settings(LlmTrainSettings, locals(), UNUSED_BY_LLM)
    from capfilt.train.llm import train_llm

    summary = train_llm(texts, tokenizer, settings, output, open_progress())
    next_command = command("train", "stage2", "RUN", "--init", "STAGE1_DIR", "--llm", output, "--output", "DIR")
    say_result(summary, training_line(settings.architecture, summary, output), next_command, as_json=shared["as_json"])


app.command("blip2-captions")(train_blip2.captions)
app.command("blip2-vqa")(train_blip2.vqa)
