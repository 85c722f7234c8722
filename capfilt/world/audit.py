"""The manifest of a world's run against the world's truth: how much is true, and what the filter does.

In: manifest rows, and the truth table that `WorldSite.write_truth` wrote. Out: counts by source.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from capfilt.world.language import judge
from capfilt.world.scenes import Scene, draw_scene
from capfilt.world.web_texts import strip_markup


@dataclass
class SourceAudit:
    """Pairs of one source, counted; a pair is judged when the filter has scored it."""

    num_pairs: int = 0
    num_true: int = 0
    num_kept: int = 0
    num_kept_true: int = 0
    num_judged: int = 0
    num_judged_true: int = 0

    @property
    def share_true(self) -> float:
        """True pairs over all pairs: what a training would get without the filter."""
        return _share(self.num_true, self.num_pairs)

    @property
    def precision(self) -> float:
        """True pairs over kept pairs."""
        return _share(self.num_kept_true, self.num_kept)

    @property
    def recall(self) -> float:
        """Kept true pairs over the true pairs that the filter judged."""
        return _share(self.num_kept_true, self.num_judged_true)


def audit_manifest(manifest: pa.Table, truth_file: Path) -> dict[str, SourceAudit]:
    """Judge every pair; source → counts.

    `manifest` needs the columns url, source, text, itm_score, kept; `truth_file` is what `write_truth` wrote.
    """
    audits: dict[str, SourceAudit] = {}
    columns = [manifest[name].to_pylist() for name in ("source", "itm_score", "kept")]
    for source, score, kept, is_true in zip(*columns, judge_pairs(manifest, truth_file), strict=True):
        audit = audits.setdefault(source, SourceAudit())
        audit.num_pairs += 1
        audit.num_true += is_true
        audit.num_kept += kept
        audit.num_kept_true += kept and is_true
        audit.num_judged += score is not None
        audit.num_judged_true += score is not None and is_true
    return audits


def judge_pairs(manifest: pa.Table, truth_file: Path) -> list[bool]:
    """Whether each pair is true of its scene; `manifest` needs the columns url, source, text."""
    scenes = read_scenes(truth_file)
    columns = [manifest[name].to_pylist() for name in ("url", "source", "text")]
    return [
        judge(strip_markup(text) if source == "web" else text, scenes[url]).is_true
        for url, source, text in zip(*columns, strict=True)
    ]


def sum_audits(audits: Mapping[str, SourceAudit]) -> SourceAudit:
    """All sources together."""
    total = SourceAudit()
    for audit in audits.values():
        for name in vars(total):
            setattr(total, name, getattr(total, name) + getattr(audit, name))
    return total


def read_scenes(truth_file: Path) -> dict[str, Scene]:
    """URL → the scene behind it."""
    rows: list[dict[str, Any]] = pq.read_table(truth_file, columns=["url", "scene_seed", "split"]).to_pylist()
    return {row["url"]: draw_scene(row["scene_seed"], row["split"]) for row in rows}


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0
