"""Metrics, curves and plot, read back by what users read them with."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from capfilt.errors import UsageError
from capfilt.train.records import Records


def lines_of(count: int, last: float = 1.0) -> list[dict]:
    return [
        {"step": 10 * (n + 1), "loss": last + 0.5 * (count - 1 - n), "itc": 2.0, "learning_rate": 1e-4 / (n + 1)}
        for n in range(count)
    ]


def write(folder: Path, lines: list[dict], *, tensorboard: bool = False) -> None:
    records = Records(folder, tensorboard=tensorboard)
    records.go_on(0)
    for line in lines:
        records.add(line)
    records.finish()


def test_a_line_each_and_a_plot_that_shows_the_losses(tmp_path: Path) -> None:
    write(tmp_path, lines_of(8))
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == lines_of(8)
    plot = np.asarray(Image.open(tmp_path / "losses.png").convert("RGB")).astype(int)
    assert plot.shape == (720, 960, 3)
    blue = (plot[:, :, 2] > plot[:, :, 0] + 60) & (plot[:, :, 2] > 120)  # matplotlib's first colour: the loss
    left, right = blue[:480, 100:300].nonzero()[0].mean(), blue[:480, 500:700].nonzero()[0].mean()
    assert left < right, "the loss falls, so its curve does"


def test_a_plot_of_one_line_has_points(tmp_path: Path) -> None:
    write(tmp_path, lines_of(1))
    plot = np.asarray(Image.open(tmp_path / "losses.png").convert("RGB")).astype(int)
    blue = (plot[:, :, 2] > plot[:, :, 0] + 60) & (plot[:, :, 2] > 120)
    height, width = blue.shape
    assert blue[: height * 2 // 3, width // 4 : width * 3 // 4].any(), "in the middle, not in the legend"


def test_lines_of_steps_taken_again_are_dropped(tmp_path: Path) -> None:
    write(tmp_path, lines_of(8))
    with open(tmp_path / "metrics.jsonl", "a") as handle:
        handle.write('{"step": 90, "lo')  # a crash while it was written
    Records(tmp_path).go_on(40)
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == [10, 20, 30, 40]


def test_lines_are_there_whenever_a_process_that_goes_on_is_killed(tmp_path: Path) -> None:
    """At every call that it makes."""
    write(tmp_path, lines_of(8))
    expected, code = (
        (tmp_path / "metrics.jsonl").read_text(),
        """
import os, signal, sys
from pathlib import Path
from capfilt.train.records import Records
left = int(sys.argv[1])
def hook(event, arguments):
    global left
    if event in ("open", "os.rename") and "metrics.jsonl" in str(arguments[0]):
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(hook)
Records(Path(sys.argv[2])).go_on(80)
""",
    )
    for number in range(10):
        done = subprocess.run([sys.executable, "-c", code, str(number), str(tmp_path)], check=False)
        assert (tmp_path / "metrics.jsonl").read_text() == expected
        if done.returncode == 0:
            break
    assert (number, done.returncode) == (3, 0), "read, written, renamed"


def test_a_process_that_is_not_the_main_one_writes_nothing(tmp_path: Path) -> None:
    records = Records(tmp_path, active=False, tensorboard=True)
    records.go_on(0)
    records.add(lines_of(1)[0])
    records.finish()
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_reads_the_curves(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write(tmp_path, lines_of(5), tensorboard=True)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert set(events.Tags()["scalars"]) == {"loss", "itc", "learning_rate"}
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(line["step"], line["loss"]) for line in lines_of(5)]


def test_curves_of_steps_taken_again_are_dropped(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write(tmp_path, lines_of(5), tensorboard=True)
    records = Records(tmp_path, tensorboard=True)
    records.go_on(30)
    records.add({**lines_of(4)[3], "loss": 7.0})
    records.finish()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    kept = [(line["step"], line["loss"]) for line in lines_of(5)[:3]]
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [*kept, (40, 7.0)]


def test_without_tensorboard_the_message_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UsageError, match=r"capfilt\[tensorboard\]"):
        Records(tmp_path, tensorboard=True)
