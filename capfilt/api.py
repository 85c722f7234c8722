"""The parts for programs: captioner, ranker and filter on pictures, a recipe on a run, its manifest and its pairs.

In: pictures (PIL's, or files) and texts, or the name of a run. Out: plain lists, Arrow tables, a torch dataset.
`capfilt` itself has these names, and imports them when they are asked for.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from capfilt.curation.captioner import BlipCaptioner
from capfilt.curation.scorers import ClipScorer, ItmScorer, Scorer
from capfilt.curation.selection import RankedCaption, rank_captions
from capfilt.data.images import ImageRefused, decode_image, upright_rgb
from capfilt.data.manifest import read_manifest
from capfilt.data.paths import path_of
from capfilt.engines.base import Engine
from capfilt.errors import CapfiltError, UsageError
from capfilt.pipeline import StepResult, run_dir_of, run_recipe
from capfilt.progress import Progress
from capfilt.recipes import Recipe, SourceSettings, read_recipe
from capfilt.settings import CaptionSettings, FilterSettings, RankSettings
from capfilt.train.curated import CuratedDataset
from capfilt.weights.devices import in_parts

__all__ = ["Captioner", "CuratedDataset", "Filter", "RankedCaption", "Ranker", "curate", "read_manifest"]

Picture = Image.Image | str | Path
_NUM_DECODERS = 4


class Captioner:
    """Synthetic captions by a BLIP captioner (BLIP §3.1): ten of each picture by nucleus sampling, unless told other.

    Example:
        captions = Captioner("Salesforce/blip-image-captioning-large")(["photo.jpg"])
    """

    def __init__(self, captioner: str, **settings: Any) -> None:
        """Load a model, as `capfilt caption --captioner` does; `settings` are those of `CaptionSettings`.

        Raises UsageError where it cannot be had or a setting's value cannot be, TypeError for one that there is not.
        """
        self.settings = CaptionSettings(captioner=captioner, **settings)
        self._model = BlipCaptioner(self.settings)

    def __call__(self, pictures: Sequence[Picture], keys: Sequence[str] | None = None) -> list[list[str]]:
        """Captions of each picture, the prompt left out.

        They are a function of seed, key and picture, whatever else is in the batch. Without `keys`, as samples of a run
        have them, the picture's own content is its key.

        Raises UsageError for a file that is no picture, CapfiltError where the model's numbers are not finite.
        """
        if keys is not None and len(keys) != len(pictures):
            raise UsageError(f"There are {len(keys)} keys for {len(pictures)} pictures; expected one each.")
        found: list[list[str]] = []
        for start, batch in _batches(pictures, self._model.batch_size):
            own = [_digest(image) for image in batch] if keys is None else keys[start : start + len(batch)]

            def write(part: slice, batch: list[Image.Image] = batch, own: Sequence[str] = own) -> list[list[str]]:
                return self._model.caption(batch[part], own[part])

            found += [captions for part in in_parts(write, 0, len(batch)) for captions in part]
        if not all(found):
            raise CapfiltError(
                f"The captioner {self.settings.captioner} gives numbers that are not finite. Try dtype='float32'; "
                "where that does not help, its weights are damaged."
            )
        return found


class _Scores:
    """Scores of pictures with texts; a picture is encoded once for all of its own."""

    _model: Scorer

    def scores(self, pictures: Sequence[Picture], texts: Sequence[Sequence[str]]) -> list[list[float]]:
        """A score for each text of each picture, higher is better.

        Raises UsageError for a file that is no picture, CapfiltError where a score is no number.
        """
        if isinstance(texts, str) or any(isinstance(own, str) for own in texts):
            raise UsageError("A picture has a text instead of a list of texts. Give [[text, …], …], a list for each.")
        if len(texts) != len(pictures):
            raise UsageError(
                f"Lists of texts: {len(texts)}, pictures: {len(pictures)}; expected a list for each picture."
            )
        found: list[list[float]] = []
        for start, batch in _batches(pictures, self._model.batch_size):
            prepared, own = [self._model.prepare(image) for image in batch], texts[start : start + len(batch)]

            def score(part: slice, prepared: Any = prepared, own: Any = own) -> list[list[float]]:
                return self._model.score(prepared[part], own[part])

            found += [scores for part in in_parts(score, 0, len(batch)) for scores in part]
        if not all(math.isfinite(score) for scores in found for score in scores):
            raise CapfiltError("A score is no number. Try dtype='float32'; else the model's weights are damaged.")
        return found


class Ranker(_Scores):
    """CLIP similarity of pictures and texts, and the best of them (BLIP-2 §3.4): any open_clip model.

    Example:
        best = Ranker(keep=2).best(["photo.jpg"], captions)
    """

    def __init__(self, clip_model: str = RankSettings.clip_model, **settings: Any) -> None:
        """Load a model, as `capfilt rank --clip-model` does; `settings` are those of `RankSettings`.

        Raises UsageError where it cannot be had or a setting's value cannot be, TypeError for one that there is not.
        """
        self.settings = RankSettings(clip_model=clip_model, **settings)
        self._model = ClipScorer(self.settings)

    def __call__(self, pictures: Sequence[Picture], texts: Sequence[Sequence[str]]) -> list[list[RankedCaption]]:
        """The texts of each picture in their order, with cosine similarity in [-1, 1], and rank, 1 the best.

        A repeated text has no rank but `duplicate_of`, as the stage `clip` of a run has them.
        """
        scored = self.scores(pictures, texts)
        return [
            rank_captions([(n, *pair) for n, pair in enumerate(zip(own, scores, strict=True))], include_web=True)
            for own, scores in zip(texts, scored, strict=True)
        ]

    def best(self, pictures: Sequence[Picture], texts: Sequence[Sequence[str]]) -> list[list[str]]:
        """The `keep` best different texts of each picture, the best first."""
        return [
            [caption.text for caption in sorted(own, key=lambda one: one.rank or 0) if 0 < (caption.rank or 0) <= keep]
            for keep, own in ((self.settings.keep, own) for own in self(pictures, texts))
        ]


class Filter(_Scores):
    """Probability in [0, 1] that a text describes a picture, by BLIP's ITM head (BLIP §3.3). It drops nothing.

    Example:
        scores = Filter("Salesforce/blip-itm-large-coco")(["photo.jpg"], [["a dog", "a cat"]])
    """

    def __init__(self, filter_model: str, **settings: Any) -> None:
        """Load a model, as `capfilt filter --filter-model` does; `settings` are those of `FilterSettings`.

        Raises UsageError where it cannot be had or a setting's value cannot be, TypeError for one that there is not.
        """
        self.settings = FilterSettings(filter_model=filter_model, **settings)
        self._model = ItmScorer(self.settings)

    def __call__(self, pictures: Sequence[Picture], texts: Sequence[Sequence[str]]) -> list[list[float]]:
        """A probability for each text of each picture. Errors as `scores`."""
        return self.scores(pictures, texts)


def curate(
    recipe: str | Recipe = "capfilt",
    run: str | Path | None = None,
    *,
    table: str | None = None,
    tars: Sequence[str] = (),
    generation: str | None = None,
    trainings: bool = False,
    progress: Progress | None = None,
    engine: Engine | None = None,
) -> list[StepResult]:
    """Do what a recipe says to a run, as `capfilt run` does; what is done is not done again.

    Args:
        recipe: a file, the name of a bundled recipe, or one that was read (`dataclasses.replace` changes it).
        run: the run; unset, the recipe's own.
        table: a URL + text table in place of the recipe's source.
        tars: WebDataset tars in place of the recipe's source.
        trainings: do the recipe's trainings too.

    Gives each step with its summary. Raises what the steps raise.
    """
    chosen = recipe if isinstance(recipe, Recipe) else read_recipe(recipe)
    if table is not None or tars:
        chosen = replace(chosen, source=SourceSettings(table=table, tars=tuple(tars)))
    path = run_dir_of(chosen, None if run is None else path_of(str(run)))
    steps = run_recipe(chosen, path, generation=generation, curate_only=not trainings, progress=progress, engine=engine)
    return list(steps)


def _batches(pictures: Sequence[Picture], size: int) -> Iterator[tuple[int, list[Image.Image]]]:
    """(number of the first, RGB pictures) of each batch."""
    if isinstance(pictures, str | Path | Image.Image):
        raise UsageError("One picture was given; expected a list of pictures. Give [picture].")
    with ThreadPoolExecutor(_NUM_DECODERS, thread_name_prefix="decode") as pool:
        for start in range(0, len(pictures), size):
            yield start, list(pool.map(_rgb, pictures[start : start + size]))


def _rgb(picture: Picture) -> Image.Image:
    if not isinstance(picture, Image.Image | str | os.PathLike):
        raise UsageError(
            f"A picture is of the type {type(picture).__name__}; expected one of PIL's, or the name of a file. "
            "PIL.Image.fromarray makes one of an array."
        )
    try:
        if isinstance(picture, Image.Image):
            return upright_rgb(picture)
        return decode_image(Path(picture).read_bytes())
    except (ImageRefused, OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise UsageError(f"The picture {picture} cannot be used ({reason}). Mend it, or leave it out.") from None


def _digest(image: Image.Image) -> str:
    return hashlib.sha256(repr(image.size).encode() + image.tobytes()).hexdigest()
