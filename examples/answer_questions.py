"""BLIP-2's fine-tuning for questions, on the miniature world: from a stage-2 model to one that answers better.

    python examples/answer_questions.py [--init runs/demo/stage2] [--work runs/questions] [--num-scenes 2000]
                                        [--steps 300]

In: a stage-2 model, such as `capfilt demo` trains. Out: questions about scenes in VQA's files, the fine-tuned model in
WORK/vqa, and VQA accuracy on questions about scenes that nothing was trained on, before and after. The commands

    capfilt train blip2-vqa --questions WORK/train/questions.json --annotations WORK/train/annotations.json \\
        --images WORK/train/images --init STAGE2 --output DIR --image-size-px 0
    capfilt evaluate vqa DIR --questions WORK/test/questions.json --annotations WORK/test/annotations.json \\
        --images WORK/test/images

do the same with these files. Fine-tuning that was interrupted goes on from its last checkpoint.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from capfilt.data.questions import read_questions
from capfilt.evaluate.vqa import evaluate_answerer
from capfilt.evaluate.writers import load_writer
from capfilt.progress import Progress, StreamProgress
from capfilt.settings import Blip2VqaSettings, GenerationSettings
from capfilt.train.blip2_tuning import train_blip2_vqa
from capfilt.train.question_pairs import QuestionFiles
from capfilt.world.questions import ANNOTATIONS_FILE, IMAGES_DIR, QUESTIONS_FILE, write_world_questions

FIRST_TRAIN_SEED, FIRST_TEST_SEED, NUM_TEST_SCENES = 3_000_000, 800_000, 150
SETTINGS = Blip2VqaSettings(
    dropout=0.0, max_steps=300, optimizer="muon", batch_size=64, accumulation_steps=1, learning_rate=4e-3,
    min_learning_rate=1e-4, warmup_steps=10, save_every_steps=50, log_every_steps=10, image_size_px=0,
)  # fmt: skip


def write_files(folder: Path, num_scenes: int, first_seed: int, split: str, progress: Progress) -> QuestionFiles:
    """Questions about scenes of a split; as they were where they are there."""
    if not (folder / ANNOTATIONS_FILE).exists():
        write_world_questions(folder, num_scenes, first_seed=first_seed, split=split, progress=progress)
    return QuestionFiles(folder / QUESTIONS_FILE, folder / ANNOTATIONS_FILE, folder / IMAGES_DIR)


def accuracy_of(model: Path, files: QuestionFiles, progress: Progress) -> str:
    """VQA accuracy of a model, in words."""
    questions = read_questions(files.questions, files.annotations, files.images_dir)
    return evaluate_answerer(load_writer(model, "answer", GenerationSettings()), questions, progress=progress).line()


def main() -> None:
    """Read the options, write the questions, measure, train, measure again."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--init", type=Path, default=Path("runs/demo/stage2"), help="the stage-2 model")
    parser.add_argument("--work", type=Path, default=Path("runs/questions"), help="where files and model go")
    parser.add_argument("--num-scenes", type=int, default=2000, help="scenes to train on")
    parser.add_argument("--steps", type=int, default=SETTINGS.max_steps, help="steps of the training")
    options = parser.parse_args()
    progress = StreamProgress(sys.stderr)
    train = write_files(options.work / "train", options.num_scenes, FIRST_TRAIN_SEED, "train", progress)
    test = write_files(options.work / "test", NUM_TEST_SCENES, FIRST_TEST_SEED, "test", progress)
    print(f"before: {accuracy_of(options.init, test, progress)}", flush=True)
    settings, output = replace(SETTINGS, max_steps=options.steps), options.work / "vqa"
    train_blip2_vqa([train], options.init, "", settings, output, progress)
    print(f"after:  {accuracy_of(output, test, progress)}", flush=True)


if __name__ == "__main__":
    main()
