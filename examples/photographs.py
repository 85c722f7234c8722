"""BLIP from little on a few thousand real photographs: what two cores learn in a given number of steps.

    python examples/photographs.py 'flickr8k-train-*.tar' 'flickr8k-dev-*.tar' --text-init BERT
                                   [--run runs/photographs] [--steps 1800] [--threads 2] [--smoke]

In: shards of photographs with human captions (KEY.jpg, KEY.json with "captions"), some to train on and some to judge
by, and a BERT whose tokenizer and weights the text side starts from; a small one, such as all-MiniLM-L6-v2 (6 layers of
384), suits a CPU. The image encoder starts from nothing. Out: RUN/blip, the captioner and filter that training gives,
and RUN/photographs.json: R@1, 5, 10 both ways among the photographs to judge by, each with all of its captions, by ITC
and with the best 16 ranked again by ITM; ITM's area under the curve between every photograph's own first caption and
that of another photograph drawn at random.

An interrupted training goes on from its last checkpoint; what is done is not done again.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from capfilt.curation.human_captions import write_human_manifest
from capfilt.curation.import_shards import import_shards
from capfilt.curation.scorers import ItmScorer
from capfilt.data.annotations import read_captioned_images
from capfilt.data.rundir import RunDir
from capfilt.errors import CapfiltError
from capfilt.evaluate.labelled_scores import area_under_curve
from capfilt.evaluate.pair_scores import score_pairs
from capfilt.evaluate.pictures import SourcePictures
from capfilt.evaluate.ranking import Recalls
from capfilt.evaluate.retrieval import evaluate_retrieval
from capfilt.evaluate.retrieval_models import BlipRetrieval, RetrievalOptions
from capfilt.progress import Progress, StreamProgress
from capfilt.settings import BlipTrainSettings, FilterSettings
from capfilt.train.blip import train_blip

K_TEST = 16
"""Candidates that ITM ranks again: BLIP's released code takes 128 for Flickr30K, which is an hour on two cores."""

SETTINGS = BlipTrainSettings(
    image_size_px=112, patch_size_px=16, vision_width=384, vision_depth=6, captions_per_image=2, queue_size=4096,
    dropout=0.0, random_crop=0.4, random_flip=True, optimizer="muon", beta2=0.98, autocast="auto", batch_size=64,
    learning_rate=1e-3, min_learning_rate=1e-5, save_every_steps=100, log_every_steps=25,
)  # fmt: skip
SMOKE = replace(
    SETTINGS, image_size_px=32, patch_size_px=16, vision_width=32, vision_depth=1, head_width=16, queue_size=16,
    batch_size=4, learning_rate=1e-4,
)  # fmt: skip


def import_photographs(patterns: Sequence[str], run_path: Path, progress: Progress) -> RunDir:
    """Photographs and their human captions as a run."""
    run = RunDir.create(run_path)
    print(import_shards(patterns, run, progress=progress).line())
    print(write_human_manifest(run, progress).line(), flush=True)
    return run


def measure(model_dir: Path, photographs: RunDir, progress: Progress) -> dict[str, float]:
    """R@1, 5, 10 by ITC and after ITM, in percent, and ITM's area under the curve."""
    found = [item for item in read_captioned_images(photographs.path) if item.image is not None and item.captions]
    pictures = SourcePictures([item.image for item in found if item.image is not None])
    report, _ = evaluate_retrieval(
        BlipRetrieval(str(model_dir), RetrievalOptions()), pictures, [text for item in found for text in item.captions],
        image_of_text=[number for number, item in enumerate(found) for _ in item.captions],
        k_test=min(K_TEST, len(found)), progress=progress,
    )  # fmt: skip
    assert report.itm is not None
    own = [item.captions[0] for item in found]
    shift = random.Random(0).randrange(1, len(own))
    texts = [[text, own[(number + shift) % len(own)]] for number, text in enumerate(own)]
    scores = np.array(score_pairs(ItmScorer(FilterSettings(filter_model=str(model_dir))), pictures, texts, progress))
    auc = area_under_curve(scores[:, 0], scores[:, 1])
    return {**_named("ITC", report.itc), **_named("ITM", report.itm), "ITM AUC": auc}


def _named(head: str, recalls: Recalls) -> dict[str, float]:
    ways = {"image to text": recalls.image_to_text, "text to image": recalls.text_to_image}
    return {f"{way} R@{k}, {head}": found[k] for way, found in ways.items() for k in sorted(found)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the options, those of the command line unless given; gives the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("train", help="tars to train on: a path or pattern")
    parser.add_argument("unseen", help="tars to judge by")
    parser.add_argument("--text-init", required=True, help="folder or hub id of a BERT to start from")
    parser.add_argument("--run", type=Path, default=Path("runs/photographs"), help="the run directory")
    parser.add_argument("--steps", type=int, default=1800, help="steps of the training")
    parser.add_argument("--threads", type=int, default=2, help="threads that compute")
    parser.add_argument("--smoke", action="store_true", help="a minute's rehearsal: the figures say nothing")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    progress = StreamProgress(sys.stderr)
    settings = replace(
        SMOKE if options.smoke else SETTINGS, text_init=options.text_init, max_steps=options.steps,
        warmup_steps=max(1, options.steps // 20),
    )  # fmt: skip
    try:
        train = import_photographs([options.train], options.run / "train", progress)
        unseen = import_photographs([options.unseen], options.run / "unseen", progress)
        summary = train_blip([train], settings, options.run / "blip", progress)
        figures = measure(options.run / "blip" / "filter", unseen, progress)
    except CapfiltError as error:
        print(f"photographs: {error}", file=sys.stderr)
        return error.exit_code
    record = {"steps": summary.steps, "seconds": summary.seconds, "losses": summary.last_losses, **figures}
    (options.run / "photographs.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(f"{summary.steps:,} steps in {summary.seconds:,.0f} s")
    print("\n".join(f"| {name} | {value:.3f} |" for name, value in figures.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
