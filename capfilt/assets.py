"""`make assets`: the embedded models, made from nothing by this project's own training commands.

In: a working folder. Out: capfilt/world/assets/{blip-captioner,blip-filter,clip,opt,t5}, each with a README that
says how it was made and what it reaches; the figures are printed too.

Parts are made side by side, a process and a core each. Every part is resumable: a training that is finished is not
done again, one that was interrupted goes on from its last checkpoint; what is shipped is measured each time.
All training scenes are of the train split, all figures are measured on scenes of the test split.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from capfilt.data.llm_texts import write_llm_texts
from capfilt.errors import CapfiltError, UsageError
from capfilt.figures import Figures, measure_captioner, measure_clip, measure_filter, measure_llm
from capfilt.progress import Progress, StreamProgress
from capfilt.settings import BlipTrainSettings, ClipTrainSettings, LlmTrainSettings
from capfilt.train.blip import train_blip, train_captioner, train_filter
from capfilt.train.clip import train_clip
from capfilt.train.llm import train_llm
from capfilt.train.loop import TrainSummary
from capfilt.weights.find import EMBEDDED_DIR
from capfilt.weights.model_files import tokenizer_digest
from capfilt.world.texts_for_llms import draw_llm_texts
from capfilt.world.tokenizers import (
    build_bert_tokenizer,
    build_clip_tokenizer,
    build_opt_tokenizer,
    build_t5_tokenizer,
)
from capfilt.world.training_run import WorldRunSettings, write_world_run

NUM_UNSEEN_SCENES = 1000
NUM_LLM_TEXTS = 120_000

PRE_TRAINING = "blip-pretraining"
BUILD_ORDER = ("opt", "t5", "clip", "blip-filter", "blip-captioner")
"""The models in the order in which they are begun; those before the BLIPs fill the core beside their pre-training."""

# --- what is trained, and how long --------------------------------------------------------------------------

RUNS = {
    # Scenes of three objects and more teach the kinds of objects sooner: each is there several times.
    "groups": WorldRunSettings(num_scenes=16_000, min_count=3),
    "scenes": WorldRunSettings(num_scenes=60_000, first_seed=1_000_000, false_captions_per_scene=4),
    # Relations are learnt last: half of all scenes have one.
    "pairs": WorldRunSettings(num_scenes=24_000, first_seed=2_000_000, num_groups=2, false_captions_per_scene=4),
}
FAST: dict[str, Any] = {
    "optimizer": "muon", "beta2": 0.98, "autocast": "auto", "save_every_steps": 250, "log_every_steps": 25,
}  # fmt: skip
TINY_BLIP: dict[str, Any] = {
    "image_size_px": 64, "patch_size_px": 8, "vision_width": 128, "vision_depth": 4, "text_width": 128,
    "text_depth": 3, "head_width": 32, "max_positions": 64, "embed_dim": 64,
}  # fmt: skip
# So small a model fits what it sees none too well.
NO_REGULARISATION: dict[str, Any] = {"dropout": 0.0, "label_smoothing": 0.0}
# Contrast within the batch: few kinds of scenes, all of them seen often, and a third less time for a step.
NO_MOMENTUM: dict[str, Any] = {"momentum": 0.0}
FIRST_BLIP = BlipTrainSettings(
    **TINY_BLIP, **FAST, **NO_REGULARISATION, **NO_MOMENTUM, losses=("itc", "lm"), max_steps=1000, warmup_steps=100,
    learning_rate=3e-3, min_learning_rate=2e-3,
)  # fmt: skip
# Two captions of one image may name its objects in either order: what differs between them is how they lie.
SECOND_BLIP = BlipTrainSettings(
    **FAST, **NO_REGULARISATION, **NO_MOMENTUM, losses=("itc", "lm"), captions_per_image=2, max_steps=6000,
    warmup_steps=50, learning_rate=2e-3, min_learning_rate=2e-4,
)  # fmt: skip
CAPTIONER = BlipTrainSettings(
    **FAST, **NO_REGULARISATION, prompt="a picture of ", captions_per_image=2, max_steps=2500, warmup_steps=50,
    learning_rate=1e-3,
)  # fmt: skip
FILTER = BlipTrainSettings(
    **FAST, **NO_REGULARISATION, **NO_MOMENTUM, known_false=True, max_steps=3000, warmup_steps=50, learning_rate=1e-3,
)  # fmt: skip
CLIP = ClipTrainSettings(max_steps=1000)
OPT = LlmTrainSettings(**FAST, architecture="opt", max_steps=3000, learning_rate=4e-3)
T5 = LlmTrainSettings(**FAST, architecture="t5", max_steps=1500, learning_rate=4e-3, whole_caption_share=0.8)


# --- the parts ----------------------------------------------------------------------------------------

Train = Callable[[Path, Progress], TrainSummary]


@dataclass(frozen=True)
class Part:
    """One embedded model: how it is trained into a folder, how it is measured, what its card says."""

    name: str
    title: str
    origin: str
    train: Train
    measure: Callable[[Path, int], Figures]


def list_parts(work_dir: Path) -> list[Part]:
    """The embedded models; `work_dir` holds the runs, tokenizers and trainings they come from."""
    runs = _all_runs(work_dir)
    tokens = work_dir / "tokenizers"

    def fine_tuned(train: Callable[..., TrainSummary], settings: BlipTrainSettings) -> Train:
        started = replace(settings, init=str(work_dir / "models" / "blip-second"))
        return lambda out, progress: train(runs, started, out, progress)

    def language_model(settings: LlmTrainSettings) -> Train:
        texts, tokenizer = work_dir / "llm_texts.jsonl", tokens / settings.architecture
        return lambda out, progress: train_llm(texts, tokenizer, settings, out, progress)

    pre_trained = (
        f"BLIP pre-training (ITC, LM) for {FIRST_BLIP.max_steps:,} steps on scenes of three objects and more and "
        f"{SECOND_BLIP.max_steps:,} on all kinds of scenes"
    )
    return [
        Part(
            "blip-captioner", "BLIP captioner",
            f"{pre_trained}, then LM alone for {CAPTIONER.max_steps:,} steps (`capfilt train captioner`)",
            fine_tuned(train_captioner, CAPTIONER), measure_captioner,
        ),
        Part(
            "blip-filter", "BLIP filter",
            f"{pre_trained}, then ITC and ITM for {FILTER.max_steps:,} steps (`capfilt train filter`)",
            fine_tuned(train_filter, FILTER), measure_filter,
        ),
        Part(
            "clip", "CLIP (open_clip)", f"contrast for {CLIP.max_steps:,} steps (`capfilt train clip`)",
            lambda out, progress: train_clip(runs, tokens / "clip", CLIP, out, progress), measure_clip,
        ),
        Part(
            "opt", "OPT", f"LM on the world's language for {OPT.max_steps:,} steps (`capfilt train llm`)",
            language_model(OPT), measure_llm,
        ),
        Part(
            "t5", "T5", f"prefix LM on the world's language for {T5.max_steps:,} steps (`capfilt train llm`)",
            language_model(T5), measure_llm,
        ),
    ]  # fmt: skip


def build_inputs(work_dir: Path, progress: Progress) -> None:
    """Tokenizers, runs of scenes, texts for the language models: what every training reads. One process at a time."""
    work_dir.mkdir(parents=True, exist_ok=True)
    with open(work_dir / ".inputs.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _build_inputs(work_dir, progress)


def _build_inputs(work_dir: Path, progress: Progress) -> None:
    for name, build in {
        "bert": build_bert_tokenizer, "clip": build_clip_tokenizer, "opt": build_opt_tokenizer,
        "t5": build_t5_tokenizer,
    }.items():  # fmt: skip
        _build_tokenizer(build, work_dir / "tokenizers" / name)
    for name, settings in RUNS.items():
        write_world_run(work_dir / "runs" / name, settings, progress)
    texts = work_dir / "llm_texts.jsonl"
    if not texts.exists():
        partial = texts.with_suffix(".partial")
        write_llm_texts(partial, draw_llm_texts(NUM_LLM_TEXTS))
        partial.rename(texts)


def _build_tokenizer(build: Callable[[Path], object], folder: Path) -> None:
    """Build it; where it is there already, it must be the same. UsageError where the words have changed since."""
    built = folder.with_suffix(".partial")
    shutil.rmtree(built, ignore_errors=True)
    built.mkdir(parents=True)
    build(built)
    if not folder.exists():
        built.rename(folder)
    elif tokenizer_digest(built) != tokenizer_digest(folder):
        raise UsageError(f"{folder} is of other words than the world has now. Give another --work-dir.")
    shutil.rmtree(built, ignore_errors=True)


def _all_runs(work_dir: Path) -> list[Path]:
    return [work_dir / "runs" / name for name in ("scenes", "pairs")]


def pre_train(work_dir: Path, progress: Progress) -> None:
    """The BLIP that captioner and filter are fine-tuned from."""
    models = work_dir / "models"
    first = replace(FIRST_BLIP, tokenizer=str(work_dir / "tokenizers" / "bert"))
    train_blip([work_dir / "runs" / "groups"], first, models / "blip-first", progress)
    second = replace(SECOND_BLIP, init=str(models / "blip-first"))
    train_blip(_all_runs(work_dir), second, models / "blip-second", progress)


# --- what is shipped ----------------------------------------------------------------------------------------


def publish(part: Part, trained_dir: Path, target_dir: Path, num_scenes: int) -> Figures:
    """Copy a trained model in half precision into the package, measure the copy, and write its card."""
    shutil.rmtree(target_dir, ignore_errors=True)
    target_dir.mkdir(parents=True)
    for file in sorted(trained_dir.iterdir()):
        if file.suffix == ".safetensors":
            save_file(_half(load_file(file)), target_dir / file.name, metadata={"format": "pt"})
        elif file.is_file() and file.name not in ("training.json", "metrics.jsonl", ".lock"):
            shutil.copyfile(file, target_dir / file.name)
    _note_half_precision(target_dir / "config.json")
    figures = part.measure(target_dir, num_scenes)
    (target_dir / "README.md").write_text(_card(part, target_dir, figures, num_scenes))
    return figures


def _half(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: t.half() if t.is_floating_point() else t for name, t in state.items()}


def _note_half_precision(config_file: Path) -> None:
    if config_file.exists():
        config = json.loads(config_file.read_text())
        config_file.write_text(json.dumps(config | {"dtype": "float16"}, indent=2) + "\n")


def _card(part: Part, folder: Path, figures: Figures, num_scenes: int) -> str:
    num_bytes = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
    rows = "".join(f"| {name} | {value:.3f} |\n" for name, value in figures.items())
    return (
        f"# {part.title} of the miniature world\n\n"
        f"A small model of the published architecture and file format, for rehearsals and tests; it knows the "
        f"miniature world (`capfilt/world`) and nothing else. {num_bytes / 1e6:.1f} MB, float16.\n\n"
        f"Made by `make assets` (`capfilt/assets.py`): {part.origin}.\n\n"
        f"Measured on {num_scenes:,} scenes of the test split, none of them seen in training, some with pairs of "
        f"colour and kind that no training scene shows:\n\n| figure | value |\n|---|---|\n{rows}\n"
        f"Licence: Apache-2.0, as the rest of capfilt.\n"
    )


def make_part(part: Part, work_dir: Path, target_dir: Path, progress: Progress, num_scenes: int) -> None:
    """Train a model, ship it, print what it reaches."""
    trained_dir = work_dir / "models" / part.name
    summary = part.train(trained_dir, progress)
    figures = publish(part, trained_dir, target_dir / part.name, num_scenes)
    shown = "".join(f"\n  {name}: {value:.3f}" for name, value in figures.items())
    losses = ", ".join(f"{name} {value:.3f}" for name, value in summary.last_losses.items())
    print(  # noqa: T201
        f"{part.name}: {summary.steps:,} steps in {summary.seconds / 60:.0f} minutes, last losses {losses}{shown}",
        flush=True,
    )


def make_all(run_part: Callable[[str], None], workers: int) -> None:
    """Every part by `run_part(name)`, `workers` at a time; a BLIP waits for the pre-training.

    CapfiltError, when all others have ended, where one of them failed. An interruption begins no further part.
    """

    def make(name: str, needs: Future[None] | None) -> None:
        if needs is not None:
            needs.result()
        run_part(name)

    with ThreadPoolExecutor(workers) as pool:
        jobs = {PRE_TRAINING: pool.submit(make, PRE_TRAINING, None)}
        for name in BUILD_ORDER:
            needs = jobs[PRE_TRAINING] if name.startswith("blip") else None
            jobs[name] = pool.submit(make, name, needs)
        try:
            wait(jobs.values())
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    if failed := [name for name, job in jobs.items() if job.exception()]:
        raise CapfiltError(
            f"These parts failed, see above: {', '.join(failed)}. The same command goes on where they ended."
        )


def _run_in_process(options: argparse.Namespace) -> Callable[[str], None]:
    """What makes a part in a process of its own, on one core; a SIGTERM is passed on to it."""
    running: list[subprocess.Popen[bytes]] = []
    folders = ["--work-dir", options.work_dir, "--target-dir", options.target_dir]
    command = [sys.executable, "-m", "capfilt.assets", *map(str, folders), "--num-scenes", str(options.num_scenes)]

    def run_part(name: str) -> None:
        with subprocess.Popen([*command, "--only", name], env=os.environ | {"OMP_NUM_THREADS": "1"}) as process:
            running.append(process)
            if process.wait() != 0:
                raise CapfiltError(f"{name} ended with exit code {process.returncode}.")

    def stop(number: int, _frame: object) -> None:
        for process in running:
            process.send_signal(number)
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, stop)
    return run_part


def main() -> int:
    """Read the options of `python -m capfilt.assets`; gives the exit code."""
    parser = argparse.ArgumentParser(prog="python -m capfilt.assets", description="Make the embedded models.")
    parser.add_argument("--work-dir", type=Path, default=Path("runs/assets"), help="runs and trainings")
    parser.add_argument("--target-dir", type=Path, default=EMBEDDED_DIR, help="where the models are shipped")
    parser.add_argument("--only", default="", choices=["", PRE_TRAINING, *BUILD_ORDER], help="make one part alone")
    parser.add_argument("--num-scenes", type=int, default=NUM_UNSEEN_SCENES, help="unseen scenes to measure on")
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1), help="parts made at a time")
    options = parser.parse_args()
    progress, started = StreamProgress(sys.stderr), time.monotonic()
    try:
        build_inputs(options.work_dir, progress)
        if options.only == PRE_TRAINING:
            pre_train(options.work_dir, progress)
        elif options.only:
            part = next(part for part in list_parts(options.work_dir) if part.name == options.only)
            make_part(part, options.work_dir, options.target_dir, progress, options.num_scenes)
        else:
            make_all(_run_in_process(options), options.workers)
            minutes = (time.monotonic() - started) / 60
            print(f"The embedded models are in {options.target_dir}; this took {minutes:.0f} minutes.")  # noqa: T201
    except CapfiltError as error:
        print(f"capfilt: {error}", file=sys.stderr)  # noqa: T201
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
