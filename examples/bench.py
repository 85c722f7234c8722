"""Seconds per image of captioning, ranking and filtering, beside plain transformers, measured in one run.

    python examples/bench.py [--captioner embedded] [--filter-model embedded] [--clip-model embedded]
                             [--num-images 64] [--batch-size 16] [--threads 2]

In: names of models, as the commands take them. Out: a table; every figure is the median of three passes over
pictures of the miniature world, after one pass to warm up. "transformers" is what its documentation shows:
`generate` with ten returned sequences, and one ITM forward for each text.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers
from PIL.Image import Image

from capfilt.curate.captioner import BlipCaptioner
from capfilt.curate.scorers import ClipScorer, ItmScorer, Scorer
from capfilt.figures import picture
from capfilt.settings import EMBEDDED, CaptionSettings, FilterSettings, RankSettings
from capfilt.weights.find import find_embedded
from capfilt.world.measure import unseen_scenes

NUM_CAPTIONS = 10
NUM_FILTERED = 3
PASSES = 3


def seconds_per_image(work: Callable[[Sequence[Image]], object], images: list[Image], batch_size: int) -> float:
    """Median over the passes."""
    batches = [images[start : start + batch_size] for start in range(0, len(images), batch_size)]
    times = []
    for _ in range(PASSES + 1):
        start = time.perf_counter()
        for batch in batches:
            work(batch)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:]) / len(images)


def scoring(scorer: Scorer, texts: list[str]) -> Callable[[Sequence[Image]], object]:
    """Every image with all `texts`."""
    return lambda images: scorer.score([scorer.prepare(image) for image in images], [texts] * len(images))


def transformers_captioner(folder: str, settings: CaptionSettings) -> Callable[[Sequence[Image]], object]:
    """`generate` as transformers documents it."""
    from transformers import BlipForConditionalGeneration, BlipProcessor

    processor: Any = BlipProcessor.from_pretrained(folder)
    model: Any = BlipForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()

    @torch.inference_mode()
    def work(images: Sequence[Image]) -> object:
        inputs = processor(images=list(images), return_tensors="pt")
        return model.generate(
            **inputs, do_sample=True, top_p=settings.top_p, top_k=settings.top_k,
            max_length=settings.max_length, min_length=settings.min_length,
            num_return_sequences=settings.num_captions, repetition_penalty=settings.repetition_penalty,
        )  # fmt: skip

    return work


def transformers_filter(folder: str, texts: list[str]) -> Callable[[Sequence[Image]], object]:
    """One forward for each text of each image."""
    from transformers import BlipForImageTextRetrieval, BlipProcessor

    processor: Any = BlipProcessor.from_pretrained(folder)
    model: Any = BlipForImageTextRetrieval.from_pretrained(folder, dtype=torch.float32).eval()

    @torch.inference_mode()
    def work(images: Sequence[Image]) -> object:
        scores = []
        for text in texts:
            own = [text] * len(images)
            inputs = processor(images=list(images), text=own, return_tensors="pt", padding=True, truncation=True)
            scores.append(model(**inputs, use_itm_head=True)[0])
        return scores

    return work


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--captioner", default=EMBEDDED)
    parser.add_argument("--filter-model", default=EMBEDDED)
    parser.add_argument("--clip-model", default=EMBEDDED)
    parser.add_argument("--num-images", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    images = [picture(scene) for scene in unseen_scenes(options.num_images)]

    settings = CaptionSettings(captioner=options.captioner, num_captions=NUM_CAPTIONS)
    captioner = BlipCaptioner(settings)
    texts = captioner.caption(images[:1], ["0"])[0]
    folders = {
        kind: str(find_embedded(kind)) if name == EMBEDDED else name
        for kind, name in (("captioner", options.captioner), ("filter", options.filter_model))
    }
    ours: dict[str, Callable[[Sequence[Image]], object]] = {
        f"caption, {NUM_CAPTIONS} an image": lambda batch: captioner.caption(
            batch, [str(n) for n in range(len(batch))]
        ),
        f"rank, {NUM_CAPTIONS} texts": scoring(ClipScorer(RankSettings(clip_model=options.clip_model)), texts),
        f"filter, {NUM_FILTERED} texts": scoring(
            ItmScorer(FilterSettings(filter_model=options.filter_model)), texts[:NUM_FILTERED]
        ),
    }
    theirs = {
        f"caption, {NUM_CAPTIONS} an image": transformers_captioner(folders["captioner"], settings),
        f"filter, {NUM_FILTERED} texts": transformers_filter(folders["filter"], texts[:NUM_FILTERED]),
    }
    machine = platform.processor() or platform.machine()
    print(f"{machine}, {options.threads} threads, torch {torch.__version__}, float32")
    print(f"{options.num_images} images, batch {options.batch_size}; captioner {options.captioner}")
    print(f"{'':<24} {'capfilt s/image':>16} {'transformers':>14} {'ratio':>7}")
    for name, work in ours.items():
        own = seconds_per_image(work, images, options.batch_size)
        row = f"{name:<24} {own:>16.4f}"
        if name in theirs:
            other = seconds_per_image(theirs[name], images, options.batch_size)
            row += f" {other:>14.4f} {other / own:>7.1f}"
        print(row)


if __name__ == "__main__":
    main()
