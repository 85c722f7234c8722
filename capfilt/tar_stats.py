"""Statistics of a folder of WebDataset tars that is no run: what `capfilt import` would find in it, without a copy.

In: a folder with tars, as img2dataset or webdataset wrote them. Out: a `RunStats` without stages, scores or choices:
samples and what they lack, formats, sizes, shapes, lengths and words of the captions; of a folder of img2dataset's,
which has a table beside each tar, the rows that failed too, with their reasons and hosts.
Pictures are not decoded; their headers are read. Memory holds one member of a tar, and the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from capfilt.curation.import_samples import FoundSample, group_members, look_at_sample
from capfilt.data.foreign_rows import failed_rows
from capfilt.data.foreign_tars import read_foreign_tar
from capfilt.data.schemas import SCHEMAS, SUCCESS
from capfilt.engines.base import SHARDS, Engine
from capfilt.engines.local import LocalEngine
from capfilt.errors import UsageError
from capfilt.progress import Progress
from capfilt.report.download_sums import COLUMNS
from capfilt.report.pair_sums import PairSums
from capfilt.report.shard_stats import ShardSize, ShardSums
from capfilt.report.stats import RunStats, stats_of

_ROWS_AT_A_TIME = 10_000
_ROWS = pa.schema([SCHEMAS["shards"].field(name) for name in [*COLUMNS, "caption"]])
_PAIR_COLUMNS = ("text", "clip_score", "itm_score", "kept", "drop_reason")
_PAIRS = pa.schema([SCHEMAS["manifest"].field(name) for name in _PAIR_COLUMNS])


def is_folder_of_tars(path: Path) -> bool:
    """Whether there are tars right in it."""
    return path.is_dir() and any(tar.is_file() for tar in path.glob("*.tar"))


def compute_tar_stats(folder: Path, engine: Engine | None = None, progress: Progress | None = None) -> RunStats:
    """Sum up every tar of a folder; what a damaged one has before its damage counts.

    Raises UsageError where there is no tar, OSError where one cannot be read.
    """
    tars = sorted(str(path) for path in folder.glob("*.tar") if path.is_file())
    if not tars:
        raise UsageError(f"{folder} has no tars. Give a run, or a folder of WebDataset tars.")
    sums = ShardSums()
    for _, found in (engine or LocalEngine()).run(_SumTars(len(tars)), tars, progress):
        sums.merge(found)
    return stats_of(sums, name=str(folder), num_shards=len(tars))


@dataclass(frozen=True)
class _SumTars:
    """Sums up tars; other processes get it too."""

    total: int
    unit = SHARDS
    is_light, has_models = True, False
    title = "stats"

    def open(self) -> _SumTars:
        return self

    def __call__(self, tar: str, _progress: Progress) -> ShardSums:
        sums, num_images = ShardSums(), 0
        for table in _tables(Path(tar)):
            sums.download.add(table)
            images = table.filter(pc.equal(table["status"], SUCCESS))
            num_images += images.num_rows
            nothing = {name: pa.nulls(len(images), _PAIRS.field(name).type) for name in _PAIR_COLUMNS[1:]}
            kept = pa.array([True] * len(images))
            pairs = pa.table({"text": images["caption"], **nothing, "kept": kept}, schema=_PAIRS)
            sums.pairs.setdefault("web", PairSums()).add(pairs)
        table = Path(tar).with_suffix(".parquet")
        for failed in failed_rows(table) if table.is_file() else ():
            sums.download.add_outcomes(failed)
        sums.sizes.append(ShardSize(Path(tar).stem, num_images, Path(tar).stat().st_size))
        return sums


def _tables(tar: Path) -> Iterator[pa.Table]:
    rows: list[dict[str, Any]] = []
    with tar.open("rb") as stream:
        for sample in group_members(read_foreign_tar(stream)):
            rows.append(_row_of(look_at_sample(sample)))
            if len(rows) == _ROWS_AT_A_TIME:
                yield pa.Table.from_pylist(rows, schema=_ROWS)
                rows = []
    if rows:
        yield pa.Table.from_pylist(rows, schema=_ROWS)


def _row_of(sample: FoundSample) -> dict[str, Any]:
    status = SUCCESS if sample.reason is None else "failed_to_resize"
    return {"key": sample.original_key, "status": status, "reason": sample.reason, "caption": sample.caption} | (
        sample.values if sample.reason is None else {}
    )
