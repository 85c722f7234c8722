"""Questions about scenes of the miniature world, in VQA's files: what `capfilt train blip2-vqa` and `capfilt evaluate
vqa` read.

In: seeds and a folder. Out: questions.json, annotations.json and images/. Every question has one right answer, which
all ten people give. Nothing is drawn but from the seeds: the same files every time.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from capfilt.data.questions import NUM_ANSWERS
from capfilt.progress import NullProgress, Progress
from capfilt.world.language import question
from capfilt.world.lexicon import COUNT_WORDS
from capfilt.world.scenes import draw_scene
from capfilt.world.training_run import encode_picture

QUESTIONS_FILE, ANNOTATIONS_FILE, IMAGES_DIR = "questions.json", "annotations.json", "images"


def write_world_questions(
    folder: Path,
    num_scenes: int,
    *,
    first_seed: int = 0,
    split: str = "train",
    questions_per_scene: int = 3,
    progress: Progress | None = None,
) -> None:
    """Writes so many scenes and the questions about them; none is asked twice about a scene."""
    progress = progress or NullProgress()
    (folder / IMAGES_DIR).mkdir(parents=True, exist_ok=True)
    questions: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    progress.start("scenes", num_scenes, "scene")
    for image_id in range(num_scenes):
        scene = draw_scene(first_seed + image_id, split)
        rng = np.random.default_rng([29, first_seed + image_id])
        image, _, _, extension = encode_picture(scene, rng)
        name = f"{image_id:08d}.{extension}"
        (folder / IMAGES_DIR / name).write_bytes(image)
        asked = dict(question(scene, rng) for _ in range(questions_per_scene))
        for text, answer in asked.items():
            ids = {"question_id": len(questions), "image_id": image_id}
            questions.append({**ids, "question": text, "file_name": name})
            annotations.append({**ids, **_annotation(text, answer)})
        progress.advance(1)
    progress.finish()
    for file, entries in ((QUESTIONS_FILE, questions), (ANNOTATIONS_FILE, annotations)):
        (folder / file).write_text(json.dumps({file.removesuffix(".json"): entries}, indent=0), encoding="utf-8")


def _annotation(text: str, answer: str) -> dict[str, Any]:
    counts = {word for words in COUNT_WORDS.values() for word in words} | {"one"}
    answer_type = "yes/no" if answer in ("yes", "no") else "number" if answer in counts else "other"
    return {
        "answers": [{"answer_id": number + 1, "answer": answer} for number in range(NUM_ANSWERS)],
        "multiple_choice_answer": answer,
        "answer_type": answer_type,
        "question_type": " ".join(text.split()[:2]),
    }
