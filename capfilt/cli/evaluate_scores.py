"""`capfilt evaluate retrieval` and `capfilt evaluate filter`: rankings and scores against what is true."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from capfilt.cli.completion import names_of_setting, one_of
from capfilt.cli.console import command, note, open_progress, say, say_json
from capfilt.cli.options import AsJson, BatchSize, Device, Dtype, Generation, References, Resizer, refuse_idle
from capfilt.data.paths import AnyPath, path_of
from capfilt.errors import UsageError
from capfilt.settings import DTYPES, FilterSettings, RankSettings
from capfilt.settings.checks import require_one_of

if TYPE_CHECKING:
    from capfilt.curation.scorers import Scorer
    from capfilt.evaluate.filter_labels import LabelledPairs
    from capfilt.evaluate.labelled_images import LabelledImageText
    from capfilt.evaluate.retrieval import ScoredPairs

ImagesDir = Annotated[
    Path | None, typer.Option("--images", metavar="DIR", help="Folder of the images.", show_default=False)
]
FirstToken = Annotated[
    str,
    typer.Option(
        help="ITM: enc ([ENC], as trained) or cls (as transformers feeds it).",
        autocompletion=names_of_setting(FilterSettings, "first_token"),
    ),
]


def retrieval(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="BLIP filter, ALBEF or stage-1 model: folder, hub id, original .pth.")
    ],
    references: References,
    images: ImagesDir = None,
    split: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Split of a Karpathy file, also several. Unset: test."),
    ] = None,
    generation: Generation = None,
    k_test: Annotated[
        int, typer.Option(min=0, help="Best by ITC that ITM ranks again (COCO: 256, Flickr30K: 128); 0: ITC alone.")
    ] = 256,
    first_token: FirstToken = "enc",
    resizer: Annotated[
        str | None,
        typer.Option(
            help="torchvision or pillow. Unset: pillow for stage 1, else torchvision.",
            show_default=False,
            autocompletion=names_of_setting(FilterSettings, "resizer"),
        ),
    ] = None,
    save_scores: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write the candidates' ITC and ITM scores as Parquet.", show_default=False),
    ] = None,
    batch_size: BatchSize = None,
    device: Device = "auto",
    dtype: Annotated[
        str,
        typer.Option(
            help="float32, bfloat16, float16 or auto; reduced precision may swap close candidates.",
            autocompletion=names_of_setting(FilterSettings, "dtype"),
        ),
    ] = "float32",
    as_json: AsJson = False,
) -> None:
    """Recall of images and texts: R@1, R@5, R@10 both ways, by ITC alone and after ITM."""
    require_one_of("dtype", dtype, DTYPES)
    FilterSettings(first_token=first_token, device=device, resizer=resizer or FilterSettings.resizer)  # checks them
    if save_scores is not None and not k_test:
        raise UsageError("--save-scores writes the candidates of ITM, and --k-test 0 has none. Give --k-test 256.")
    if save_scores is not None:
        _check_scores_path(save_scores)
    from capfilt.data.annotations import read_captioned_images
    from capfilt.data.image_sources import ShardImage, refuse_missing
    from capfilt.evaluate.pictures import SourcePictures
    from capfilt.evaluate.retrieval import evaluate_retrieval
    from capfilt.evaluate.retrieval_models import RetrievalOptions, load_retrieval_model
    from capfilt.evaluate.scores_view import retrieval_lines
    from capfilt.progress import speaks_unicode

    found = read_captioned_images(references, images, splits=split, generation=generation)
    sources = [item.image for item in found if item.image is not None]
    if len(sources) < len(found):
        raise UsageError(f"{references} names images and does not hold them. Give their folder: --images DIR.")
    refuse_missing(sources)
    owners = [number for number, item in enumerate(found) for _ in item.captions]
    texts = [caption for item in found for caption in item.captions]
    options = RetrievalOptions(
        device=device, dtype=dtype, resizer=resizer, first_token=first_token, image_batch_size=batch_size
    )
    report, scored = evaluate_retrieval(
        load_retrieval_model(model, options), SourcePictures(sources), texts,
        image_of_text=owners, k_test=k_test, progress=open_progress(),
    )  # fmt: skip
    if save_scores is not None and scored is not None:
        ids = [item.image.key if isinstance(item.image, ShardImage) else str(item.id) for item in found]
        _write_scores(save_scores, scored, ids, texts)
        note(f"Scores of {len(scored.logits):,} candidates: {save_scores}")
    if as_json:
        say_json(report)
        return
    for line in retrieval_lines(report, model, plain=not speaks_unicode(sys.stdout)):
        say(line)


def _check_scores_path(path: Path) -> None:
    """UsageError where scores cannot be written, or would take the place of another file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not path.absolute().parent.is_dir():
        raise UsageError(f"{path.parent} is no folder. Make it first: --save-scores writes a file there.")
    if not path.exists():
        return
    try:
        is_scores = {"itc_cosine", "itm_logit"} <= set(pq.read_schema(path).names)
    except (OSError, pa.ArrowException):
        is_scores = False
    if not is_scores:
        raise UsageError(f"{path} is there and holds no retrieval scores; it would be lost. Name another file.")


def _write_scores(path: Path, scored: ScoredPairs, ids: list[str], texts: list[str]) -> None:
    """A row per candidate: the image's id, the text and its number, cosine and match logit."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table(
        {
            "image": pa.DictionaryArray.from_arrays(pa.array(scored.images, pa.int32()), pa.array(ids, pa.string())),
            "text_number": pa.array(scored.texts, pa.int32()),
            "text": pa.DictionaryArray.from_arrays(pa.array(scored.texts, pa.int32()), pa.array(texts, pa.string())),
            "itc_cosine": pa.array(scored.cosines),
            "itm_logit": pa.array(scored.logits),
        }
    )
    pq.write_table(table, path)


def filter_(
    source: Annotated[
        str, typer.Argument(metavar="RUN|MODEL", help="A run whose scores are measured, or a model that scores pairs.")
    ],
    labels: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Of a RUN's pairs: key, label (0 or 1), caption_index or text; Parquet, CSV, TSV, JSONL.",
            show_default=False,
        ),
    ] = None,
    world: Annotated[bool, typer.Option("--world", help="A RUN of the miniature world against its truth.")] = False,
    pairs: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="For a MODEL: image (or key, with --run), text, label, source.", show_default=False
        ),
    ] = None,
    run: Annotated[
        AnyPath | None,
        typer.Option(metavar="RUN", help="The run whose keys --pairs names.", show_default=False, parser=path_of),
    ] = None,
    judgments: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="For a MODEL: Flickr8k's expert judgments, with --captions.", show_default=False
        ),
    ] = None,
    captions: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Flickr8k's token file, for --judgments.", show_default=False)
    ] = None,
    images: ImagesDir = None,
    score: Annotated[
        str, typer.Option(help="itm (a BLIP filter's) or clip.", autocompletion=one_of("itm", "clip"))
    ] = "itm",
    threshold: Annotated[
        float | None, typer.Option(help="Lowest score kept. Unset: 0.5 for itm, none for clip.", show_default=False)
    ] = None,
    target_precision: Annotated[
        float, typer.Option(help="Also the threshold that keeps most at this precision.")
    ] = 0.95,
    bins: Annotated[int, typer.Option(min=1, help="Bins of the calibration.")] = 10,
    allow_unjoined: Annotated[
        bool, typer.Option("--allow-unjoined", help="Leave out labels of pairs that the run does not have.")
    ] = False,
    generation: Generation = None,
    clip_weights: Annotated[
        str | None, typer.Option(metavar="TAG|FILE", help="With a CLIP as MODEL.", show_default=False)
    ] = None,
    first_token: FirstToken = FilterSettings.first_token,
    resizer: Resizer = FilterSettings.resizer,
    batch_size: BatchSize = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: AsJson = False,
    *,
    context: typer.Context,
) -> None:
    """Scores against labels: precision, recall, AUC, calibration, and what other thresholds would keep."""
    given = {"--labels": labels, "--world": world or None, "--pairs": pairs, "--judgments": judgments}
    chosen = [name for name, value in given.items() if value is not None]
    if len(chosen) != 1:
        raise UsageError(
            f"Given: {', '.join(chosen) or 'nothing to measure against'}; expected one of --labels FILE or --world "
            "(of a RUN), --pairs FILE or --judgments FILE (for a MODEL)."
        )
    refuse_idle(context, sorted(_OF_ONE_WAY - set(_USED_WITH[chosen[0]])), f"with {chosen[0]}")
    from capfilt.evaluate.filter_report import FilterOptions, report_filter, score_judged, score_labelled
    from capfilt.evaluate.scores_view import filter_lines
    from capfilt.progress import speaks_unicode

    options = FilterOptions(score=score, threshold=threshold, target_precision=target_precision, num_bins=bins)

    def load_scorer() -> Scorer:
        from capfilt.curation.scorers import SCORERS

        common = {"batch_size": batch_size, "device": device, "dtype": dtype}
        if score == "clip":
            return SCORERS["clip"](RankSettings(clip_model=source, clip_weights=clip_weights, **common))
        return SCORERS["itm"](FilterSettings(filter_model=source, first_token=first_token, resizer=resizer, **common))

    found_judgments = None
    if pairs is not None:
        labelled_texts = _read_pairs(pairs, images, run)
        found = score_labelled(load_scorer(), labelled_texts, open_progress())
    elif judgments is not None:
        from capfilt.data.annotations import read_judgments

        if captions is None or images is None:
            raise UsageError("--judgments needs the texts and the images. Add --captions TOKENFILE --images DIR.")
        judged = read_judgments(judgments, captions, images)
        found, found_judgments = score_judged(load_scorer(), judged, open_progress())
    else:
        found = _join(source, labels, generation, score, allow_unjoined=allow_unjoined)
    report = report_filter(found, options, found_judgments)
    if as_json:
        say_json(report)
        return
    for line in filter_lines(report, plain=not speaks_unicode(sys.stdout)):
        say(line)
    if found_judgments is None and pairs is None:
        next_command = command("select", source, "--threshold", "T", "--keep", "K", generation=generation)
        note(f"Next: {next_command}   (another choice, from the stored scores)")


_OF_A_SCORER = ("clip_weights", "first_token", "resizer", "batch_size", "device", "dtype")
_USED_WITH = {
    "--labels": ("generation", "allow_unjoined"),
    "--world": ("generation",),
    "--pairs": ("run", "images", *_OF_A_SCORER),
    "--judgments": ("captions", "images", *_OF_A_SCORER),
}
"""Way to measure → the parameters that it asks; others that belong to some way do nothing."""
_OF_ONE_WAY = {name for names in _USED_WITH.values() for name in names}


def _read_pairs(pairs: Path, images: Path | None, run: AnyPath | None) -> list[LabelledImageText]:
    """Labelled pairs of a file; its images lie below --images, or beside it."""
    from capfilt.data.labels import read_labelled_texts
    from capfilt.data.rundir import RunDir
    from capfilt.evaluate.labelled_images import locate_images

    opened = None if run is None else RunDir.open(run)
    return locate_images(read_labelled_texts(pairs), images or pairs.parent, opened)


def _join(run: str, labels: Path | None, generation: str | None, score: str, *, allow_unjoined: bool) -> LabelledPairs:
    """A run's scores beside the labels of a file, or beside the world's truth."""
    from capfilt.data.labels import read_pair_labels
    from capfilt.data.rundir import RunDir
    from capfilt.evaluate.filter_labels import join_labels, label_by_world

    opened = RunDir.open(run, generation)
    if labels is None:
        return label_by_world(opened, score)
    return join_labels(opened, read_pair_labels(labels), score, allow_unjoined=allow_unjoined)
