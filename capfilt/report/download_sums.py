"""What the rows of the URL table became, added up: statuses, reasons, hosts, formats, sizes, shapes.

In: rows of the stage `shards`. Out: a `DownloadSums`; memory grows with the number of hosts alone.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from capfilt.data.schemas import SUCCESS
from capfilt.report.histogram import counts_of

COLUMNS = ["key", "url", "status", "reason", "width", "height", "image_ext"]
"""That are read."""
EDGE_BOUNDS_PX = (32, 64, 128, 256, 384, 512, 768, 1024)
"""Bounds of the histogram of shorter edges."""
ASPECT_BOUNDS = (1 / 3, 1 / 2, 2 / 3, 4 / 5, 5 / 4, 3 / 2, 2.0, 3.0)
"""Bounds of the histogram of width over height."""
ASPECT_NAMES = (
    "under 1:3", "1:3 to 1:2", "1:2 to 2:3", "2:3 to 4:5", "4:5 to 5:4", "5:4 to 3:2", "3:2 to 2:1", "2:1 to 3:1",
    "3:1 and more",
)  # fmt: skip

_HOST = r"^[A-Za-z][A-Za-z0-9+.-]*://(?:[^/?#@]*@)?(?P<host>\[[^\]]*\]|[^/?#:]*)"
_MOST_LOOSE_ROWS = 200_000


@dataclass
class DownloadSums:
    """Rows of the URL table, in the last attempt of each."""

    status: Counter[str] = field(default_factory=Counter)
    reason: Counter[str] = field(default_factory=Counter)
    width_px: Counter[int] = field(default_factory=Counter)
    height_px: Counter[int] = field(default_factory=Counter)
    formats: Counter[str] = field(default_factory=Counter)
    shorter_edges: np.ndarray = field(default_factory=lambda: np.zeros(len(EDGE_BOUNDS_PX) + 1, np.int64))
    aspects: np.ndarray = field(default_factory=lambda: np.zeros(len(ASPECT_BOUNDS) + 1, np.int64))
    hosts: HostCounts = field(default_factory=lambda: HostCounts())

    def add(self, rows: pa.Table) -> None:
        """Count rows of a shard."""
        self.add_outcomes(rows)
        self.add_images(rows.filter(pc.equal(rows["status"], SUCCESS)))

    def add_outcomes(self, rows: pa.Table) -> None:
        """Count rows by `status`, `reason` and the host of `url`; not their pictures."""
        self.status.update(counts_of(rows["status"]))
        self.reason.update(counts_of(rows["reason"]))
        self.hosts.add(rows)

    def add_images(self, images: pa.Table) -> None:
        """Count pictures by `width`, `height` and `image_ext`."""
        self.width_px.update(counts_of(images["width"]))
        self.height_px.update(counts_of(images["height"]))
        self.formats.update(counts_of(images["image_ext"]))
        width, height = (images[name].to_numpy() for name in ("width", "height"))
        self.shorter_edges += _binned(np.minimum(width, height), EDGE_BOUNDS_PX)
        self.aspects += _binned(width / np.maximum(height, 1), ASPECT_BOUNDS)

    def merge(self, other: DownloadSums) -> None:
        """Add another shard's."""
        for name in ("status", "reason", "width_px", "height_px", "formats"):
            getattr(self, name).update(getattr(other, name))
        self.shorter_edges += other.shorter_edges
        self.aspects += other.aspects
        self.hosts.merge(other.hosts)


class HostCounts:
    """Host and reason (null: an image) → rows, added up as tables; rows without a URL are not counted."""

    def __init__(self) -> None:
        self._tables: list[pa.Table] = []

    def add(self, rows: pa.Table) -> None:
        """Count `url` and `reason` of rows."""
        matches = pc.extract_regex(rows["url"].combine_chunks(), _HOST)
        hosts = pc.utf8_lower(pc.struct_field(matches, "host")).dictionary_encode()
        reasons = rows["reason"].combine_chunks().dictionary_encode()
        host, reason = (pc.fill_null(column.indices, -1).to_numpy().astype(np.int64) for column in (hosts, reasons))
        num = len(reasons.dictionary) + 1
        pairs, times = np.unique((host * num + reason + 1)[host >= 0], return_counts=True)
        own = pa.array(pairs % num - 1, mask=pairs % num == 0)
        found = {"host": hosts.dictionary.take(pairs // num), "reason": reasons.dictionary.take(own), "rows": times}
        self._take(pa.table(found).filter(pc.not_equal(found["host"], "")))

    def merge(self, other: HostCounts) -> None:
        """Add what another one has counted."""
        for table in other._tables:
            self._take(table)

    def worst(self, num: int) -> list[tuple[str, int, dict[str, int]]]:
        """(host, rows, reason → rows) of the hosts with most failures."""
        self._condense()
        if not self._tables:
            return []
        counted = self._tables[0]
        failures = counted.filter(pc.is_valid(counted["reason"])).group_by("host").aggregate([("rows", "sum")])
        order = [("rows_sum", "descending"), ("host", "ascending")]
        hosts = failures.take(pc.select_k_unstable(failures, num, order))["host"].to_pylist() if len(failures) else []
        rows = counted.filter(pc.is_in(counted["host"], pa.array(hosts, pa.string()))).to_pylist()
        return [(host, *_of_host([row for row in rows if row["host"] == host])) for host in hosts]

    def num_hosts(self) -> int:
        """Different ones."""
        self._condense()
        return pc.count_distinct(self._tables[0]["host"]).as_py() if self._tables else 0

    def _take(self, table: pa.Table) -> None:
        self._tables.append(table)
        if len(self._tables) > 1 and sum(one.num_rows for one in self._tables[1:]) > _MOST_LOOSE_ROWS:
            self._condense()

    def _condense(self) -> None:
        if len(self._tables) > 1:
            summed = pa.concat_tables(self._tables).group_by(["host", "reason"]).aggregate([("rows", "sum")])
            self._tables = [summed.select(["host", "reason", "rows_sum"]).rename_columns(["host", "reason", "rows"])]


def _of_host(rows: list[dict[str, object]]) -> tuple[int, dict[str, int]]:
    counts = {row["reason"]: int(str(row["rows"])) for row in rows}
    failed = {str(reason): number for reason, number in counts.items() if reason is not None}
    return sum(counts.values()), dict(sorted(failed.items(), key=lambda item: (-item[1], item[0])))


def _binned(values: np.ndarray, bounds: tuple[float, ...]) -> np.ndarray:
    return np.bincount(np.digitize(values, bounds), minlength=len(bounds) + 1)
