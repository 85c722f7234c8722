"""The training loop of every `capfilt train` command: one file, read top to bottom.

In: a function from (batch, step) to losses, the live tensors, a stream of batches, settings. Out: the saved
model in `output_dir`, and beside it

    metrics.jsonl      a line per `log_every_steps`: step, averaged losses, learning_rate, images_per_second
    checkpoints/       the last two, from which the same command goes on (capfilt/train/checkpoint.py)
    training.json      settings, summary and sha256 of the model's files; written last: its presence says done

Refused with the step and the keys of the batch: a loss or a gradient that is not finite.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from capfilt.errors import CapfiltError
from capfilt.progress import NullProgress, Progress
from capfilt.settings import TrainSettings
from capfilt.train.batches import Batch, Cursor
from capfilt.train.checkpoint import (
    file_digests,
    find_checkpoint,
    load_checkpoint,
    lock_output,
    publish_files,
    refuse_other_settings,
    save_checkpoint,
)
from capfilt.train.cpu import fast_bfloat16_attention, fast_cpu
from capfilt.train.optim import NamedParameters, build_optimizer, learning_rate_at, set_learning_rate
from capfilt.weights.devices import choose_device

ComputeLosses = Callable[[Batch, int], dict[str, Tensor]]
OpenBatches = Callable[[Cursor], Iterator[Batch]]

UNBOUND_SETTINGS = (
    "save_every_steps", "log_every_steps", "device", "feature_cache_bytes",
    "image_encoder", "qformer_init", "init", "tokenizer",  # `fields` holds digests of what these paths name
)  # fmt: skip
"""Settings that may change between a training and its resumption."""


@dataclass(frozen=True)
class TrainSummary:
    """What a training did; `first_losses` and `last_losses` are averages over `log_every_steps` steps."""

    steps: int
    seconds: float
    images_per_second: float
    first_losses: dict[str, float]
    last_losses: dict[str, float]
    already_done: bool = False


@dataclass
class _Running:
    """Sums since the last line of metrics, and what outlives a restart."""

    first_losses: dict[str, float] = field(default_factory=dict)
    last_losses: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    sums: dict[str, float] = field(default_factory=dict)
    num_steps: int = 0
    num_images: int = 0
    since: float = field(default_factory=time.monotonic)

    def add(self, losses: Mapping[str, float], num_images: int) -> None:
        for name, value in losses.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.num_steps += 1
        self.num_images += num_images

    def flush(self) -> float:
        """Closes the window, keeps its averages, returns its images per second."""
        now = time.monotonic()
        rate = self.num_images / max(now - self.since, 1e-9)
        self.seconds += now - self.since
        if self.num_steps:
            self.last_losses = {name: value / self.num_steps for name, value in self.sums.items()}
            self.first_losses = self.first_losses or self.last_losses
        self.sums, self.num_steps, self.num_images, self.since = {}, 0, 0, now
        return rate


def train(
    compute_losses: ComputeLosses,
    *,
    named_parameters: NamedParameters,
    open_batches: OpenBatches,
    settings: TrainSettings,
    output_dir: Path,
    save: Callable[[Path], None],
    progress: Progress | None = None,
    name: str = "train",
    extra_tensors: Mapping[str, Tensor] | None = None,
    fields: Mapping[str, Any] | None = None,
    after_step: Callable[[int], None] | None = None,
) -> TrainSummary:
    """Trains for `settings.max_steps` optimizer steps, or goes on where an earlier run of the same stopped.

    `compute_losses(batch, step)` returns scalars, "loss" among them, the rest for the log.
    `open_batches(cursor)` opens the endless stream at a cursor. `extra_tensors` are checkpointed beside the
    trainable parameters (running statistics). `fields` name what else fixes the result, such as the
    input's digest; with the settings they must agree on resumption. `after_step(step)` runs after each
    update. `save(folder)` writes the finished model's files.

    Raises FingerprintMismatchError where `output_dir` holds another training, RunLockedError where one is at
    work, CapfiltError on a loss that is not finite. SIGINT and SIGTERM save a checkpoint (or the finished
    model, where it is being written) first, then raise KeyboardInterrupt (exit code 130) and SystemExit(143).
    """
    parameters = {key: p for key, p in named_parameters if p.requires_grad}
    tensors = {**parameters, **(extra_tensors or {})}
    identity = {**binding_settings(settings), **(fields or {})}
    progress = progress or NullProgress()
    with lock_output(output_dir), fast_cpu(), _deferred_signals() as caught:
        done = _finished(output_dir, identity)
        if done is not None:
            return done
        optimizer = build_optimizer(parameters.items(), settings)
        start, cursor, running = _resume(output_dir, tensors, optimizer, identity)
        batches = open_batches(cursor)
        progress.start(name, settings.max_steps, "step")
        progress.advance(start, already=True)
        for step in range(start, settings.max_steps):
            batch = next(batches)
            set_learning_rate(optimizer, rate := learning_rate_at(step, settings))
            values = _take_step(compute_losses, parameters, optimizer, settings, step, batch)
            if after_step is not None:
                after_step(step)
            running.add(values, len(batch.keys))
            taken = step + 1
            if taken % settings.log_every_steps == 0 or taken == settings.max_steps:
                _report(output_dir, progress, taken, rate, running)
            progress.advance(1)
            if taken % settings.save_every_steps == 0 or taken == settings.max_steps or caught:
                _save(output_dir, tensors, optimizer, taken, batch.cursor, identity, running)
            if caught:
                _raise_signal(caught[0])
        progress.finish()
        summary = _summary(running, settings)
        _finish(output_dir, save, identity, summary)
        return summary


def _take_step(
    compute_losses: ComputeLosses,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    settings: TrainSettings,
    step: int,
    batch: Batch,
) -> dict[str, float]:
    """One update; gives losses and gradient norm. Where it is refused the weights stay as they are."""
    with _precision(settings):
        losses = compute_losses(batch, step)
    values = _finite_values(losses, step, batch)
    optimizer.zero_grad(set_to_none=True)
    losses["loss"].backward()
    values["grad_norm"] = _clip(parameters, settings.clip_grad_norm, step, batch)
    optimizer.step()
    return values


@contextmanager
def _precision(settings: TrainSettings) -> Iterator[None]:
    """Matrix products as `settings.autocast` says; the weights stay float32."""
    if settings.autocast == "float32":
        yield
        return
    kind = choose_device(settings.device).type
    with torch.autocast(kind, torch.bfloat16), fast_bfloat16_attention() if kind == "cpu" else nullcontext():
        yield


def _report(output_dir: Path, progress: Progress, step: int, rate: float, running: _Running) -> None:
    images_per_second = running.flush()
    losses = running.last_losses
    line = {"step": step, **losses, "learning_rate": rate, "images_per_second": round(images_per_second, 2)}
    with open(output_dir / "metrics.jsonl", "a") as handle:
        handle.write(json.dumps(line) + "\n")
    shown: dict[str, Any] = {**losses, "lr": f"{rate:.1e}", "images_per_second": images_per_second}
    progress.advance(0, **shown)


def binding_settings(settings: TrainSettings) -> dict[str, Any]:
    """Those that a training must have in common with what it goes on from."""
    return {k: v for k, v in asdict(settings).items() if k not in UNBOUND_SETTINGS}


def _finite_values(losses: Mapping[str, Tensor], step: int, batch: Batch) -> dict[str, float]:
    names = list(losses)
    values = dict(zip(names, torch.stack([losses[n].detach().float() for n in names]).tolist(), strict=True))
    if not all(math.isfinite(v) for v in values.values()):
        shown = ", ".join(f"{n} {v:.4g}" for n, v in values.items())
        raise CapfiltError(_non_finite_message(f"loss ({shown})", step, batch))
    return values


def _clip(parameters: Mapping[str, nn.Parameter], max_norm: float, step: int, batch: Batch) -> float:
    """Global norm of the gradients before clipping; 0 for `max_norm` measures without clipping."""
    norm = float(nn.utils.clip_grad_norm_(parameters.values(), max_norm or math.inf))
    if not math.isfinite(norm):
        raise CapfiltError(_non_finite_message(f"gradient norm ({norm})", step, batch))
    return norm


def _non_finite_message(what: str, step: int, batch: Batch) -> str:
    return (
        f"Step {step + 1}: the {what} is not finite; the weights were left as they were. "
        f"Keys of the batch: {', '.join(batch.keys)}. The last checkpoint is kept: look at those samples "
        f"in the run's shards (KEY.jpg, KEY.txt), or train with a lower --learning-rate into another --output."
    )


def _resume(
    output_dir: Path,
    tensors: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    identity: Mapping[str, Any],
) -> tuple[int, Cursor, _Running]:
    found = find_checkpoint(output_dir)
    if found is None:
        (output_dir / "metrics.jsonl").unlink(missing_ok=True)
        return 0, Cursor(), _Running()
    path, state = found
    refuse_other_settings(state, identity, output_dir)
    load_checkpoint(path, tensors=tensors, optimizer=optimizer)
    _cut_metrics(output_dir, state["step"])
    running = _Running(state["first_losses"], state["last_losses"], state["seconds"])
    running.sums, running.num_steps = state["open_sums"], state["open_steps"]
    return state["step"], Cursor(**state["cursor"]), running


def _save(
    output_dir: Path,
    tensors: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    step: int,
    cursor: Cursor,
    identity: Mapping[str, Any],
    running: _Running,
) -> None:
    state = {
        "step": step, "cursor": asdict(cursor), "fields": dict(identity),
        "first_losses": running.first_losses, "last_losses": running.last_losses,
        "open_sums": running.sums, "open_steps": running.num_steps,
        "seconds": running.seconds + time.monotonic() - running.since,
    }  # fmt: skip
    save_checkpoint(output_dir, tensors=tensors, optimizer=optimizer, state=state)


def _cut_metrics(output_dir: Path, step: int) -> None:
    """Drops the lines of steps that will be taken again."""
    path = output_dir / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
    path.write_text("".join(kept))


def _summary(running: _Running, settings: TrainSettings) -> TrainSummary:
    return TrainSummary(
        steps=settings.max_steps,
        seconds=round(running.seconds, 3),
        images_per_second=round(settings.max_steps * settings.batch_size / max(running.seconds, 1e-9), 2),
        first_losses=_without_norm(running.first_losses),
        last_losses=_without_norm(running.last_losses),
    )


def _without_norm(averages: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in averages.items() if name != "grad_norm"}


def _finish(output_dir: Path, save: Callable[[Path], None], identity: Mapping[str, Any], summary: TrainSummary) -> None:
    staging = output_dir / f".staging-{os.getpid()}"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    try:
        save(staging)
        record = {"fields": dict(identity), "summary": asdict(summary), "sha256": file_digests(staging)}
        publish_files(staging, output_dir, record)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _finished(output_dir: Path, identity: Mapping[str, Any]) -> TrainSummary | None:
    path = output_dir / "training.json"
    if not path.exists():
        return None
    record = json.loads(path.read_text())
    refuse_other_settings(record, identity, output_dir)
    return TrainSummary(**{**record["summary"], "already_done": True})


@contextmanager
def _deferred_signals() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM, so that what is under way ends and is saved, then raises; main thread only."""
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return

    def note(number: int, _frame: FrameType | None) -> None:
        if caught:  # asked twice: leave at once, without saving
            _raise_signal(number)
        caught.append(number)

    old = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
    if caught:  # none of the steps after it raised it: it came while the finished model was written
        _raise_signal(caught[0])


def _raise_signal(number: int) -> None:
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(143)
