"""The training loop of every `capfilt train` command; a step of it is `capfilt.train.step`'s.

In: an objective (a module that gives losses), what makes its inputs of a batch, a stream of batches, settings. Out:
the saved model in `output_dir`, and beside it

    metrics.jsonl      losses over the steps, and losses.png (capfilt/train/records.py)
    checkpoints/       the last two, from which the same command goes on (capfilt/train/checkpoint.py)
    training.json      settings, summary and sha256 of the model's files; written last: its presence says done

A step is a function of weights, optimizer, cursor and (seed, step): what is random in it is drawn anew from those, so
that a resumed training takes the steps of an undisturbed one. Several processes (capfilt/train/processes.py) take
each step together.
"""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
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
    find_fields,
    load_checkpoint,
    lock_output,
    newer_checkpoints,
    publish_files,
    read_training_record,
    refuse_damaged_model,
    refuse_foreign_files,
    refuse_other_settings,
    save_checkpoint,
)
from capfilt.train.cpu import fast_cpu
from capfilt.train.optim import learning_rate_at, set_learning_rate
from capfilt.train.processes import Processes, launched_autocast, make_whole, refuse_sharding
from capfilt.train.records import Records
from capfilt.train.signals import deferred_signals, raise_signal
from capfilt.train.step import Prepare, TrainState, make_state, take_step
from capfilt.weights.devices import choose_fast_dtype, name_dtype

OpenBatches = Callable[[Cursor], Iterator[Batch]]

UNBOUND_SETTINGS = (
    "save_every_steps", "log_every_steps", "tensorboard", "device", "compile", "recompute", "sharding",
    "feature_cache_bytes", "feature_cache_dir",
    "image_encoder", "qformer_init", "init", "text_init", "vision_init", "tokenizer", "llm",  # by digest in `fields`
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
    counts: dict[str, int] = field(default_factory=dict)
    num_images: int = 0
    since: float = field(default_factory=time.monotonic)

    def add(self, losses: Mapping[str, float], num_images: int) -> None:
        """A step's; what a step lacks (a norm that overflowed) is averaged over the others."""
        for name, value in losses.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
            self.counts[name] = self.counts.get(name, 0) + 1
        self.num_images += num_images

    def flush(self) -> float:
        """Closes the window, keeps its averages, returns its images per second."""
        now = time.monotonic()
        rate = self.num_images / max(now - self.since, 1e-9)
        self.seconds += now - self.since
        if self.sums:
            self.last_losses = {name: value / self.counts[name] for name, value in self.sums.items()}
            self.first_losses = self.first_losses or self.last_losses
        self.sums, self.counts, self.num_images, self.since = {}, {}, 0, now
        return rate


def train(
    objective: nn.Module,
    prepare: Prepare,
    *,
    open_batches: OpenBatches,
    settings: TrainSettings,
    output_dir: Path,
    save: Callable[[Path], None],
    processes: Processes,
    progress: Progress | None = None,
    name: str = "train",
    extra_tensors: Callable[[], Mapping[str, Tensor]] = dict,
    fields: Mapping[str, Any] | None = None,
    after_step: Callable[[int], None] | None = None,
    some_unused: bool = False,
    rate_scales: Mapping[str, float] | None = None,
) -> TrainSummary:
    """Trains for `settings.max_steps` optimizer steps, or goes on where an earlier run of the same stopped.

    `objective(**prepare(batch, draws))` returns scalars, "loss" among them, the rest for the log; it is on the
    processes' device. `open_batches(cursor)` opens this process's endless stream at a cursor. `extra_tensors()` are
    checkpointed beside the trainable parameters (running statistics, momentum encoders). `fields` name what else
    fixes the result, such as the input's digest; with the settings they must agree on resumption.
    `after_step(step)` runs after each update. `some_unused`: the losses leave some trainable weights out.
    `rate_scales`: what the learning rate of a weight is multiplied by, by its name in `objective`; 1 for others.
    `save(folder)` writes the finished model's files.

    Raises FingerprintMismatchError where `output_dir` holds another training, UsageError where other files,
    RunLockedError where a training is at work, CapfiltError on a loss that is not finite. From the first step on SIGINT
    and SIGTERM save a checkpoint (or the finished model, where it is being written) first, then raise KeyboardInterrupt
    (exit code 130) and SystemExit(143).
    """
    progress = progress if progress and processes.is_main else NullProgress()
    with _lock(output_dir, processes), fast_cpu():
        settings = _with_precision(settings, output_dir, processes.device)
        refuse_sharding(processes.sharding, settings.optimizer, settings.autocast)
        identity = {**binding_settings(settings), "num_processes": processes.num, **(fields or {})}
        done = _finished(output_dir, identity)
        _refuse_other_starts(processes, {"finished": done is not None, "fields": identity})
        if done is not None:
            return done
        state = make_state(objective, prepare, settings, processes, extra_tensors, some_unused, rate_scales)
        start, cursor, running = _resume(output_dir, state, identity, progress)
        _refuse_other_starts(processes, {"step": start, "cursor": asdict(cursor)})
        records = Records(output_dir, active=processes.is_main, tensorboard=settings.tensorboard)
        records.go_on(start)
        batches = open_batches(cursor)  # which may read all pictures first
        running.since = time.monotonic()
        with closing(records), deferred_signals() as caught:
            progress.start(name, settings.max_steps, "step")
            progress.advance(start, already=True)
            steps = _Steps(output_dir, state, identity, running, records, progress, after_step)
            for step in range(start, settings.max_steps):
                steps.take(step, batches, caught)
            progress.finish()
            summary = _summary(running, settings, processes)
            make_whole(objective)
            if processes.is_main:
                records.finish()
                _finish(output_dir, save, identity, summary)
            processes.wait()
        return summary


@dataclass(frozen=True)
class _Steps:
    """The steps of a training, each logged, shown and saved as the settings say."""

    output_dir: Path
    state: TrainState
    identity: Mapping[str, Any]
    running: _Running
    records: Records
    progress: Progress
    after_step: Callable[[int], None] | None

    def take(self, step: int, batches: Iterator[Batch], caught: Sequence[int]) -> None:
        """One step; where a signal was caught it is saved, and the signal raised."""
        settings = self.state.settings
        set_learning_rate(self.state.optimizer, rate := learning_rate_at(step, settings))
        taken = take_step(self.state, batches, step, caught)
        if self.after_step is not None:
            self.after_step(step)
        self.running.add(taken.values, taken.num_images)
        step += 1
        is_last = step == settings.max_steps
        if step % settings.log_every_steps == 0 or is_last:
            _log(self.running, step, rate, self.records, self.progress)
        shown: dict[str, Any] = {**taken.values, "lr": f"{rate:.1e}"}
        self.progress.advance(1, **shown)
        if step % settings.save_every_steps == 0 or is_last or taken.stop:
            _save(self.output_dir, self.state, step, taken.cursor, self.identity, self.running)
        if taken.stop:
            self.progress.say(f"Stopped after step {step:,}, which is saved; the same command goes on from there.")
            raise_signal(caught[0] if caught else signal.SIGTERM)


def _log(running: _Running, step: int, rate: float, records: Records, progress: Progress) -> None:
    per_second = running.flush()
    averages = {**running.last_losses, "learning_rate": rate, "images_per_second": round(per_second, 2)}
    records.add({"step": step, **averages})
    progress.advance(0, images_per_second=per_second)


def _with_precision(settings: TrainSettings, output_dir: Path, device: torch.device) -> TrainSettings:
    """The settings with the launcher's precision, and in the place of `auto` that of the training in `output_dir`, else
    the fastest.
    """
    autocast = launched_autocast(settings)
    if autocast == "auto":
        autocast = (find_fields(output_dir) or {}).get("autocast") or name_dtype(choose_fast_dtype("auto", device))
    return replace(settings, autocast=autocast)


@contextmanager
def _lock(output_dir: Path, processes: Processes) -> Iterator[None]:
    """The output for this training alone; the main process asks, the others wait for its answer."""
    if not processes.is_main:
        processes.wait()
        yield
        return
    with lock_output(output_dir):
        refuse_foreign_files(output_dir)
        processes.wait()
        yield


def binding_settings(settings: TrainSettings) -> dict[str, Any]:
    """Those that a training must have in common with what it goes on from."""
    return {k: v for k, v in asdict(settings).items() if k not in UNBOUND_SETTINGS}


def _resume(
    output_dir: Path, training: TrainState, identity: Mapping[str, Any], progress: Progress
) -> tuple[int, Cursor, _Running]:
    found = find_checkpoint(output_dir)
    if found is None:
        return 0, Cursor(), _Running()
    path, state = found
    for damaged in newer_checkpoints(path):
        progress.say(f"{damaged} is damaged and passed over.")
    progress.say(f"Goes on after step {state['step']:,}, from {path}.")
    refuse_other_settings(state, identity, output_dir)
    load_checkpoint(path, tensors=training.tensors(), optimizer=training.optimizer)
    training.scaler.load_state_dict(state["scaler"])
    running = _Running(state["first_losses"], state["last_losses"], state["seconds"])
    running.sums, running.counts = state["open_sums"], state["open_counts"]
    return state["step"], Cursor(**state["cursor"]), running


def _refuse_other_starts(processes: Processes, start: Mapping[str, Any]) -> None:
    """CapfiltError on every process where one of them would begin elsewhere than the others."""
    starts = processes.gather_objects(dict(start))
    if odd := [name for name in start if any(other[name] != starts[0][name] for other in starts)]:
        found = "; ".join(f"process {rank}: {other[odd[0]]}" for rank, other in enumerate(starts))
        raise CapfiltError(
            f"The processes do not begin together: {odd[0]} differs ({found[:500]}). Every process has to see the same "
            "--output, runs and models: put them on a disk that all machines share."
        )


def _save(
    output_dir: Path, training: TrainState, step: int, cursor: Cursor, identity: Mapping[str, Any], running: _Running
) -> None:
    state = {
        "step": step, "cursor": asdict(cursor), "fields": dict(identity),
        "first_losses": running.first_losses, "last_losses": running.last_losses,
        "open_sums": running.sums, "open_counts": running.counts,
        "seconds": running.seconds + time.monotonic() - running.since,
        "scaler": training.scaler.state_dict(),
    }  # fmt: skip
    is_main = training.processes.is_main
    save_checkpoint(output_dir, tensors=training.tensors(), optimizer=training.optimizer, state=state, write=is_main)
    training.processes.wait()


def _summary(running: _Running, settings: TrainSettings, processes: Processes) -> TrainSummary:
    num_images = settings.max_steps * settings.batch_size * settings.accumulation_steps * processes.num
    return TrainSummary(
        steps=settings.max_steps,
        seconds=round(running.seconds, 3),
        images_per_second=round(num_images / max(running.seconds, 1e-9), 2),
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
    record = read_training_record(output_dir)
    if record is None:
        return None
    refuse_other_settings(record, identity, output_dir)
    refuse_damaged_model(output_dir, record["sha256"])
    return TrainSummary(**{**record["summary"], "already_done": True})
