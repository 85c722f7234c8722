"""What a recipe would take: images and bytes that are left, hours by a measured probe, room on the disk.

In: a recipe and a run. Out: an `Estimate`. The run stays as it is: a probe works on a copy of a few images, in a
temporary directory, and does to them what the recipe would. Trainings are not part of it.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from capfilt.curation.annotate import annotate
from capfilt.data.commit import CommitRecord, commit_stage, input_digest, read_stage
from capfilt.data.paths import AnyPath, size_of
from capfilt.data.per_shard import records_of
from capfilt.data.retries import planned_shards, stage_shards
from capfilt.data.rundir import STAGES, RunDir, is_run
from capfilt.data.schemas import SCHEMAS
from capfilt.data.shards import read_located, sample_rows
from capfilt.data.tars import write_tar
from capfilt.errors import UsageError
from capfilt.pipeline import stages_of
from capfilt.plan import StepPlan
from capfilt.progress import NullProgress
from capfilt.recipes import Recipe

STAGE_BYTES_PER_IMAGE = 1_000
"""Of all stages together, where nothing was measured: ten captions of ten words (benchmarks/LOG.md)."""


@dataclass(frozen=True)
class Probe:
    """What a few images took."""

    num_images: int
    computing: str
    """Precision and device."""
    images_per_second: float
    bytes_per_image: float
    """Of the stages' files."""


@dataclass(frozen=True)
class Estimate:
    """What is there, and what is left."""

    num_shards: int
    num_images: int
    num_bytes: int
    """Of the tars."""
    rows_left: int | None
    """Rows of the URL table that are not downloaded yet; None where that is not known: no shard is there."""
    images_left: int
    """Images there that lack a stage, and as many of the rows left as there have been of others."""
    stages_left: tuple[str, ...]
    """What some of them lack. Those that lack only a part are reckoned as if they lacked all of it."""
    probe: Probe | None
    bytes_needed: int | None
    """For the shards and stages that are left; None where it is not known: no shard is there."""
    bytes_free: int | None
    """None where the run lies on an object store."""

    @property
    def hours(self) -> float | None:
        """Of one device like the probe's, for the stages that are left."""
        return None if self.probe is None else self.images_left / self.probe.images_per_second / 3600

    @property
    def fits(self) -> bool:
        """Whether the disk has room, as far as is known."""
        return self.bytes_needed is None or self.bytes_free is None or self.bytes_needed <= self.bytes_free


def estimate(
    recipe: Recipe,
    run_path: AnyPath,
    plans: Sequence[StepPlan],
    generation: str | None = None,
    *,
    num_probed: int = 0,
) -> Estimate:
    """What the recipe would take at a run, whether or not it is there.

    `plans` are those of `plan_recipe`, without differences.

    `num_probed` images are captioned, ranked and filtered as the recipe says, after as many to warm up; none: no probe.

    Raises UsageError for a probe of a run without images.
    """
    free = _bytes_free(run_path)
    run = RunDir.open(run_path, generation) if is_run(run_path) else None
    shards = stage_shards(run) if run else []
    if run is None or not shards:
        if num_probed:
            raise UsageError(f"There are no images in {run_path} to probe. Download some first, or leave --probe out.")
        return Estimate(0, 0, 0, None, 0, (), None, None, free)
    records = dict(zip(shards, records_of(run, "shards", shards), strict=True))
    num_images, num_bytes, num_rows = (
        sum(record.rows_kept for record in records.values()), _sum_of("tar_bytes", records.values()),
        max(_sum_of("table_rows", records.values()), 1),
    )  # fmt: skip
    rows_left = _rows_left(run, records) if recipe.source else 0
    lacking = set[str]().union(*(plan.lacking for plan in plans))
    stages = stages_of(recipe) if rows_left else [plan.name for plan in plans if plan.lacking]
    images_left = sum(records[shard].rows_kept for shard in lacking)
    images_left += round(rows_left * num_images / num_rows) if stages else 0
    probe = _probe(recipe, run, stages, sorted(lacking or shards), num_probed) if num_probed and images_left else None
    bytes_per_image = probe.bytes_per_image if probe else STAGE_BYTES_PER_IMAGE
    needed = round(rows_left * num_bytes / num_rows + images_left * bytes_per_image)
    return Estimate(len(shards), num_images, num_bytes, rows_left, images_left, tuple(stages), probe, needed, free)


def _bytes_free(path: AnyPath) -> int | None:
    """Of the disk that a path is or will be on."""
    if not isinstance(path, Path):
        return None
    return shutil.disk_usage(next(found for found in (path, *path.resolve().parents) if found.is_dir())).free


def _sum_of(name: str, records: Iterable[CommitRecord]) -> int:
    return sum(int(record.extra[name]) for record in records)


def _rows_left(run: RunDir, records: dict[str, CommitRecord]) -> int:
    """Rows of the URL table without a shard yet; none of a run that was imported."""
    planned = [records[shard] for shard in planned_shards(run)]
    num_rows = max((int(record.extra.get("source_rows", 0)) for record in planned), default=0)
    return max(num_rows - _sum_of("table_rows", planned), 0)


@dataclass
class _Watch(NullProgress):
    """Notes when each image was done."""

    title: str = ""
    seconds: list[float] = field(default_factory=list)

    def start(self, name: str, total: int | None, unit: str, /) -> None:
        """Keeps what the work is called: `annotate (bfloat16 on cuda)`."""
        self.title = name

    def advance(self, n: int = 1, /, *, already: bool = False, **fields: object) -> None:
        """Notes the time once for each image."""
        self.seconds += [time.perf_counter()] * n


def _probe(recipe: Recipe, run: RunDir, stages: Sequence[str], shards: Sequence[str], num_images: int) -> Probe:
    """Do the stages to some images of the shards that lack them; the first half is for warming up, and not timed."""
    samples = [(shard, row) for shard in shards for row in sample_rows(run, shard)[: 2 * num_images]][: 2 * num_images]
    if not samples:
        raise UsageError(f"The shards of {run.path} that are to be worked on have no images to probe.")
    halves = [samples[: len(samples) // 2] or samples, samples[len(samples) // 2 :]]
    with tempfile.TemporaryDirectory(prefix="capfilt-probe-") as folder:
        small, watch = RunDir.create(Path(folder) / "run"), _Watch()
        for number, half in enumerate(halves):
            _copy_shard(run, half, small, f"{number:05d}", stages[0])
        annotate(small, stages, recipe.caption, recipe.rank, recipe.filter, watch)
        warm, timed = len(halves[0]), len(halves[1])
        seconds = watch.seconds[-1] - watch.seconds[warm - 1]
        num_bytes = sum((size_of(small.stage_file(stage, "00001")) or 0) for stage in stages)
    computing = watch.title.partition("(")[2].rstrip(")") or "no model"
    return Probe(timed, computing, timed / max(seconds, 1e-9), num_bytes / timed)


def _copy_shard(
    run: RunDir, samples: Sequence[tuple[str, dict[str, Any]]], small: RunDir, name: str, before: str
) -> None:
    """A shard of the given samples, with the stages before `before`."""
    members: list[tuple[str, bytes]] = []
    for shard, row in samples:
        sample = read_located(run, shard, row)
        files = {row["image_ext"]: sample.image, "txt": sample.web_caption.encode(), "json": b"{}"}
        members += [(f"{row['key']}.{ending}", data) for ending, data in files.items()]
    keys, num = pa.array([row["key"] for _, row in samples]), len(samples)
    sources = list(dict.fromkeys(shard for shard, _ in samples))
    with small.new_staging() as staging:
        index = write_tar(staging / "shard.tar", members)[::3]
        rows = _rows_of(run, "shards", sources, keys)[0]
        for column in ("image_offset", "image_length"):
            place = rows.schema.get_field_index(column)
            values = [getattr(member, column.removeprefix("image_")) for member in index]
            rows = rows.set_column(place, rows.schema.field(column), pa.array(values, rows.schema.field(column).type))
        commit_stage(
            small, "shards", name, rows, fields={}, input_digest="probe", rows_in=num, tar=staging / "shard.tar",
            extra={"num_shards": 2, "source_rows": 2 * num},
        )  # fmt: skip
    for stage in STAGES[1 : STAGES.index(before)]:
        rows, record = _rows_of(run, stage, sources, keys)
        num_kept = pc.count_distinct(rows["key"]).as_py()
        commit_stage(
            small, stage, name, rows, fields=record.fields, input_digest=input_digest(small, stage, name),
            rows_in=num_kept,
        )  # fmt: skip


def _rows_of(run: RunDir, stage: str, shards: Sequence[str], keys: pa.Array) -> tuple[pa.Table, CommitRecord]:
    """Rows of some samples in a stage, in order, and the record of the last of the shards."""
    read = [read_stage(run.read_file(stage, shard), SCHEMAS[stage].names) for shard in shards]
    rows = pa.concat_tables(table for table, _ in read)
    return rows.filter(pc.is_in(rows["key"], value_set=keys)), read[-1][1]
