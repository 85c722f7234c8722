"""`capfilt demo`: the whole main job on the miniature world, measured against the world's truth.

In: a run directory. Out: the run, two trained stages, and lines of text in ruled sections. What is done is
not done again: the parts know their own state, and the figures that only a first run can measure (speeds, the
answers of a model) are kept in RUN/demo.json beside the digest of what they were measured on.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from capfilt.pipeline import run_recipe
from capfilt.progress import NullProgress, Progress, format_rate, format_seconds
from capfilt.recipes import Recipe, SourceSettings, read_recipe
from capfilt.settings import EMBEDDED, Stage1Settings, Stage2Settings

if TYPE_CHECKING:
    from capfilt.world.scenes import Scene

NUM_URLS = 2000
NUM_UNSEEN = 200
NUM_EXAMPLES = 5
WORLD_SEED = 0
LLM = "embedded-opt"
FIRST_UNSEEN_SEED = 500_000
"""Scenes of the test split, other ones than the embedded models' cards are measured on."""

STAGE1 = Stage1Settings(
    image_encoder=EMBEDDED, init_cross_attention=True, num_queries=16, embed_dim=64, dropout=0.0, max_steps=100,
    optimizer="muon", batch_size=64, learning_rate=2e-3, warmup_steps=10, save_every_steps=50, log_every_steps=10,
)  # fmt: skip
STAGE2 = Stage2Settings(
    dropout=0.0, max_steps=300, optimizer="muon", batch_size=64, learning_rate=4e-3, min_learning_rate=4e-4,
    warmup_steps=10, save_every_steps=50, log_every_steps=10,
)  # fmt: skip

Figures = dict[str, Any]
RULE_WIDTH = 78


def run_demo(run_path: Path, progress: Progress | None = None) -> Iterator[str]:
    """Run (or finish) the demo in `run_path`; yields the lines to show, each as soon as it is known.

    Raises UsageError where the embedded models are not there, and what the parts raise.
    """
    from capfilt.weights.find import EMBEDDED_FOLDERS, find_embedded

    for what in EMBEDDED_FOLDERS:
        find_embedded(what)  # said now, not after the download
    progress = progress or NullProgress()
    started = time.monotonic()
    memory = _Memory(run_path / "demo.json")
    yield from _curate(run_path, memory, progress)
    yield from _show_stats(run_path)
    yield from _show_audit(run_path, memory)
    yield from _train_stage1(run_path, memory, progress)
    yield from _train_stage2(run_path, memory, progress)
    yield from _summarise(run_path, memory, time.monotonic() - started)


def demo_recipe() -> Recipe:
    """The quick start's recipe with more URLs."""
    source = SourceSettings(world_urls=NUM_URLS, world_seed=WORLD_SEED)
    return replace(read_recipe("quickstart"), source=source)


# --- curation -----------------------------------------------------------------------------------------------


def _curate(run_path: Path, memory: _Memory, progress: Progress) -> Iterator[str]:
    recipe = demo_recipe()
    yield _rule("1. A web site is downloaded, captioned, ranked and filtered")
    yield f"{NUM_URLS:,} URLs of the miniature world, served on loopback, with the alt-text the web has."
    images_before = _num_captioned(run_path)
    for step in run_recipe(recipe, run_path, progress=progress):
        yield step.summary.line()
        if step.name == "annotate":
            num_captions = _num_captioned(run_path) - images_before
            if num_captions:
                memory.keep("captions_per_second", "curation", num_captions / step.summary.seconds)
    rate = memory.known("captions_per_second", "curation")
    if rate is not None:
        yield f"{format_rate(rate)} captions a second: written, ranked by CLIP, the best judged by ITM."
    yield ""


def _num_captioned(run_path: Path) -> int:
    from capfilt.data.commit import read_commit_record
    from capfilt.data.rundir import RunDir

    if not (run_path / "run.json").exists():
        return 0
    run = RunDir.open(run_path)
    records = [read_commit_record(run.read_file("captions", shard)) for shard in run.committed("captions")]
    return sum(int(record.extra["table_rows"]) for record in records)


def _show_stats(run_path: Path) -> Iterator[str]:
    from capfilt.data.rundir import RunDir
    from capfilt.report.dashboard import dashboard_lines
    from capfilt.report.stats import compute_stats

    yield _rule("2. What the run holds (capfilt stats)")
    yield from dashboard_lines(compute_stats(RunDir.open(run_path)), RULE_WIDTH)
    yield ""


def _show_audit(run_path: Path, memory: _Memory) -> Iterator[str]:
    from capfilt.data.manifest import read_manifest
    from capfilt.world.audit import audit_manifest, sum_audits

    manifest = read_manifest([run_path], ["url", "source", "text", "itm_score", "kept"])
    audits = audit_manifest(manifest, run_path / "world" / "truth.parquet")
    total = sum_audits(audits)
    yield _rule("3. The same, against the world's truth")
    yield f"  {'source':<10} {'pairs':>8} {'true':>8} {'kept':>8} {'precision':>10} {'recall':>8}"
    for source, audit in [*audits.items(), ("all", total)]:
        yield (
            f"  {source:<10} {audit.num_pairs:>8,} {audit.share_true:>8.1%} {audit.num_kept:>8,} "
            f"{audit.precision:>10.1%} {audit.recall:>8.1%}"
        )
    yield "  precision: true among the kept; recall: kept among the true that the filter judged"
    yield ""
    web, synthetic = audits["web"], audits["synthetic"]
    memory.figures["curation"] = {
        "web pairs true, before": web.share_true,
        "kept pairs true, after": total.precision,
        "filter precision, web": web.precision,
        "filter recall, web": web.recall,
        "filter precision, synthetic": synthetic.precision,
        "filter recall, synthetic": synthetic.recall,
    }


# --- training -----------------------------------------------------------------------------------------------


def _train_stage1(run_path: Path, memory: _Memory, progress: Progress) -> Iterator[str]:
    from capfilt.train.stage1 import train_stage1

    yield _rule("4. BLIP-2 stage 1: a Q-Former learns to see, on the kept pairs")
    output = run_path / "stage1"
    yield _training_line("stage 1", train_stage1([run_path], STAGE1, output, progress))
    recall = memory.once("retrieval", _digest_of(output), lambda: _measure_retrieval(output))
    yield (
        f"R@1 among {NUM_UNSEEN} unseen scenes: image to text {recall['image_to_text']:.1%}, text to image "
        f"{recall['text_to_image']:.1%} (chance {1 / NUM_UNSEEN:.1%})"
    )
    memory.figures["stage 1"] = {f"R@1 {way.replace('_', ' ')}": share for way, share in recall.items()}
    yield ""


def _measure_retrieval(stage1_dir: Path) -> Figures:
    import numpy as np

    from capfilt.evaluate.retrieval import evaluate_retrieval
    from capfilt.evaluate.retrieval_models import RetrievalOptions, Stage1Retrieval
    from capfilt.figures import picture
    from capfilt.world.language import full_caption

    scenes = _unseen()
    rng = np.random.default_rng(WORLD_SEED)
    texts = [full_caption(scene, rng) for scene in scenes]
    model = Stage1Retrieval(stage1_dir, RetrievalOptions(device=STAGE1.device))
    report, _ = evaluate_retrieval(model, [picture(scene) for scene in scenes], texts)
    return {way: getattr(report.itc, way)[1] / 100 for way in ("image_to_text", "text_to_image")}


def _train_stage2(run_path: Path, memory: _Memory, progress: Progress) -> Iterator[str]:
    from capfilt.train.stage2 import train_stage2

    yield _rule(f"5. BLIP-2 stage 2: the Q-Former speaks through {LLM}")
    start, output = run_path / "stage1", run_path / "stage2"
    before = memory.once("before", _digest_of(start), lambda: _measure_untrained(start))
    yield _training_line("stage 2", train_stage2([run_path], start, LLM, STAGE2, output, progress))
    after = memory.once("after", _digest_of(output), lambda: _measure_trained(output))
    yield f"Captions of {NUM_UNSEEN} unseen scenes, before and after stage 2:"
    for example in after["examples"]:
        mark = "true " if example["is_true"] else "false"
        yield f"  {mark}  {example['caption']}"
        if example["question"]:
            yield f"         {example['question']} {example['answer']} ({example['right_answer']})"
    yield (
        f"true captions {before['captions_true']:.1%} before, {after['captions_true']:.1%} after; "
        f"{after['answers_right']:.1%} of {NUM_UNSEEN} questions answered right"
    )
    memory.figures["stage 2"] = {
        "captions true, before": before["captions_true"],
        "captions true, after": after["captions_true"],
        "answers right": after["answers_right"],
    }
    yield ""


def _measure_untrained(stage1_dir: Path) -> Figures:
    """Stage 2 as it starts: the projection is random."""
    import torch

    from capfilt.figures import measure_blip2
    from capfilt.train.generate import Generator
    from capfilt.train.saved import start_stage2
    from capfilt.weights.devices import choose_device
    from capfilt.weights.find import find_model_dir
    from capfilt.weights.llms import load_llm

    torch.manual_seed(STAGE2.seed)
    device = choose_device(STAGE2.device)
    llm = load_llm(find_model_dir(LLM, "language model"), device=device)
    model = start_stage2(stage1_dir, llm, 0.0, device)
    return measure_blip2(Generator(model.encoder, model.stage.eval(), device), _unseen())


def _measure_trained(stage2_dir: Path) -> Figures:
    from capfilt.figures import blip2_examples, measure_blip2
    from capfilt.train.generate import load_generator

    generator = load_generator(stage2_dir)
    measured: Figures = dict(measure_blip2(generator, _unseen(), with_questions=True))
    return measured | {"examples": blip2_examples(generator, _unseen()[:NUM_EXAMPLES])}


def _unseen() -> list[Scene]:
    from capfilt.world.measure import unseen_scenes

    return unseen_scenes(NUM_UNSEEN, FIRST_UNSEEN_SEED)


def _training_line(name: str, summary: Any) -> str:
    first, last = summary.first_losses["loss"], summary.last_losses["loss"]
    parts = ", ".join(
        f"{part} {summary.first_losses[part]:.2f} to {summary.last_losses[part]:.2f}"
        for part in ("itc", "itm", "itg")
        if part in summary.first_losses
    )
    again = " (done before)" if summary.already_done else ""
    return (
        f"{name}: {summary.steps:,} steps in {format_seconds(summary.seconds)}{again}, "
        f"loss {first:.3f} at the start, {last:.3f} at the end{f' ({parts})' if parts else ''}"
    )


# --- the end ------------------------------------------------------------------------------------------------


def _summarise(run_path: Path, memory: _Memory, seconds: float) -> Iterator[str]:
    yield _rule("Measured")
    for section, figures in memory.figures.items():
        for name, share in figures.items():
            yield f"  {section:<9} {name:<28} {share:6.1%}"
    yield f"The run is in {run_path}; this took {format_seconds(seconds)}."
    memory.write()


class _Memory:
    """RUN/demo.json: figures, and what was measured once, with the digest of what it was measured on."""

    def __init__(self, path: Path) -> None:
        self.figures: dict[str, dict[str, float]] = {}
        self._path = path
        self._measured: dict[str, dict[str, Any]] = {}
        # Not there, or not ours: everything is measured anew.
        with suppress(OSError, ValueError, KeyError, TypeError):
            self._measured = dict(json.loads(path.read_text(encoding="utf-8"))["measured"])

    def once(self, name: str, digest: str, measure: Callable[[], Figures]) -> Figures:
        """What was measured on `digest` before, else what `measure` finds."""
        found = self.known(name, digest)
        return found if found is not None else self.keep(name, digest, measure())

    def known(self, name: str, digest: str) -> Any:
        """What was measured on `digest` before, or None."""
        entry = self._measured.get(name, {})
        return entry.get("value") if entry.get("digest") == digest else None

    def keep(self, name: str, digest: str, value: Any) -> Any:
        """Keep a measurement, on disk at once."""
        self._measured[name] = {"digest": digest, "value": value}
        self.write()
        return value

    def write(self) -> None:
        """Write the file anew."""
        staged = self._path.with_suffix(".tmp")
        staged.parent.mkdir(parents=True, exist_ok=True)
        staged.write_text(json.dumps({"measured": self._measured, "figures": self.figures}, indent=2))
        staged.replace(self._path)


def _digest_of(model_dir: Path) -> str:
    """Stands for a trained model: its training record names the digests of its files."""
    return hashlib.sha256((model_dir / "training.json").read_bytes()).hexdigest()


def _rule(title: str) -> str:
    return f"━━ {title} ".ljust(RULE_WIDTH, "━")
