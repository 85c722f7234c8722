"""What models reach on scenes of the miniature world that they never saw, judged by its truth.

In: folders of models. Out: figures by name. The pictures are painted at many sizes and encoded as a web site
would serve them; the models are run as `capfilt caption`, `rank` and `filter` run them.
"""

from __future__ import annotations

import io
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from capfilt.curation.captioner import BlipCaptioner
from capfilt.curation.scorers import ClipScorer, ItmScorer, Scorer
from capfilt.evaluate.caption_metrics import score_captions
from capfilt.evaluate.labelled_scores import area_under_curve
from capfilt.evaluate.ranking import match_ranks, recall_at
from capfilt.evaluate.retrieval import evaluate_retrieval
from capfilt.evaluate.retrieval_models import RetrievalOptions, load_retrieval_model
from capfilt.settings import CaptionSettings, FilterSettings, RankSettings
from capfilt.train.generate import Generator
from capfilt.train.llm import continue_texts
from capfilt.world.language import caption as true_caption
from capfilt.world.language import change_one_fact, full_caption, judge
from capfilt.world.measure import has_held_out, share_true, unseen_scenes, wrong_facts
from capfilt.world.scenes import Scene
from capfilt.world.texts_for_llms import draw_probes, share_of_right_answers
from capfilt.world.training_run import encode_picture

BATCH_SIZE = 50
NUM_REFERENCES = 5
"""True captions of each scene that CIDEr compares with, as many as COCO has."""

Figures = dict[str, float]


def picture(scene: Scene) -> Image.Image:
    """The picture of an unseen scene, of a size and format drawn from its seed."""
    encoded, _, _, _ = encode_picture(scene, np.random.default_rng([17, scene.seed]))
    return Image.open(io.BytesIO(encoded)).convert("RGB")


def measure_captioner(folder: Path, num_scenes: int) -> Figures:
    """Shares of true captions: greedy (also on held-out pairs of colour and kind) and nucleus, and diversity."""
    scenes = unseen_scenes(num_scenes)
    greedy = [texts[0] for texts in _write(folder, scenes, CaptionSettings(decoding="greedy", num_captions=1))]
    ten = _write(folder, scenes, CaptionSettings())
    flat = [(text, scene) for texts, scene in zip(ten, scenes, strict=True) for text in texts]
    held_out = [number for number, scene in enumerate(scenes) if has_held_out(scene)]
    figures = {
        "greedy captions true": share_true(greedy, scenes),
        "greedy captions true, held-out pairs": share_true(
            [greedy[n] for n in held_out], [scenes[n] for n in held_out]
        ),
        "nucleus captions true": share_true([text for text, _ in flat], [scene for _, scene in flat]),
        "distinct captions of ten, median": float(np.median([len(set(texts)) for texts in ten])),
    }
    return figures | {f"greedy wrong in {fact}": share for fact, share in wrong_facts(greedy, scenes).items()}


def measure_greedy(folder: Path, num_scenes: int) -> Figures:
    """Share of true greedy captions and, where the extra `eval` is installed, their CIDEr on plain words (1 is 100)."""
    scenes = unseen_scenes(num_scenes)
    settings = CaptionSettings(decoding="greedy", num_captions=1, dtype="float32")
    written = [texts[0] for texts in _write(folder, scenes, settings)]
    figures = {"captions true": share_true(written, scenes)}
    if find_spec("pycocoevalcap") is not None:
        rng = np.random.default_rng(31)
        references = [[true_caption(scene, rng) for _ in range(NUM_REFERENCES)] for scene in scenes]
        scores = score_captions(dict(enumerate(written)), dict(enumerate(references)), "plain")
        figures["CIDEr"] = scores.metrics["CIDEr"] / 100
    return figures


def measure_retrieval(folder: Path, num_scenes: int, k_test: int) -> Figures:
    """R@1 both ways among captions that state every fact: by ITC, and with the k best by ITM; any retrieval model."""
    scenes = unseen_scenes(num_scenes)
    rng = np.random.default_rng(29)
    texts = [full_caption(scene, rng) for scene in scenes]
    model = load_retrieval_model(str(folder), RetrievalOptions())
    report, _ = evaluate_retrieval(model, [picture(scene) for scene in scenes], texts, k_test=k_test)
    assert report.itm is not None
    figures: Figures = {}
    for head, recalls in (("ITC", report.itc), ("ITM", report.itm)):
        figures[f"image to text R@1, {head}"] = recalls.image_to_text[1] / 100
        figures[f"text to image R@1, {head}"] = recalls.text_to_image[1] / 100
    return figures


def measure_filter(folder: Path, num_scenes: int) -> Figures:
    """ITM's area under the curve: true captions against other images' captions, and against one changed fact."""
    scenes = unseen_scenes(num_scenes)
    rng = np.random.default_rng(19)
    true = [true_caption(scene, rng) for scene in scenes]
    others = [true[(number + 1) % len(true)] for number in range(len(true))]
    changed = [change_one_fact(scene, rng) for scene in scenes]
    scorer = ItmScorer(FilterSettings(filter_model=str(folder)))
    texts = [list(three) for three in zip(true, others, [text for text, _ in changed], strict=True)]
    scores = np.array(_score(scorer, scenes, texts))
    figures = {
        "AUC against other images' captions": area_under_curve(scores[:, 0], scores[:, 1]),
        "AUC against one changed fact": area_under_curve(scores[:, 0], scores[:, 2]),
        "true captions kept at 0.5": float((scores[:, 0] >= 0.5).mean()),
        "captions with one changed fact dropped at 0.5": float((scores[:, 2] < 0.5).mean()),
    }
    for fact in sorted({fact for _, fact in changed}):
        rows = [number for number, (_, changed_fact) in enumerate(changed) if changed_fact == fact]
        figures[f"AUC against a changed {fact}"] = area_under_curve(scores[:, 0], scores[rows, 2])
    return figures


def measure_clip(folder: Path, num_scenes: int) -> Figures:
    """Recall both ways among unseen scenes with captions that state every fact."""
    scenes = unseen_scenes(num_scenes)
    rng = np.random.default_rng(23)
    texts = [full_caption(scene, rng) for scene in scenes]
    scorer = ClipScorer(RankSettings(clip_model=str(folder)))
    image_text = torch.tensor(_score(scorer, scenes, [texts] * len(scenes)))
    matches = torch.eye(len(scenes), dtype=torch.bool)
    ways = {"image to text": match_ranks(image_text, matches), "text to image": match_ranks(image_text.T, matches)}
    return {f"{way} R@{k}": recall_at(ranks, k) / 100 for k in (1, 5) for way, ranks in ways.items()}


def measure_llm(folder: Path, num_scenes: int) -> Figures:
    """Shares of true captions and right answers after a preamble that states the scene in words."""
    scenes = unseen_scenes(num_scenes)
    captions = continue_texts(folder, draw_probes(scenes, questions=False))
    probes = draw_probes(scenes, questions=True)
    return {
        "captions true after a preamble": share_true(captions, scenes),
        "answers right after a preamble": share_of_right_answers(continue_texts(folder, probes), probes),
    }


def measure_blip2(generator: Generator, scenes: list[Scene], *, with_questions: bool = False) -> Figures:
    """Share of true captions that a BLIP-2 writes and, where asked for, of right answers it gives."""
    pictures = [picture(scene) for scene in scenes]
    figures = {"captions_true": share_true(generator.generate(pictures), scenes)}
    if with_questions:
        probes = draw_probes(scenes, questions=True)
        answers = generator.answer(pictures, [probe.question for probe in probes])
        figures["answers_right"] = share_of_right_answers(answers, probes)
    return figures


def blip2_examples(generator: Generator, scenes: list[Scene]) -> list[dict[str, Any]]:
    """For each scene what a BLIP-2 writes of it, whether that is true, and its answer to a question."""
    pictures, probes = [picture(scene) for scene in scenes], draw_probes(scenes, questions=True)
    captions = generator.generate(pictures)
    answers = generator.answer(pictures, [probe.question for probe in probes])
    return [
        {
            "caption": caption,
            "is_true": judge(caption, scene).is_true,
            "question": probe.question,
            "answer": answer,
            "right_answer": probe.text,
        }
        for scene, probe, caption, answer in zip(scenes, probes, captions, answers, strict=True)
    ]


def _write(folder: Path, scenes: list[Scene], settings: CaptionSettings) -> list[list[str]]:
    captioner = BlipCaptioner(replace(settings, captioner=str(folder), max_length=28))
    written: list[list[str]] = []
    for start in range(0, len(scenes), BATCH_SIZE):
        batch = scenes[start : start + BATCH_SIZE]
        written += captioner.caption([picture(scene) for scene in batch], [str(scene.seed) for scene in batch])
    return written


def _score(scorer: Scorer, scenes: list[Scene], texts: list[list[str]]) -> list[list[float]]:
    scores: list[list[float]] = []
    for start in range(0, len(scenes), BATCH_SIZE):
        images = [scorer.prepare(picture(scene)) for scene in scenes[start : start + BATCH_SIZE]]
        scores += scorer.score(images, texts[start : start + BATCH_SIZE])
    return scores
