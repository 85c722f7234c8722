"""The shard loop: captions, CLIP scores, ITM scores and the manifest of every shard of a run.

In: a run with shards, the stages asked for and their settings. Out: one committed Parquet file per stage and
shard. What is committed and matches is skipped; the stages asked for of a shard share one pass over its
images (`shard_pass`), and one pass with all stages gives the same rows as one command after another.

A stage's fingerprint covers its version, its settings, the sha256 of every file of its model, and the dtype.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import pyarrow as pa

from capfilt.curation.require_images import require_images
from capfilt.curation.selection import SOURCES, RankedCaption, commit_manifest, manifest_fields
from capfilt.curation.shard_pass import CaptionLane, ClipLane, Item, ItmLane, Lane, run_lanes
from capfilt.curation.stage_models import MODELS, StageModels
from capfilt.data.commit import CommitRecord, commit_stage, input_digest, read_commit_record, read_table, stage_state
from capfilt.data.paths import exists
from capfilt.data.per_shard import of_each, records_of
from capfilt.data.retries import stage_shards
from capfilt.data.rundir import COMMANDS, STAGES, RunDir
from capfilt.data.schemas import SCHEMAS, WEB_CAPTION_INDEX
from capfilt.data.shards import read_samples
from capfilt.data.timings import Timing, note_timing
from capfilt.engines.base import Engine
from capfilt.engines.local import LocalEngine
from capfilt.errors import FingerprintMismatchError, UsageError
from capfilt.progress import Progress
from capfilt.settings import CaptionSettings, FilterSettings, RankSettings
from capfilt.weights.host_memory import keep_freed_memory

STAGE_VERSIONS = {"captions": 1, "clip": 1, "itm": 1}
"""A change of what a stage writes counts its version up."""

MOST_COUNTED_SHARDS = 10_000
"""Of more, some are counted: a record takes half a millisecond to read."""


@dataclass(slots=True)
class StageSummary:
    """What a stage did, and what it holds now."""

    num_shards: int = 0
    num_new_shards: int = 0
    num_samples: int = 0
    """Samples in, those of earlier commands included."""
    num_quarantined: int = 0
    num_new_samples: int = 0
    seconds: float = 0.0
    """That its model worked, in all workers together."""

    @classmethod
    def of(cls, record: CommitRecord, *, is_new: bool, seconds: float = 0.0) -> StageSummary:
        """That of one shard."""
        num_new = record.rows_in if is_new else 0
        return cls(1, int(is_new), record.rows_in, record.rows_quarantined, num_new, seconds)

    def merge(self, other: StageSummary) -> None:
        """Add other shards'."""
        for entry in fields(self):
            setattr(self, entry.name, getattr(self, entry.name) + getattr(other, entry.name))


@dataclass(slots=True)
class AnnotateSummary:
    """What a pass over the run, or over one shard, did."""

    stages: dict[str, StageSummary] = field(default_factory=dict)
    num_pairs: int = 0
    """Rows of the manifest, where it was asked for."""
    num_kept: int = 0
    seconds: float = 0.0

    def merge(self, other: AnnotateSummary) -> None:
        """Add other shards'."""
        for stage, summary in other.stages.items():
            self.stages.setdefault(stage, StageSummary()).merge(summary)
        self.num_pairs += other.num_pairs
        self.num_kept += other.num_kept

    def line(self) -> str:
        """One line for people."""
        made = [name for name, stage in self.stages.items() if stage.num_new_shards]
        names = ", ".join(made or self.stages)
        num_samples = max((stage.num_samples for stage in self.stages.values()), default=0)
        num_new = max((stage.num_new_shards for stage in self.stages.values()), default=0)
        quarantined = sum(stage.num_quarantined for stage in self.stages.values())
        kept = ""
        if "manifest" in self.stages:
            share = self.num_kept / max(self.num_pairs, 1)
            kept = f"; {self.num_kept:,} of {self.num_pairs:,} pairs kept ({share:.1%})"
        if not num_new:
            return f"Nothing to do: {names} of {num_samples:,} images are there already{kept}."
        bad = f", {quarantined:,} in quarantine" if quarantined else ""
        return f"Wrote {names} of {num_samples:,} images in {self.seconds:.1f} s{bad}{kept}."


def annotate(
    run: RunDir,
    stages: Sequence[str],
    caption: CaptionSettings | None = None,
    rank: RankSettings | None = None,
    filter: FilterSettings | None = None,  # noqa: A002 - the stage's name
    progress: Progress | None = None,
    *,
    models: StageModels | None = None,
    engine: Engine | None = None,
) -> AnnotateSummary:
    """Make the given stages of every shard.

    Args:
        run: an open run.
        stages: some of captions, clip, itm, manifest; each needs its settings (the manifest, the filter's).
        models: the settings with their models, where several runs use them; the settings are then left out.
        engine: what carries it out; unset: this process, shard by shard.

    On a CPU the process keeps the memory that it frees, from here to its end (`weights.host_memory`). Passes in several
    threads of one process are not meant: torch's number of threads is changed for new ones while pictures are decoded.

    Raises UsageError for missing settings, models, shards or earlier stages; FingerprintMismatchError where a
    stage is there with other parameters; CorruptionError for damage. An image that fails is quarantined. Where the
    scores behind a manifest were removed, all scores are made before a manifest of another choice is refused:
    `select`, which replaces it, needs them.
    """
    models = models or StageModels(caption, rank, filter)
    asked = _checked_stages(stages, models)
    started = time.monotonic()
    with run.lock():
        shards = stage_shards(run)
        if not shards:
            raise UsageError(
                f"No shards in {run.path}/shards. Run `capfilt download TABLE {run.path}` or "
                f"`capfilt import TARS {run.path}` first."
            )
        require_images(run)
        work = _AnnotateShards(run, asked, models, _count_images(run, shards), _has_lost_scores(run, shards))
        summary, refused = AnnotateSummary(), ""
        try:
            for _, (done, why) in (engine or LocalEngine()).run(work, shards, progress):
                summary.merge(done)
                refused = refused or why
        finally:
            summary.seconds = time.monotonic() - started
            _note_timing(run, summary)
    if refused:
        raise FingerprintMismatchError(f"The scores that lacked are there again; no manifest was made. {refused}")
    return summary


def _note_timing(run: RunDir, summary: AnnotateSummary) -> None:
    """How long the models worked on the images that no earlier command had done."""
    stages = {
        name: (stage.num_new_samples, stage.seconds)
        for name, stage in summary.stages.items() if name in MODELS and stage.num_new_samples
    }  # fmt: skip
    note_timing(run, Timing(stages=stages, seconds=summary.seconds))


def _has_lost_scores(run: RunDir, shards: Sequence[str]) -> bool:
    """Whether some shards have a manifest and the scores it was made from, and others lack scores."""
    scored = set(shards).intersection(*(run.committed(stage) for stage in MODELS))
    return len(scored) < len(shards) and not scored.isdisjoint(run.committed("manifest"))


def _count_images(run: RunDir, shards: Sequence[str]) -> int:
    """Images of all shards; of very many, what a part of them lets expect: their records are not read one by one."""
    step = -(-len(shards) // MOST_COUNTED_SHARDS)
    counted = [record.rows_kept for record in records_of(run, "shards", shards[::step])]
    return sum(counted) if step == 1 else round(sum(counted) / len(counted) * len(shards))


def _checked_stages(stages: Sequence[str], models: StageModels) -> list[str]:
    """The stages asked for, in their order. Raises UsageError for others, and for settings that lack."""
    needed = {"captions": models.caption, "clip": models.rank, "itm": models.filter, "manifest": models.filter}
    unknown = [stage for stage in stages if stage not in needed]
    lacking = [stage for stage in stages if stage in needed and needed[stage] is None]
    if unknown or lacking or not stages:
        raise UsageError(
            f"The stages asked for are {', '.join(stages) or 'none'}; expected some of "
            f"{', '.join(needed)}, each with its settings."
        )
    return [stage for stage in STAGES if stage in stages]


@dataclass(frozen=True)
class _AnnotateShards:
    """The work of `annotate`."""

    run: RunDir
    stages: list[str]
    models: StageModels
    total: int
    scores_first: bool
    """Not to let a manifest of another choice stand in the way of scores."""
    unit = "images"
    is_light, has_models = False, True

    def open(self) -> _Annotator:
        """Load the models."""
        self.run.join()
        return _Annotator(self)


class _Annotator:
    """The models are loaded."""

    def __init__(self, work: _AnnotateShards) -> None:
        self._plan = _Plan(work.run, work.stages, work.models, scores_first=work.scores_first)
        loaded = self._plan.load_models()
        commands = {COMMANDS[stage] for stage in work.stages}
        name = commands.pop() if len(commands) == 1 else "annotate"
        computing = ", ".join(dict.fromkeys(model.computing for model in loaded))
        self.title = f"{name} ({computing})" if computing else name

        self._looks: Iterator[_Look] | None = None

    def expect(self, shards: Sequence[str]) -> None:
        """On an object store, where a finished shard costs some twenty requests, many are looked at at once."""
        self._looks = of_each(self._plan.run, shards, self._look)

    def __call__(self, shard: str, progress: Progress) -> tuple[AnnotateSummary, str]:
        """What was made of a shard, and why its manifest was left as it was, where it was."""
        look = self._look(shard) if self._looks is None else next(self._looks)
        assert look.shard == shard
        seconds: dict[str, float] = {}
        if look.todo:
            seconds = _annotate_shard(self._plan, look, progress)
        else:
            progress.advance(look.num_images, already=True)
        return look.summary or _summary_of(self._plan, shard, look.todo, seconds), look.refused

    def _look(self, shard: str) -> _Look:
        num_images = read_commit_record(self._plan.run.stage_file("shards", shard)).rows_kept
        todo, refused = _find_todo(self._plan, shard)
        return _Look(shard, num_images, todo, refused, None if todo else _summary_of(self._plan, shard, [], {}))


@dataclass(frozen=True)
class _Look:
    """What there is to do of a shard."""

    shard: str
    num_images: int
    todo: list[str]
    """Stages to be made."""
    refused: str
    """Why the manifest is left as it is, where it is."""
    summary: AnnotateSummary | None
    """Of one of which nothing is left to do."""


class _Plan:
    """The stages asked for, and what makes them."""

    def __init__(self, run: RunDir, stages: list[str], models: StageModels, *, scores_first: bool) -> None:
        self.run, self.stages, self.models, self.scores_first = run, stages, models, scores_first
        self.num_quarantined = 0

    def load_models(self) -> list[Any]:
        """What the stages need: their fingerprints cover the models' files."""
        loaded = [self.models.of(stage) for stage in self.stages if stage in MODELS]
        if {"captions", "itm"} <= set(self.stages):
            self.models.share_vision()
        if any(model.device.type == "cpu" for model in loaded):
            keep_freed_memory()
        return loaded

    def ranking(self, shard: str) -> tuple[int, bool]:
        """(keep, include_web) that a shard is ranked with: of the settings, or as the CLIP stage recorded."""
        if self.models.rank is not None and "clip" in self.stages:
            return self.models.rank.keep, self.models.rank.include_web
        fields = read_commit_record(self.run.read_file("clip", shard)).fields
        return int(fields["keep"]), bool(fields["include_web"])

    def fields(self, stage: str, shard: str) -> dict[str, Any]:
        """What the fingerprint of a stage covers."""
        if stage == "manifest":
            assert self.models.filter is not None
            keep, include_web = self.ranking(shard)
            return manifest_fields(threshold=self.models.filter.threshold, keep=keep, include_web=include_web)
        fields = {"stage_version": STAGE_VERSIONS[stage]} | self.models.of(stage).fields
        if stage == "clip":
            keep, include_web = self.ranking(shard)
            fields |= {"keep": keep, "include_web": include_web}
        return fields

    def lanes(self, stages: Sequence[str], shard: str) -> list[Lane]:
        """The lanes of some stages in the pass over a shard."""
        shares = {"captions", "itm"} <= set(stages) and self.models.vision_is_shared
        lanes: list[Lane] = []
        if "captions" in stages:
            lanes.append(CaptionLane(self.models.captioner, keeps_features=shares))
        if "clip" in stages:
            lanes.append(ClipLane(self.models.clip_scorer, include_web=self.ranking(shard)[1]))
        if "itm" in stages:
            keep, include_web = self.ranking(shard)
            lanes.append(ItmLane(self.models.itm_scorer, keep=keep, include_web=include_web, uses_features=shares))
        return lanes


def _summary_of(plan: _Plan, shard: str, new: Sequence[str], seconds: Mapping[str, float]) -> AnnotateSummary:
    """What the stages of a shard hold, of which `new` were made now, by models that worked so many seconds."""
    summary = AnnotateSummary()
    for stage in plan.stages:
        record = read_commit_record(plan.run.read_file(stage, shard))
        summary.stages[stage] = StageSummary.of(record, is_new=stage in new, seconds=seconds.get(stage, 0.0))
        if stage == "manifest":
            summary.num_pairs, summary.num_kept = (int(record.extra[n]) for n in ("table_rows", "pairs_kept"))
    return summary


def _annotate_shard(plan: _Plan, look: _Look, progress: Progress) -> dict[str, float]:
    """Bring one shard up to date; every stage is committed before the next shard begins. Gives stage → seconds."""
    shard, todo, num_images = look.shard, look.todo, look.num_images
    lanes = plan.lanes(todo, shard)
    if lanes:
        items: list[Item] = []
        for item in run_lanes(_read_items(plan.run, shard, lanes[0].stage), lanes):
            items.append(item)
            plan.num_quarantined += item.failure is not None
            counts: dict[str, Any] = {f"{lane.stage} at a time": lane.batch_size for lane in lanes if lane.was_halved}
            progress.advance(1, quarantined=plan.num_quarantined, **counts)
        # Samples that an earlier stage quarantined do not come up again.
        progress.advance(num_images - len(items), already=True)
        _commit_pass(plan, shard, [lane.stage for lane in lanes], items)
    else:
        progress.advance(num_images, already=True)
    if "manifest" in todo:
        commit_manifest(plan.run, shard, plan.fields("manifest", shard))
    return {lane.stage: lane.seconds for lane in lanes}


def _find_todo(plan: _Plan, shard: str) -> tuple[list[str], str]:
    """The stages of a shard that are not there, or made from what has changed since, and what follows.

    Gives also why the manifest is left as it is, where scores come first.
    """
    run, first = plan.run, plan.stages[0]
    before = STAGES[1 : STAGES.index(first)]
    lacking = next((stage for stage in before if not exists(run.read_file(stage, shard))), None)
    if lacking is not None:
        raise UsageError(
            f"Shard {shard} of {run.path} has no {lacking} yet. Run `capfilt {COMMANDS[lacking]} {run.path}` first."
        )
    todo: list[str] = []
    for stage in plan.stages:
        try:
            # Asked of every stage: what was made with other parameters is refused, not replaced.
            digest = "" if todo else input_digest(run, stage, shard)
            state = stage_state(run, stage, shard, plan.fields(stage, shard), digest)
        except FingerprintMismatchError as error:
            if stage != "manifest":
                raise
            refused = _refusal_of_manifest(plan, shard, error)
            if not plan.scores_first:
                raise FingerprintMismatchError(refused) from error
            return todo, refused
        if todo or state != "done":
            todo.append(stage)
    return todo, ""


def _refusal_of_manifest(plan: _Plan, shard: str, error: FingerprintMismatchError) -> str:
    """The message, with the command that lets this choice replace the one that is there."""
    assert plan.models.filter is not None
    keep, _ = plan.ranking(shard)
    return (
        f"{error} Or let this choice replace it, from the stored scores: `capfilt select {plan.run.path} "
        f"--threshold {plan.models.filter.threshold:g} --keep {keep}{_sources_option(plan.run, shard)}"
        f"{plan.run.generation_option}`."
    )


def _sources_option(run: RunDir, shard: str) -> str:
    """What `select` must be told to take all sources again, where the manifest that is there does not."""
    has_fewer = "sources" in read_commit_record(run.read_file("manifest", shard)).fields
    return f" --sources {','.join(SOURCES)}" if has_fewer else ""


def _read_items(run: RunDir, shard: str, first_stage: str) -> Iterator[Item]:
    """The samples that the first stage of a pass works on, with what the stages before it found."""
    if first_stage == "captions":
        yield from map(Item.of, read_samples(run, shard))
        return
    previous = "captions" if first_stage == "clip" else "clip"
    rows = _rows_by_key(read_table(run.read_file(previous, shard)))
    for sample in read_samples(run, shard, keys=rows.keys()):
        item, own = Item.of(sample), rows[sample.key]
        if first_stage == "clip":
            item.captions = [row["text"] for row in own]
        else:
            item.ranked = [
                RankedCaption(row["caption_index"], row["text"], row["clip_score"], row["rank"], row["duplicate_of"])
                for row in own
            ]
        yield item


def _rows_by_key(table: pa.Table) -> dict[str, list[dict[str, Any]]]:
    rows: dict[str, list[dict[str, Any]]] = {}
    for row in table.to_pylist():
        rows.setdefault(row["key"], []).append(row)
    return rows


def _commit_pass(plan: _Plan, shard: str, stages: Sequence[str], items: Sequence[Item]) -> None:
    """Publish the stages of a pass, in order; each is made from the one just published."""
    run, left = plan.run, list(items)
    for stage in stages:
        rows = [row for item in left if item.failed_stage != stage for row in _ROWS_OF[stage](item)]
        commit_stage(
            run,
            stage,
            shard,
            pa.Table.from_pylist(rows, schema=SCHEMAS[stage]),
            fields=plan.fields(stage, shard),
            input_digest=input_digest(run, stage, shard),
            rows_in=len(left),
            quarantine=[item.failure for item in left if item.failure and item.failed_stage == stage],
            replace=True,
        )
        left = [item for item in left if item.failed_stage != stage]


def _caption_rows(item: Item) -> list[dict[str, Any]]:
    return [{"key": item.key, "caption_index": index, "text": text} for index, text in enumerate(item.captions)]


def _clip_rows(item: Item) -> list[dict[str, Any]]:
    return [
        {
            "key": item.key,
            "caption_index": caption.caption_index,
            "source": "web" if caption.caption_index == WEB_CAPTION_INDEX else "synthetic",
            "text": caption.text,
            "clip_score": caption.clip_score,
            "rank": caption.rank,
            "duplicate_of": caption.duplicate_of,
        }
        for caption in item.ranked
    ]


def _itm_rows(item: Item) -> list[dict[str, Any]]:
    return [{"key": item.key, "caption_index": index, "itm_score": score} for index, score in item.itm_scores]


_ROWS_OF: dict[str, Callable[[Item], list[dict[str, Any]]]] = {
    "captions": _caption_rows,
    "clip": _clip_rows,
    "itm": _itm_rows,
}
