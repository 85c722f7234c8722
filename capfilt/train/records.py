"""What a training says of itself: a line of metrics now and then, curves for TensorBoard, a plot at the end.

In: averaged losses. Out, in the output directory

    metrics.jsonl   a line per `log_every_steps`: step, averaged losses, learning_rate, images_per_second
    tensorboard/    the same as curves, where asked for
    losses.png      the losses and the learning rate over the steps, drawn when the training ends
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from capfilt.errors import UsageError

METRICS_FILE, PLOT_FILE = "metrics.jsonl", "losses.png"
_NO_LOSSES = ("step", "learning_rate", "images_per_second", "grad_norm")


class Records:
    """Written by one process; another one's are not `active` and write nothing. `go_on` comes first."""

    def __init__(self, output_dir: Path, *, active: bool = True, tensorboard: bool = False) -> None:
        self._path = output_dir / METRICS_FILE
        self._plot = output_dir / PLOT_FILE
        self._active = active
        self._curves_dir = output_dir / "tensorboard" if active and tensorboard else None
        self._writer = _find_tensorboard() if self._curves_dir else None
        self._curves: Any = None

    def go_on(self, step: int) -> None:
        """Drops the lines and the curves of steps that will be taken again; all of them at step 0."""
        if not self._active:
            return
        if self._writer is not None:
            self._curves = self._writer(str(self._curves_dir), purge_step=step + 1)
        lines = self._path.read_text().splitlines(keepends=True) if self._path.exists() else []
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
        new = self._path.with_name(
            f".staging-{METRICS_FILE}"
        )  # killed in the middle of this, the lines are there still
        new.write_text("".join(kept))
        os.replace(new, self._path)

    def add(self, line: Mapping[str, Any]) -> None:
        """One line of metrics."""
        if not self._active:
            return
        with open(self._path, "a") as handle:
            handle.write(json.dumps(dict(line)) + "\n")
        for name, value in line.items():
            if self._curves is not None and name != "step":
                self._curves.add_scalar(name, value, line["step"])

    def close(self) -> None:
        """Writes out the curves, which TensorBoard's writer holds back for minutes."""
        if self._curves is not None:
            self._curves.close()

    def finish(self) -> None:
        """Draws the plot."""
        if not self._active:
            return
        plot_losses([json.loads(line) for line in self._path.read_text().splitlines()], self._plot)


def plot_losses(lines: list[dict[str, Any]], path: Path) -> None:
    """A PNG with a curve for each loss, and the learning rate below."""
    from matplotlib.figure import Figure

    steps = [line["step"] for line in lines]
    figure = Figure(figsize=(8, 6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    marker = "." if len(steps) < 3 else ""
    for name in [name for name in lines[0] if name not in _NO_LOSSES] if lines else []:
        above.plot(steps, [line.get(name, math.nan) for line in lines], label=name, marker=marker)
    below.plot(steps, [line["learning_rate"] for line in lines], color="0.4", marker=marker)
    above.set_ylabel("loss")
    below.set_ylabel("learning rate")
    below.set_xlabel("step")
    above.grid(alpha=0.3)
    if lines:
        above.legend()
    figure.savefig(path, dpi=120)


def _find_tensorboard() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UsageError("--tensorboard needs the package tensorboard: pip install 'capfilt[tensorboard]'.") from None
    return SummaryWriter
