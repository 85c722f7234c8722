"""`capfilt generate`: captions, continuations and answers from a trained model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from capfilt.cli.console import clean, note, open_progress, say, say_json
from capfilt.cli.options import (
    AsJson,
    Device,
    Dtype,
    LengthPenalty,
    MaxNewTokens,
    MinNewTokens,
    NumBeams,
    WriterBatchSize,
    WriterImageEncoder,
    WriterLlm,
    settings_from,
)
from capfilt.errors import UsageError
from capfilt.progress import NullProgress
from capfilt.settings import GenerationSettings

if TYPE_CHECKING:
    from capfilt.evaluate.streaming import Request, TextWriter, Written

MAX_TEXT_CHARS = 1000


def generate(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Stage-2 model or BLIP captioner: folder, hub id or .pth.")
    ],
    images: Annotated[
        list[str] | None, typer.Argument(metavar="IMAGE...", help="Image files, folders, and patterns in quotes.")
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Text to continue, or a question with --answer.")
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Prompts, one a line, each for every image; .jsonl: lines with image and prompt."
        ),
    ] = None,
    question: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Question to answer, in the model's frame.")
    ] = None,
    answer: Annotated[
        bool, typer.Option("--answer", help="Answer --prompt or --prompts as questions, in the model's frame.")
    ] = False,
    num_beams: NumBeams = None,
    min_new_tokens: MinNewTokens = None,
    max_new_tokens: MaxNewTokens = None,
    length_penalty: LengthPenalty = None,
    top_p: Annotated[
        float | None,
        typer.Option(help="Draw by nucleus sampling: the smallest set of tokens with this probability. BLIP: 0.9."),
    ] = GenerationSettings.top_p,
    top_k: Annotated[
        int, typer.Option(min=0, help="With --top-p: tokens considered at each draw; 0: all.")
    ] = GenerationSettings.top_k,
    temperature: Annotated[
        float, typer.Option(help="With --top-p: divides the logits.")
    ] = GenerationSettings.temperature,
    seed: Annotated[int, typer.Option(help="With --top-p: fixes the draws.")] = GenerationSettings.seed,
    batch_size: WriterBatchSize = GenerationSettings.batch_size,
    llm: WriterLlm = GenerationSettings.llm,
    image_encoder: WriterImageEncoder = GenerationSettings.image_encoder,
    device: Device = GenerationSettings.device,
    dtype: Dtype = GenerationSettings.dtype,
    jsonl: Annotated[bool, typer.Option("--jsonl", help="Print a JSON object a line, as each is written.")] = False,
    as_json: AsJson = False,
) -> None:
    """Describe images, continue a text about them, or answer questions. Texts come as batches finish."""
    answers = answer or question is not None
    requests = _requests(images or [], prompt, prompts, question, answer)
    settings = settings_from(GenerationSettings, {**locals(), "prompt": None if answers else prompt})
    from capfilt.evaluate.writers import load_writer

    writer = load_writer(model, "answer" if answers else "describe", settings)
    if num_unusable := _write(writer, requests, jsonl, as_json):
        note(f"{num_unusable:,} of {len(requests):,} texts could not be written.")
        raise typer.Exit(1)


def _requests(
    images: Sequence[str], prompt: str | None, prompts: Path | None, question: str | None, answer: bool
) -> list[Request]:
    """What is to be written, in order; UsageError where the options contradict each other."""
    if answer and not (prompt or prompts or question):
        raise UsageError("--answer needs a question. Add --prompt 'what colour is the ball?'")
    if sum(given is not None for given in (prompt, prompts, question)) > 1:
        raise UsageError("Give one of --prompt, --prompts and --question.")
    from capfilt.evaluate.requests import expand_images, read_image_prompts, read_prompts, request_texts

    if prompts is not None and prompts.suffix == ".jsonl":
        if images:
            raise UsageError(f"{prompts} names its images itself. Leave IMAGE out, or give prompts as plain lines.")
        return read_image_prompts(prompts)
    if not images:
        raise UsageError("No image is named. Give image files, folders or patterns.")
    asked = question or (prompt if answer else None)
    texts = read_prompts(prompts) if prompts is not None else [asked] if asked else []
    return list(request_texts(expand_images(images), texts))


def _write(writer: TextWriter, requests: Sequence[Request], jsonl: bool, as_json: bool) -> int:
    """Print what is written as it comes, one JSON document at the end; gives the number of texts that lack."""
    from capfilt.evaluate.streaming import write_texts

    named = _columns(requests)
    rows: list[dict[str, Any]] = []
    num_unusable = 0
    progress = open_progress() if as_json else NullProgress()  # texts that are printed as they come show it themselves
    progress.start("writing", len(requests), "text")
    for written in write_texts(writer, requests):
        num_unusable += written.text is None
        if as_json:
            rows.append(_row(written))
        else:
            _say(written, named, jsonl)
        progress.advance()
    progress.finish()
    if as_json:
        say_json(rows)
    return num_unusable


def _columns(requests: Sequence[Request]) -> tuple[bool, bool]:
    """Whether image and prompt must be printed beside a text: where there are several."""
    num_prompts = len({request.prompt for request in requests})
    return len(requests) > num_prompts or len({request.id for request in requests}) > 1, num_prompts > 1


def _row(written: Written) -> dict[str, Any]:
    row = {"image": str(written.request.id), "prompt": written.request.prompt or None, "text": written.text}
    return row if written.problem is None else {**row, "error": written.problem}


def _say(written: Written, named: tuple[bool, bool], jsonl: bool) -> None:
    """A text as it comes; what could not be used goes to standard error as well."""
    image, prompt = clean(written.request.id), clean(written.request.prompt, MAX_TEXT_CHARS)
    if written.problem is not None:
        note(f"capfilt: {image} cannot be used: {clean(written.problem, 500)}")
    if jsonl:
        say(json.dumps(_row(written), ensure_ascii=True))
    elif written.text is not None:
        parts = [part for part, shown in zip((image, prompt), named, strict=True) if shown]
        say("\t".join([*parts, clean(written.text, MAX_TEXT_CHARS)]))
