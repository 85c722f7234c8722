"""How well captions describe images: a model's, or those of a results file, against people's.

In: captioned images (`capfilt.data.annotations`) and a writer, or captions by image id. Out: CIDEr, BLEU and ROUGE-L,
and every image that is not in them, with why.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from capfilt.data.annotations import CaptionedImage, read_captioned_images
from capfilt.data.json_lists import Id
from capfilt.data.paths import AnyPath
from capfilt.data.result_files import write_caption_results
from capfilt.errors import UsageError
from capfilt.evaluate.caption_metrics import check_tokenizer, score_captions
from capfilt.evaluate.generation import (
    Generated,
    Unusable,
    check_results_path,
    refuse_nothing_written,
    write_data_set,
)
from capfilt.evaluate.streaming import Request, TextWriter
from capfilt.progress import Progress

_NO_FOLDER = "Captions are to be written, but no folder of images is named. Give --images DIR."


@dataclass(frozen=True, kw_only=True)
class CaptionEvaluation:
    """Figures of captions, and what they are of."""

    metrics: dict[str, float]
    """Times 100, as papers print them; empty where no image has a reference."""
    tokenizer: str
    """ptb, or plain, whose figures compare with no published ones."""
    comparable: bool
    num_scored: int
    """Images that have both a caption and references; the figures are of them."""
    num_images: int
    """Images of the references file."""
    without_caption: list[Id]
    """Images of which the results have no caption."""
    without_reference: list[Id]
    """Images that the references file has no caption of."""
    unknown: list[Id]
    """Ids of the results that the references file does not have."""
    unusable: list[Unusable] = field(default_factory=list)
    """Images that could not be read or captioned."""
    model: dict[str, Any] = field(default_factory=dict)
    """Model, prompt and decoding; empty for the captions of a file."""

    @property
    def exit_code(self) -> int:
        """0, or 1 where the figures are not of all images."""
        return int(bool(self.without_caption or self.without_reference or self.unknown or self.unusable))

    def line(self) -> str:
        """The summary."""
        figures = (
            ", ".join(f"{name} {value:.1f}" for name, value in self.metrics.items()) or "no references, no figures"
        )
        note = "" if self.comparable or not self.metrics else " (plain words: compare with no published figures)"
        return f"{figures}: {self.num_scored:,} of {self.num_images:,} images{note}"


def read_references(
    path: AnyPath,
    images_dir: Path | None = None,
    *,
    splits: Sequence[str] | None = None,
    generation: str | None = None,
) -> list[CaptionedImage]:
    """`read_captioned_images`; of a run those images that have a kept caption. UsageError where there are none."""
    images = read_captioned_images(path, images_dir, splits=splits, generation=generation)
    if not isinstance(path, Path) or path.is_dir():
        images = [image for image in images if image.captions]
    if not images:
        raise UsageError(f"{path} keeps no caption of any image. Lower the threshold: `capfilt select {path}`.")
    return images


def evaluate_captions(
    images: Sequence[CaptionedImage], captions: Mapping[Id, str], *, tokenizer: str = "ptb"
) -> CaptionEvaluation:
    """Score captions by image id against the captions of `images`, over the images that have both.

    Raises UsageError where no id is in both, or the tokenizer cannot be run.
    """
    known = {image.id: image.captions for image in images}
    if not known.keys() & captions.keys():
        named, expected = next(iter(captions), None), next(iter(known), None)
        raise UsageError(
            f"No image has both a caption and references: the captions are of {named!r}, …, the references of "
            f"{expected!r}, …. Give files of the same images."
        )
    scored = {key: text for key, text in captions.items() if known.get(key)}
    metrics = score_captions(scored, {key: known[key] for key in scored}, tokenizer).metrics if scored else {}
    return CaptionEvaluation(
        metrics=metrics,
        tokenizer=tokenizer,
        comparable=tokenizer == "ptb",
        num_scored=len(scored),
        num_images=len(known),
        without_caption=[key for key in known if key not in captions],
        without_reference=[key for key, texts in known.items() if not texts],
        unknown=[key for key in captions if key not in known],
    )


def caption_images(
    writer: TextWriter,
    images: Sequence[CaptionedImage],
    results: Path | None = None,
    progress: Progress | None = None,
) -> Generated:
    """Caption the images, and write COCO's results file where one is named.

    Raises UsageError where an image has no source, FingerprintMismatchError and RunLockedError as `write_all`.
    """
    requests = [Request(image.id, image.image) for image in images if image.image is not None]
    if len(requests) < len(images):
        raise UsageError(_NO_FOLDER)
    return write_data_set(writer, requests, results, write_caption_results, progress)


def check_inputs(images: Sequence[CaptionedImage], tokenizer: str = "ptb", results: Path | None = None) -> None:
    """Raises UsageError for what would fail after the captions are written; call it before a model is loaded."""
    if any(image.image is None for image in images):
        raise UsageError(_NO_FOLDER)
    check_results_path(results)
    if any(image.captions for image in images):
        check_tokenizer(tokenizer)
    elif results is None:
        raise UsageError("No image has a reference caption, so nothing can be scored. Give --save-results FILE.")


def evaluate_captioner(
    writer: TextWriter,
    images: Sequence[CaptionedImage],
    *,
    tokenizer: str = "ptb",
    results: Path | None = None,
    progress: Progress | None = None,
) -> CaptionEvaluation:
    """Caption the images and score the captions; where no image has references, the captions are only written.

    Errors as `check_inputs`, `caption_images` and `evaluate_captions`.
    """
    check_inputs(images, tokenizer, results)
    has_references = any(image.captions for image in images)
    generated = caption_images(writer, images, results, progress)
    refuse_nothing_written(generated, "images could be captioned")
    unusable = {entry.id for entry in generated.unusable}
    found = evaluate_captions(images, generated.texts, tokenizer=tokenizer)
    left = [key for key in found.without_caption if key not in unusable]
    without = found.without_reference if has_references else []
    parts = {"without_caption": left, "without_reference": without, "unusable": generated.unusable}
    return CaptionEvaluation(**{**vars(found), **parts, "model": generated.fields})
