"""What one shard contributes to the statistics of a run: sums that are added up in any order.

In: a run and the name of a shard. Out: a `ShardSums`. Stages that the shard does not have yet contribute nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pyarrow.compute as pc

from capfilt.data.commit import CommitRecord, read_commit_record, read_quarantine, read_stage, read_table
from capfilt.data.retries import LastAttempts
from capfilt.data.rundir import RunDir
from capfilt.data.sealed import read_record
from capfilt.data.texts import clean_for_terminal
from capfilt.report.download_sums import COLUMNS, DownloadSums
from capfilt.report.histogram import counts_of
from capfilt.report.pair_sums import CaptionSums, ImageSums, PairSums, scores_of_repeats

SELECTION = ("threshold", "keep", "include_web", "sources")
"""Parameters of a manifest that are shown."""


@dataclass(frozen=True)
class ShardSize:
    """One shard's."""

    shard: str
    num_images: int
    num_bytes: int
    """Of its tar."""


@dataclass(frozen=True)
class Asked:
    """What every shard is asked."""

    run: RunDir
    last: LastAttempts
    num_sampled: int
    """Images of a shard whose captions are compared."""


@dataclass
class ShardSums:
    """All of it."""

    sizes: list[ShardSize] = field(default_factory=list)
    selections: list[dict[str, Any]] = field(default_factory=list)
    """Different parameters of the manifests."""
    download: DownloadSums = field(default_factory=DownloadSums)
    captions: CaptionSums = field(default_factory=CaptionSums)
    pairs: dict[str, PairSums] = field(default_factory=dict)
    """By source."""
    images: ImageSums = field(default_factory=ImageSums)
    quarantine: dict[str, Counter[str]] = field(default_factory=dict)
    """Stage → reason → rows."""

    def merge(self, other: ShardSums) -> None:
        """Add another shard's."""
        self.sizes += other.sizes
        self.selections += [one for one in other.selections if one not in self.selections]
        self.download.merge(other.download)
        self.captions.merge(other.captions)
        self.images.merge(other.images)
        for source, sums in other.pairs.items():
            self.pairs.setdefault(source, PairSums()).merge(sums)
        for stage, reasons in other.quarantine.items():
            self.quarantine.setdefault(stage, Counter()).update(reasons)


def sum_shard(asked: Asked, shard: str, stages: Collection[str]) -> ShardSums:
    """Sum up the given stages of a shard, which are committed. Raises CorruptionError for damage in what is read."""
    sums = ShardSums()
    for stage in stages:
        record = _ADD[stage](asked, shard, sums, stages)
        rows = read_quarantine(asked.run, stage, shard, record)
        if rows.num_rows:
            reasons = (asked.last.of(shard, rows) if stage == "shards" else rows)["reason"]
            sums.quarantine[stage] = Counter(counts_of(reasons))
    return sums


def _add_download(asked: Asked, shard: str, sums: ShardSums, _stages: Any) -> CommitRecord:
    table, record = read_stage(asked.run.read_file("shards", shard), COLUMNS)
    sums.download.add(asked.last.of(shard, table))
    sums.sizes.append(ShardSize(shard, record.rows_kept, int(record.extra.get("tar_bytes", 0))))
    return record


def _add_captions(asked: Asked, shard: str, sums: ShardSums, stages: Collection[str]) -> CommitRecord:
    path = asked.run.read_file("captions", shard)
    if "manifest" in stages:  # which has their texts too
        return read_commit_record(path)
    table, record = read_stage(path, ["key", "text"])
    sums.captions.add(table, asked.num_sampled)
    return record


def _add_pairs(asked: Asked, shard: str, sums: ShardSums, stages: Collection[str]) -> CommitRecord:
    columns = ["key", "source", "text", "clip_score", "itm_score", "kept", "drop_reason"]
    table, record = read_stage(asked.run.read_file("manifest", shard), columns)
    sources = {
        source: table.filter(pc.equal(table["source"], source)) for source in pc.unique(table["source"]).to_pylist()
    }
    for source, rows in sources.items():
        sums.pairs.setdefault(clean_for_terminal(source, 20), PairSums()).add(rows)  # a run may be somebody else's
    if "synthetic" in sources:
        sums.pairs["synthetic"].leave_out(scores_of_repeats(table))
    sums.images.add(table)
    sums.selections.append({name: record.fields[name] for name in SELECTION if name in record.fields})
    if "captions" in stages:
        is_whole = "synthetic" in sources and {"clip", "itm"} <= set(stages) and _holds_captions(asked.run, shard)
        path = asked.run.read_file("captions", shard)
        written = sources["synthetic"] if is_whole else read_table(path, ["key", "text"])
        sums.captions.add(written, asked.num_sampled)
    return record


def _holds_captions(run: RunDir, shard: str) -> bool:
    """Whether the manifest was made from the captions that are there now, of every image: one file less to read."""
    records = [read_record(run.read_file(stage, shard))[:2] for stage in ("captions", "clip", "itm", "manifest")]
    chain = all(record["input_digest"] == seal for (_, seal), (record, _) in pairwise(records))
    return chain and records[-1][0]["rows_kept"] == records[0][0]["rows_kept"]


def _add_nothing(*_: Any) -> None:
    """Their rows are counted in the manifest."""


_ADD: Mapping[str, Any] = {
    "shards": _add_download, "captions": _add_captions, "clip": _add_nothing, "itm": _add_nothing,
    "manifest": _add_pairs,
}  # fmt: skip
