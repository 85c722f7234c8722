"""Samples of a run to look at: which ones are asked for, and all that is known of each.

In: a run and a query. Out: of each shard the samples that match, and the sample at a place. One shard's tables are in
memory at a time (and the one before it), pictures only when they are asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import pyarrow.compute as pc
from PIL import Image

from capfilt.data.commit import read_table
from capfilt.data.images import decode_image
from capfilt.data.per_shard import records_of
from capfilt.data.reasons import DROP_REASON_SENTENCES, REASON_SENTENCES
from capfilt.data.retries import LastAttempts
from capfilt.data.rundir import STAGES, RunDir
from capfilt.data.schemas import HUMAN, SUCCESS
from capfilt.data.shards import read_located
from capfilt.errors import UsageError
from capfilt.progress import NullProgress, Progress
from capfilt.report.conditions import Condition
from capfilt.report.shard_pairs import ShardPairs, read_shard_pairs
from capfilt.settings.values import nearest_or_all

SOURCES = ("web", "synthetic", HUMAN)


@dataclass(frozen=True, kw_only=True)
class SampleQuery:
    """Which samples to show: those that have a pair of which all of `where`, `source`, `kept` and `reason` is true."""

    keys: tuple[str, ...] = ()
    where: str | None = None
    """A condition in SQL over the manifest's columns."""
    source: str | None = None
    kept: bool | None = None
    reason: str | None = None
    """A drop reason; or a reason of rows that failed, which have no pairs."""
    num_random: int | None = None
    """So many of them, drawn by `seed`."""
    seed: int = 0
    limit: int | None = None

    def __post_init__(self) -> None:
        if self.reason is not None and self.reason not in REASON_SENTENCES | DROP_REASON_SENTENCES:
            raise UsageError(
                f"--reason is {self.reason!r}; expected a drop reason ({', '.join(DROP_REASON_SENTENCES)}) or a reason "
                f"of rows that failed.{nearest_or_all(self.reason, REASON_SENTENCES | DROP_REASON_SENTENCES)}"
            )
        if self.source is not None and self.source not in SOURCES:
            raise UsageError(f"--source is {self.source!r}; expected one of {', '.join(SOURCES)}.")
        if self.is_of_failures and (asked := self._of_pairs()):
            raise UsageError(
                f"{asked[0]} is about pairs, and rows that failed ({self.reason}) have none. Leave one of them out."
            )
        if self.kept and self.reason is not None:
            raise UsageError(f"Pairs with the drop reason {self.reason} are not kept. Leave out --kept or --reason.")
        if self.num_random is not None and (self.keys or self.limit is not None):
            other = "--key" if self.keys else "--limit"
            raise UsageError(f"--random says how many samples are drawn, of all that match; leave out {other}.")

    @property
    def is_of_failures(self) -> bool:
        """Whether rows are asked for that failed."""
        return self.reason in REASON_SENTENCES

    @property
    def is_of_pairs(self) -> bool:
        """Whether it depends on a sample's pairs."""
        return bool(self._of_pairs()) or self.reason in DROP_REASON_SENTENCES

    def _of_pairs(self) -> list[str]:
        verdict = {True: "--kept", False: "--dropped", None: None}[self.kept]
        asked = [("--where", self.where), ("--source", self.source), (verdict, verdict)]
        return [option for option, value in asked if option is not None and value is not None]


@dataclass(frozen=True, kw_only=True)
class BrowsedSample:
    """A sample with its captions; or a row that has no picture, and why."""

    shard: str
    key: str
    url: str
    web_caption: str
    width: int | None
    height: int | None
    status: str
    """One of STATUSES."""
    reason: str | None
    """Of REASONS: why there is no picture, or why a later stage set the sample aside."""
    detail: str
    """What was found there."""
    threshold: float | None
    """That the ITM scores were held against."""
    captions: list[dict[str, Any]]
    """Rows of the manifest, and `matches`: whether the query is true of it; without a manifest as far as is known."""

    @property
    def has_picture(self) -> bool:
        """Whether there is one in the shard."""
        return self.status == SUCCESS


class Place(NamedTuple):
    """Of a sample among those that match."""

    shard: int
    """Its number."""
    index: int
    """Of the sample among those of the shard that match."""


class Browser:
    """The samples of a run that a query asks for."""

    def __init__(self, run: RunDir, query: SampleQuery, progress: Progress | None = None) -> None:
        """Raises UsageError for a run without shards and a query that cannot be answered."""
        self.run, self.query = run, query
        self.progress = progress or NullProgress()
        self.shards = run.shard_names()
        if not self.shards:
            raise UsageError(f"No shards in {run.path}/shards. Run `capfilt download TABLE {run.path}` first.")
        self._stages = {stage: frozenset(run.committed(stage)) for stage in STAGES[1:]}
        self.num_without_manifest = len(set(self.shards) - self._stages["manifest"])
        self._refuse_without_manifest()
        self._condition = None if query.where is None else Condition(query.where)
        self._last = LastAttempts(run)
        self._content = lru_cache(maxsize=2)(self._read)

    def matches(self, shard: int) -> list[str]:
        """Keys of the samples of a shard that match, in its order."""
        return self._content(shard)[1]

    def sample(self, place: Place) -> BrowsedSample:
        """The sample at a place."""
        content, keys = self._content(place.shard)
        key = keys[place.index]
        row, captions, aside = content.row(key), content.captions(key), content.set_aside.get(key)
        return BrowsedSample(
            shard=self.shards[place.shard], key=key, url=row["url"] or "", web_caption=row["caption"] or "",
            width=row["width"], height=row["height"], status=row["status"],
            reason=row["reason"] if aside is None else aside[0],
            detail=(row["error_message"] or "") if aside is None else aside[1],
            threshold=content.threshold, captions=captions,
        )  # fmt: skip

    def picture(self, place: Place) -> Image.Image:
        """The picture of a sample that has one. Raises ImageRefused, CorruptionError for damage on disk."""
        content, keys = self._content(place.shard)
        return decode_image(read_located(self.run, self.shards[place.shard], content.row(keys[place.index])).image)

    def has_key(self, shard: int, wanted: set[str]) -> set[str]:
        """Which of these keys are rows of a shard."""
        rows = read_table(self.run.stage_file("shards", self.shards[shard]), columns=["key"])
        return wanted & set(rows["key"].to_pylist())

    def num_images(self) -> list[int]:
        """Of each shard, by its commit record."""
        return [record.rows_kept for record in records_of(self.run, "shards", self.shards)]

    def _read(self, shard: int) -> tuple[ShardPairs, list[str]]:
        name = self.shards[shard]
        stages = frozenset(stage for stage, names in self._stages.items() if name in names)
        content = read_shard_pairs(self.run, name, stages, self._last)
        content.mark(self._holds(content))
        return content, self._chosen(content)

    def _holds(self, content: ShardPairs) -> np.ndarray:
        """Of which pairs the query is true, (N,)."""
        pairs, query = content.pairs, self.query
        holds = np.ones(pairs.num_rows, np.bool_)
        drop_reason = query.reason if query.reason in DROP_REASON_SENTENCES else None
        for column, value in (("source", query.source), ("kept", query.kept), ("drop_reason", drop_reason)):
            if value is not None:
                holds &= pc.fill_null(pc.equal(pairs[column], value), False).to_numpy()
        if self._condition is not None and pairs.num_rows:
            holds &= self._condition.holds(pairs)
        return holds

    def _chosen(self, content: ShardPairs) -> list[str]:
        query, rows = self.query, content.rows
        if query.is_of_failures:
            aside = {key for key, (reason, _) in content.set_aside.items() if reason == query.reason}
            failed = dict(zip(rows["key"].to_pylist(), rows["reason"].to_pylist(), strict=True))
            keys = [key for key, reason in failed.items() if reason == query.reason or key in aside]
        elif query.is_of_pairs:
            keys = pc.unique(content.pairs["key"].filter(content.pairs["matches"])).to_pylist()
        else:
            keys = (rows if query.keys else rows.filter(pc.field("status") == SUCCESS))["key"].to_pylist()
        return keys if not query.keys else [key for key in keys if key in query.keys]

    def _refuse_without_manifest(self) -> None:
        asked = self.query.kept is not None or self.query.reason in DROP_REASON_SENTENCES
        if asked and not self._stages["manifest"]:
            raise UsageError(
                f"{self.run.path} has no manifest{' of this generation' if self.run.generation else ''} yet: no "
                f"pair is kept or dropped. Run `capfilt filter {self.run.path}{self.run.generation_option}` first."
            )
