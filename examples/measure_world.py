"""What the recipes of the miniature world reach, on scenes nobody trained on, judged by the world's truth.

    capfilt run world-stage2-opt
    python examples/measure_world.py [runs/world] [--curve 100 200 400] [--unseen 500] [--threads 2]

In: a run whose trainings are done, as far as they are. Out: a table, and RUN/figures.json: R@1 of stage 1 and of the
filter among captions that state every fact; the share of true captions and of right answers of stage 2; true captions
of the captioner; the filter's area under the curve; minutes of each training.

With `--curve` stage 2 is trained first for so few steps too, with stage 1 and without (BLIP-2's Figure 5 in small), as
the recipes world-stage2-opt and world-stage2-alone do, into RUN/stage2-opt-200 and the like.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from capfilt.data.rundir import RunDir
from capfilt.errors import CapfiltError
from capfilt.figures import Figures, measure_blip2, measure_filter, measure_greedy, measure_retrieval
from capfilt.pipeline import resolved_settings
from capfilt.progress import Progress, StreamProgress
from capfilt.recipes import read_recipe
from capfilt.train.generate import load_generator
from capfilt.trainings import TRAININGS
from capfilt.world.measure import unseen_scenes

K_TEST = 32
FIRST_UNSEEN_SEED = 700_000
"""Of the scenes that stage 2 is measured on."""


def of_stage2(folder: Path, num_unseen: int) -> Figures:
    """Shares of true captions and of right answers."""
    return measure_blip2(load_generator(folder), unseen_scenes(num_unseen, FIRST_UNSEEN_SEED), with_questions=True)


def of_retrieval(folder: Path, num_unseen: int) -> Figures:
    """R@1 both ways by ITC, and after ITM."""
    return measure_retrieval(folder, num_unseen, min(K_TEST, num_unseen))


def of_filter(folder: Path, num_unseen: int) -> Figures:
    """Retrieval, and the area under the curve of ITM."""
    return {**of_retrieval(folder, num_unseen), **measure_filter(folder, num_unseen)}


MEASURES: dict[str, Callable[[Path, int], Figures]] = {
    "stage1": of_retrieval, "stage1-no-itg": of_retrieval, "stage2-opt": of_stage2, "stage2-t5": of_stage2,
    "stage2-alone": of_stage2, "captioner": measure_greedy, "filter": of_filter,
}  # fmt: skip
"""Folder of a training in the run → what is measured of it."""


def train_shorter(run: RunDir, num_steps: int, progress: Progress) -> None:
    """Stage 2 of so many steps with stage 1 and without, into folders that end with their number."""
    for name in ("world-stage2-opt", "world-stage2-alone"):
        recipe = read_recipe(name)
        section = recipe.trainings[-1]
        settings = resolved_settings(recipe, section, run)
        settings = replace(settings, max_steps=num_steps, warmup_steps=min(settings.warmup_steps, num_steps))
        TRAININGS[section.name].train([run], settings, run.path / f"{section.output}-{num_steps}", progress)


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the options, those of the command line unless given; gives the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path, nargs="?", default=Path("runs/world"), help="the run directory")
    parser.add_argument("--unseen", type=int, default=500, help="scenes to measure on")
    parser.add_argument("--threads", type=int, default=2, help="threads that compute")
    parser.add_argument("--curve", type=int, nargs="+", default=[], help="train stage 2 for so many steps first, twice")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    found: dict[str, Figures] = {}
    try:
        for num_steps in options.curve:
            train_shorter(RunDir.open(options.run), num_steps, StreamProgress(sys.stderr))
    except CapfiltError as error:
        print(f"measure_world: {error}", file=sys.stderr)
        return error.exit_code
    shorter = (path.name for path in sorted(options.run.glob("stage2-*-*")) if path.name.rpartition("-")[2].isdigit())
    for name, measure in {**MEASURES, **dict.fromkeys(shorter, of_stage2)}.items():
        record = options.run / name / "training.json"
        if record.exists():
            minutes = json.loads(record.read_text(encoding="utf-8"))["summary"]["seconds"] / 60
            found[name] = {"minutes of training": round(minutes, 1), **measure(options.run / name, options.unseen)}
            print(
                "\n".join(f"| {name} | {figure} | {value:.3f} |" for figure, value in found[name].items()), flush=True
            )
    if not found:
        print(f"measure_world: no training is done in {options.run}. Run `capfilt run world-stage1`.", file=sys.stderr)
        return 1
    (options.run / "figures.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
