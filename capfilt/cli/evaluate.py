"""`capfilt evaluate …`: how good models are, on the field's data sets and with its metrics."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from capfilt.cli import evaluate_scores
from capfilt.cli.commands import CapfiltTyper
from capfilt.cli.completion import one_of
from capfilt.cli.console import clean, note, open_progress, say, say_json
from capfilt.cli.options import (
    AsJson,
    Device,
    Dtype,
    Generation,
    LengthPenalty,
    MaxNewTokens,
    MinNewTokens,
    NumBeams,
    References,
    WriterBatchSize,
    WriterImageEncoder,
    WriterLlm,
    refuse_idle,
    settings_from,
)
from capfilt.errors import UsageError
from capfilt.settings import GenerationSettings

if TYPE_CHECKING:
    from capfilt.evaluate.captions import CaptionEvaluation
    from capfilt.evaluate.vqa import VqaEvaluation

MAX_SHOWN = 10

app = CapfiltTyper(name="evaluate", help="How good models are: captions, answers, retrieval, scores.")

Images = Annotated[Path | None, typer.Option("--images", metavar="DIR", help="Folder of the images.")]
SaveResults = Annotated[
    Path | None,
    typer.Option(
        "--save-results", metavar="FILE", help="Keep what the model writes, in the results form of COCO or VQA."
    ),
]


@app.command("captions")
def captions(
    references: References,
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="Stage-2 model or BLIP captioner: folder, hub id or .pth.")
    ] = None,
    results: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Score the captions of a COCO results file instead of a model's."),
    ] = None,
    images: Images = None,
    split: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Split of a Karpathy file, also several. Unset: test.")
    ] = None,
    tokenizer: Annotated[
        str,
        typer.Option(
            help="ptb (the field's, in Java) or plain (its figures compare with no published ones).",
            autocompletion=one_of("ptb", "plain"),
        ),
    ] = "ptb",
    save_results: SaveResults = None,
    prompt: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help='Text the captions continue. Unset: "a photo of", or the captioner\'s own.'),
    ] = None,
    num_beams: NumBeams = None,
    min_new_tokens: MinNewTokens = None,
    max_new_tokens: MaxNewTokens = None,
    length_penalty: LengthPenalty = None,
    batch_size: WriterBatchSize = None,
    llm: WriterLlm = GenerationSettings.llm,
    image_encoder: WriterImageEncoder = GenerationSettings.image_encoder,
    device: Device = GenerationSettings.device,
    dtype: Dtype = GenerationSettings.dtype,
    generation: Generation = None,
    as_json: AsJson = False,
    *,
    context: typer.Context,
) -> None:
    """CIDEr, BLEU-1 to 4 and ROUGE-L of a model's captions, or of a results file's."""
    settings = settings_from(GenerationSettings, locals())
    _check_one(model, results, save_results)
    if results is not None:
        refuse_idle(context, _OF_A_MODEL, "with --results, where no model writes")
    from capfilt.data.result_files import read_caption_results
    from capfilt.evaluate.captions import check_inputs, evaluate_captioner, evaluate_captions, read_references

    found = read_references(references, images, splits=split, generation=generation)
    if results is not None:
        evaluation = evaluate_captions(found, read_caption_results(results), tokenizer=tokenizer)
    else:
        check_inputs(found, tokenizer, save_results)
        writer = _load_writer(model, "caption", settings)
        evaluation = evaluate_captioner(
            writer, found, tokenizer=tokenizer, results=save_results, progress=open_progress()
        )
    _say(evaluation, evaluation.metrics, ["without_caption", "without_reference", "unknown"], as_json)


@app.command("vqa")
def vqa(
    questions: Annotated[Path, typer.Option(metavar="FILE", help="VQA questions JSON.", show_default=False)],
    model: Annotated[str | None, typer.Argument(metavar="MODEL", help="Stage-2 model: folder, hub id or .pth.")] = None,
    annotations: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="VQA annotations JSON: people's answers. Unset: answers are only saved."),
    ] = None,
    results: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Score the answers of a VQA results file instead of a model's.")
    ] = None,
    images: Images = None,
    save_results: SaveResults = None,
    prompt: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT", help='Frame with {} for the question. Unset: "Question: {} Answer:", T5: "… Short answer:".'
        ),
    ] = None,
    num_beams: NumBeams = None,
    min_new_tokens: MinNewTokens = None,
    max_new_tokens: MaxNewTokens = None,
    length_penalty: LengthPenalty = None,
    batch_size: WriterBatchSize = None,
    llm: WriterLlm = GenerationSettings.llm,
    image_encoder: WriterImageEncoder = GenerationSettings.image_encoder,
    device: Device = GenerationSettings.device,
    dtype: Dtype = GenerationSettings.dtype,
    as_json: AsJson = False,
    *,
    context: typer.Context,
) -> None:
    """VQA accuracy of a model's answers, or of a results file's: overall, by type of answer and question."""
    settings = settings_from(GenerationSettings, locals())
    _check_one(model, results, save_results)
    if results is not None:
        refuse_idle(context, _OF_A_MODEL, "with --results, where no model writes")
    from capfilt.data.questions import read_questions
    from capfilt.data.result_files import read_answer_results
    from capfilt.evaluate.vqa import check_inputs, evaluate_answerer, evaluate_answers

    found = read_questions(questions, annotations, images)
    if results is not None:
        evaluation = evaluate_answers(found, read_answer_results(results))
    else:
        check_inputs(found, save_results)
        writer = _load_writer(model, "answer", settings)
        evaluation = evaluate_answerer(writer, found, results=save_results, progress=open_progress())
    figures = {} if evaluation.accuracy is None else {"accuracy": evaluation.accuracy, **evaluation.by_answer_type}
    _say(evaluation, figures, ["without_answer", "without_annotation", "unknown"], as_json)


_OF_A_MODEL = (
    "prompt", "num_beams", "min_new_tokens", "max_new_tokens", "length_penalty", "batch_size", "llm", "image_encoder",
    "device", "dtype",
)  # fmt: skip
"""Options that a model is told by."""


def _check_one(model: str | None, results: Path | None, save_results: Path | None) -> None:
    if (model is None) == (results is None):
        raise UsageError("Give either a MODEL or --results FILE, whose texts are scored.")
    if results is not None and save_results is not None:
        raise UsageError("--save-results keeps what a MODEL writes; with --results there is nothing to keep.")


def _load_writer(model: str | None, task: Any, settings: GenerationSettings) -> Any:
    from capfilt.evaluate.writers import load_writer

    return load_writer(model or "", task, settings)


def _say(
    evaluation: CaptionEvaluation | VqaEvaluation, figures: dict[str, float], lists: Sequence[str], as_json: bool
) -> None:
    """The figures, what is not in them, and the exit code."""
    if as_json:
        say_json({**vars(evaluation), "complete": evaluation.exit_code == 0})
        raise typer.Exit(evaluation.exit_code)
    for name, value in figures.items():
        say(f"{clean(name):<10}  {value:6.2f}")
    for entry in evaluation.unusable[:MAX_SHOWN]:
        note(f"unusable  {clean(entry.image)}: {clean(entry.reason, 500)}")
    if len(evaluation.unusable) > MAX_SHOWN:
        note(f"unusable  and {len(evaluation.unusable) - MAX_SHOWN:,} more; --json lists all")
    for name in lists:
        if ids := getattr(evaluation, name):
            first = ", ".join(clean(key) for key in ids[:MAX_SHOWN])
            note(f"{name.replace('_', ' ')}  {len(ids):,}: {first}{', …' if len(ids) > MAX_SHOWN else ''}")
    say(clean(evaluation.line(), 1000))
    raise typer.Exit(evaluation.exit_code)


app.command("retrieval")(evaluate_scores.retrieval)
app.command("filter")(evaluate_scores.filter_)
