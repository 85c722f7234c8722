"""Both stages of BLIP-2 on a larger run of the miniature world, with OPT and with T5; at most an hour on two cores.

    python examples/train_longer.py [--run runs/longer] [--num-urls 10000] [--llms embedded-opt,embedded-t5]
                                    [--stage1-steps 600] [--stage2-steps 1500]

In: nothing but the package. Out: the run, its trained stages in RUN/stage1 and RUN/stage2-LLM, and a table: the share
of true captions and of right answers on 500 scenes of the test split that neither the embedded models nor the stages
saw. What is done is not done again, and an interrupted training goes on from its last checkpoint.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path

from capfilt.figures import measure_blip2
from capfilt.pipeline import run_recipe
from capfilt.progress import Progress, StreamProgress, format_seconds
from capfilt.recipes import SourceSettings, read_recipe
from capfilt.settings import EMBEDDED, Stage1Settings, Stage2Settings
from capfilt.train.generate import load_generator
from capfilt.train.stage1 import train_stage1
from capfilt.train.stage2 import train_stage2
from capfilt.world.measure import unseen_scenes

NUM_UNSEEN, FIRST_UNSEEN_SEED = 500, 700_000
WORLD_SEED = 1

STAGE1 = Stage1Settings(
    image_encoder=EMBEDDED, init_cross_attention=True, num_queries=16, embed_dim=64, dropout=0.0, max_steps=600,
    optimizer="muon", batch_size=64, learning_rate=2e-3, warmup_steps=50, save_every_steps=100, log_every_steps=50,
)  # fmt: skip
STAGE2 = Stage2Settings(
    dropout=0.0, max_steps=1500, optimizer="muon", batch_size=64, learning_rate=4e-3, min_learning_rate=1e-4,
    warmup_steps=50, save_every_steps=250, log_every_steps=50,
)  # fmt: skip


def train_longer(
    run: Path, num_urls: int, llms: list[str], stage1: Stage1Settings, stage2: Stage2Settings, progress: Progress
) -> None:
    """Curate, train stage 1 once and stage 2 with each language model, and print what they reach."""
    source = SourceSettings(world_urls=num_urls, world_seed=WORLD_SEED)
    for step in run_recipe(replace(read_recipe("quickstart"), source=source), run, progress=progress):
        print(step.summary.line())
    started = time.monotonic()
    train_stage1([run], stage1, run / "stage1", progress)
    print(f"stage 1: {stage1.max_steps:,} steps, {format_seconds(time.monotonic() - started)}")
    scenes = unseen_scenes(NUM_UNSEEN, FIRST_UNSEEN_SEED)
    print(f"| language model | captions true of {NUM_UNSEEN} | answers right | stage 2 |\n|---|---|---|---|")
    for llm in llms:
        started = time.monotonic()
        output = run / f"stage2-{llm}"
        train_stage2([run], run / "stage1", llm, stage2, output, progress)
        seconds = format_seconds(time.monotonic() - started)
        found = measure_blip2(load_generator(output), scenes, with_questions=True)
        shares = f"{found['captions_true']:.1%} | {found['answers_right']:.1%}"
        print(f"| {llm} | {shares} | {stage2.max_steps:,} steps, {seconds} |", flush=True)


def main() -> None:
    """Read the options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--run", type=Path, default=Path("runs/longer"), help="the run directory")
    parser.add_argument("--num-urls", type=int, default=10_000, help="URLs of the world to curate")
    parser.add_argument("--llms", default="embedded-opt,embedded-t5", help="language models of stage 2, with commas")
    parser.add_argument("--stage1-steps", type=int, default=STAGE1.max_steps, help="steps of stage 1")
    parser.add_argument("--stage2-steps", type=int, default=STAGE2.max_steps, help="steps of stage 2")
    options = parser.parse_args()
    stage1 = replace(STAGE1, max_steps=options.stage1_steps)
    stage2 = replace(STAGE2, max_steps=options.stage2_steps)
    train_longer(options.run, options.num_urls, options.llms.split(","), stage1, stage2, StreamProgress(sys.stderr))


if __name__ == "__main__":
    main()
