"""`make bench`: capfilt beside what a user could pick instead, same weights, same precision, in one run.

    python -m benchmarks [--full] [--only WORK,...] [--rounds 5] [--models build/bench-models] [--json FILE]

In: nothing but the package and the tests' factories. Out: a table of ratios with the goals of each, the seconds and
the peak memory behind them, and the same as JSON. The short form takes BLIP-base and a quarter of an hour on two
cores; `--full` adds BLIP-large and larger batches. `benchmarks/LOG.md` keeps what was measured where and when.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.models import make_models
from benchmarks.sides import Case
from benchmarks.timing import Timed, time_sides

DTYPES = ("float32", "bfloat16")
PACKAGES = ("torch", "transformers", "open_clip_torch")
OURS = "capfilt"


@dataclass(frozen=True, kw_only=True)
class Row:
    """A piece of work, and how many times as fast as each other side we mean to be."""

    name: str
    work: str
    goals: dict[str, tuple[float, float]]
    """Side → goals in float32 and bfloat16."""
    batch_size: int
    size: str = "base"
    num_texts: int = 3
    realistic_ends: bool = False
    full: bool = False
    """Measured with --full alone."""


_PAIRS, _ONCE = "transformers, pair by pair", "transformers, image once"
ROWS = (
    Row(name="decode 10 x 20 tokens", work="decode", goals={"transformers": (6.0, 4.5)}, batch_size=8),
    Row(
        name="decode, realistic ends", work="decode", goals={"transformers": (8.0, 5.5)}, batch_size=8,
        realistic_ends=True,
    ),
    Row(name="caption, pixels to texts", work="caption", goals={"transformers": (3.3, 2.4)}, batch_size=4),
    Row(name="ITM, 3 texts", work="itm", goals={_PAIRS: (3.8, 3.8), _ONCE: (1.4, 1.4)}, batch_size=2),
    Row(name="ITM, 12 texts", work="itm", goals={_PAIRS: (13.0, 13.0), _ONCE: (2.3, 2.3)}, batch_size=2, num_texts=12),
    Row(name="CLIP ViT-L/14, 10 texts", work="clip", goals={"open_clip": (2.2, 3.5)}, batch_size=4),
    Row(
        name="caption, pixels to texts", work="caption", goals={"transformers": (2.0, 1.7)}, batch_size=4,
        size="large", full=True,
    ),
)  # fmt: skip


def measure(row: Row, dtype: str, models: Path, rounds: int) -> dict[str, Any]:
    """The row's figures in one precision."""
    case = Case(
        models=models, size=row.size, dtype=dtype, batch_size=row.batch_size, num_texts=row.num_texts,
        realistic_ends=row.realistic_ends,
    )  # fmt: skip
    timed = time_sides(row.work, case, rounds)
    ours = timed[OURS]
    return {
        "name": row.name, "size": row.size, "dtype": dtype, "batch_size": row.batch_size,
        "sides": {name: _figures(side, row.batch_size) for name, side in timed.items()},
        "ratios": {
            name: {
                "median": timed[name].median / ours.median, "minimum": timed[name].minimum / ours.minimum,
                "goal": goals[DTYPES.index(dtype)],
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
                f"{ratio['median']:.1f} ({ratio['minimum']:.1f})", f"{ratio['goal']:.1f}",
                f"{other['peak_mib']:,.0f}", f"{ours['peak_mib']:,.0f}",
            ]  # fmt: skip
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def machine() -> dict[str, Any]:
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
    } | versions


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--full", action="store_true", help="BLIP-large too")
    parser.add_argument("--only", default="", help="names of works, with commas: decode, caption, itm, clip")
    parser.add_argument("--rounds", type=int, default=5, help="passes of each side, after one that warms up")
    parser.add_argument("--models", type=Path, default=Path("build/bench-models"), help="where the models are made")
    parser.add_argument("--json", type=Path, default=Path("build/bench.json"), help="where the figures are written")
    options = parser.parse_args()
    works = set(options.only.split(",")) - {""}
    rows = [row for row in ROWS if (options.full or not row.full) and (not works or row.work in works)]
    options.models.mkdir(parents=True, exist_ok=True)
    for size in sorted({row.size for row in rows}):
        make_models(options.models, size)
    found = []
    for row in rows:
        for dtype in DTYPES:
            found.append(measure(row, dtype, options.models, options.rounds))
            print(*table(found[-1:]).splitlines()[2:], sep="\n", flush=True)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps({"machine": machine(), "rows": found}, indent=2) + "\n")
    print(", ".join(f"{name} {value}" for name, value in machine().items()))
    print(table(found))


if __name__ == "__main__":
    main()
