"""`make bench`: capfilt beside what a user could pick instead, same weights, same precision, in one run.

    python -m benchmarks [--full] [--only WORK,...] [--rounds N] [--models build/bench-models] [--json FILE]
                         [--data-juicer PYTHON]

In: nothing but the package and the tests' factories. Out: a table of ratios with the goals of each, the seconds and
the peak memory behind them, and the same as JSON. The short form is a first look: BLIP-base in float32, two rounds.
`--full` takes five rounds, and bfloat16, BLIP-large, and the shard loop beside its models alone too.
`benchmarks/LOG.md` keeps what was measured where and when.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.models import make_models
from benchmarks.sides import Case, data_juicer_captioning
from benchmarks.timing import Timed, find_floor, time_sides
from benchmarks.works import SIDES

DTYPES = ("float32", "bfloat16")
PACKAGES = ("torch", "transformers", "open_clip_torch")
OURS = "capfilt"
DATA_JUICER = "data-juicer"
DATA_JUICER_MISSING = """Left out: data-juicer. It wants an environment of its own:
  uv venv --python 3.11 build/data-juicer
  uv pip install --python build/data-juicer py-data-juicer==1.6.1 torch==2.8.0 torchvision transformers==4.57.1 ray
  python -m benchmarks --data-juicer build/data-juicer/bin/python"""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A piece of work, and how many times as fast as each other side we mean to be."""

    name: str
    work: str
    goals: dict[str, tuple[float | None, ...]]
    """Side → goals in each of `dtypes`; None where the ratio is only reported."""
    batch_size: int
    size: str = "base"
    num_texts: int = 3
    num_images: int = 8
    realistic_ends: bool = False
    dtypes: tuple[str, ...] = DTYPES
    full: bool = False
    """Measured with --full alone."""


_PAIRS, _ONCE = "transformers, pair by pair", "transformers, image once"
_PLAIN = "transformers, a pass a loss"
_SCRIPT, _ONE_BY_ONE, _ALONE, _FLOOR = "script", "script, one by one", "models alone", "floor"
ROWS = (
    Row(name="decode 10 x 20 tokens", work="decode", goals={"transformers": (6.0, 4.5)}, batch_size=8),
    Row(
        name="decode, realistic ends", work="decode", goals={"transformers": (8.0, 5.5)}, batch_size=8,
        realistic_ends=True,
    ),
    Row(name="caption, pixels to texts", work="caption", goals={"transformers": (3.3, 2.4)}, batch_size=4),
    Row(name="ITM, 3 texts", work="itm", goals={_PAIRS: (3.8, None), _ONCE: (1.4, None)}, batch_size=2),
    Row(
        name="ITM, 12 texts", work="itm", goals={_PAIRS: (13.0, None), _ONCE: (2.3, None)}, batch_size=2, num_texts=12
    ),
    Row(name="CLIP ViT-L/14, 10 texts", work="clip", goals={"open_clip": (2.2, 3.5)}, batch_size=4),
    Row(
        name="run, JPEG to manifest", work="run", batch_size=8,
        goals={_SCRIPT: (2.7, 2.4), _FLOOR: (1 / 1.2, 1 / 1.2)},
    ),
    Row(
        name="run, two batches", work="run", batch_size=8, num_images=16, goals={_ALONE: (1 / 1.03, 1 / 1.03)},
        full=True,
    ),
    Row(
        name="run, JPEG to manifest", work="run", batch_size=32, num_images=256, size="embedded",
        goals={_SCRIPT: (5.0,)}, dtypes=("float32",),
    ),
    Row(
        name="run, beside one picture at a time", work="run", batch_size=32, num_images=64, size="embedded",
        goals={_ONE_BY_ONE: (None,)}, dtypes=("float32",), full=True,
    ),
    Row(
        name="caption, pixels to texts", work="caption", goals={DATA_JUICER: (None,)}, batch_size=8,
        dtypes=("float32",), full=True,
    ),
    Row(
        name="caption, pixels to texts", work="caption", goals={"transformers": (2.0, 1.7)}, batch_size=4,
        size="large", full=True,
    ),
    Row(name="stage-1 step, ViT-L/14", work="stage1", goals={_PLAIN: (1.5, None)}, batch_size=8, size="vit-l"),
)  # fmt: skip
"""A ratio beside the models alone, or the floor, is at most 1: what they take, over what we take."""


def measure(row: Row, dtype: str, models: Path, rounds: int, data_juicer: str = "") -> dict[str, Any]:
    """The row's figures in one precision; `data_juicer` is the interpreter of the row that has it."""
    case = Case(
        models=models, size=row.size, dtype=dtype, batch_size=row.batch_size, num_texts=row.num_texts,
        num_images=row.num_images, realistic_ends=row.realistic_ends,
    )  # fmt: skip
    others = {DATA_JUICER: data_juicer_captioning(data_juicer, case)} if DATA_JUICER in row.goals else {}
    sides = [OURS, *(name for name in row.goals if name in SIDES[row.work])]
    timed = time_sides(row.work, case, rounds, sides, others)
    if _FLOOR in row.goals:
        timed[_FLOOR] = Timed([find_floor(case)])
    ours = timed[OURS]
    num_images = row.num_images if row.work == "run" else row.batch_size
    return {
        "name": row.name, "size": row.size, "dtype": dtype, "batch_size": row.batch_size, "num_images": num_images,
        "sides": {name: _figures(side, num_images) for name, side in timed.items()},
        "ratios": {
            name: {
                "median": timed[name].median / ours.median, "minimum": timed[name].minimum / ours.minimum,
                "goal": goals[row.dtypes.index(dtype)],
            }
            for name, goals in row.goals.items()
        },
    }  # fmt: skip


def _figures(timed: Timed, num_images: int) -> dict[str, Any]:
    return {
        "median_seconds_per_image": timed.median / num_images, "minimum_seconds_per_image": timed.minimum / num_images,
        "peak_mib": timed.peak_mib, "seconds": timed.seconds,
    }  # fmt: skip


def table(found: Sequence[dict[str, Any]]) -> str:
    """Markdown: a line for each ratio."""
    lines = [
        "| work | size | precision | beside | s/image | capfilt | ratio (min) | goal | MiB | capfilt |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in found:
        ours = row["sides"][OURS]
        for name, ratio in row["ratios"].items():
            other = row["sides"][name]
            cells = [
                row["name"], row["size"], row["dtype"], name,
                f"{other['median_seconds_per_image']:.3f}", f"{ours['median_seconds_per_image']:.3f}",
                f"{ratio['median']:.2f} ({ratio['minimum']:.2f})", f"{ratio['goal']:.2f}" if ratio["goal"] else "",
                f"{other['peak_mib']:,.0f}" if other["peak_mib"] else "", f"{ours['peak_mib']:,.0f}",
            ]  # fmt: skip
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def machine(data_juicer: str = "") -> dict[str, Any]:
    """What it was measured on."""
    model = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {
        "cpu": model,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **versions,
        **({DATA_JUICER: _read_versions(data_juicer)} if data_juicer else {}),
    }


def _read_versions(data_juicer: str) -> dict[str, str]:
    code = "import json, benchmarks.data_juicer as side; print(json.dumps(side.read_versions()))"
    return json.loads(subprocess.run([data_juicer, "-c", code], check=True, capture_output=True, text=True).stdout)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--full", action="store_true", help="every row, in bfloat16 too")
    parser.add_argument("--only", default="", help=f"names of works, with commas: {', '.join(SIDES)}")
    parser.add_argument("--rounds", type=int, help="passes of each side, after one that warms up; 2, with --full 5")
    parser.add_argument("--models", type=Path, default=Path("build/bench-models"), help="where the models are made")
    parser.add_argument("--data-juicer", default="", metavar="PYTHON", help="interpreter of its environment")
    parser.add_argument("--json", type=Path, default=Path("build/bench.json"), help="where the figures are written")
    options = parser.parse_args()
    works = set(options.only.split(",")) - {""}
    if unknown := works - SIDES.keys():
        parser.error(f"--only {', '.join(sorted(unknown))}: expected some of {', '.join(SIDES)}")
    rows = [row for row in ROWS if (options.full or not row.full) and (not works or row.work in works)]
    if not options.data_juicer and any(DATA_JUICER in row.goals for row in rows):
        rows = [row for row in rows if DATA_JUICER not in row.goals]
        print(DATA_JUICER_MISSING, flush=True)
    options.models.mkdir(parents=True, exist_ok=True)
    for size in sorted({row.size for row in rows} & {"base", "large"}):
        make_models(options.models, size)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    found, measured_on = [], machine(options.data_juicer)
    for row in rows:
        for dtype in row.dtypes if options.full else row.dtypes[:1]:
            rounds = options.rounds or (5 if options.full else 2)
            found.append(measure(row, dtype, options.models, rounds, options.data_juicer))
            options.json.write_text(json.dumps({"machine": measured_on, "rows": found}, indent=2) + "\n")
            print(*table(found[-1:]).splitlines()[2:], sep="\n", flush=True)
    print(", ".join(f"{name} {value}" for name, value in measured_on.items()))
    print(table(found))


if __name__ == "__main__":
    main()
