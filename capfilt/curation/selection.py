"""Which pairs stay: ranks within an image, top K, the ITM threshold, and a reason for every pair dropped.

In: scores. Out: ranks, manifest rows. No model is run: `reselect` chooses anew from the stored scores.

    rank    distinct captions of an image by (CLIP score, descending; caption_index): BLIP-2 §3.4. Of
            identical captions the one with the lowest index is ranked, the others are duplicates.
    web     ranked like a synthetic caption (`include_web`), or passed to the filter as it is (BLIP §3.3)
    filter  a pair is kept when its ITM score is at least the threshold
    sources a selection may take web captions alone, or synthetic ones alone (BLIP's Table 1 trains on either)
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from capfilt.data.commit import commit_stage, input_digest, read_commit_record, read_table, stage_state
from capfilt.data.paths import exists
from capfilt.data.per_shard import records_of
from capfilt.data.retries import stage_shards
from capfilt.data.rundir import RunDir
from capfilt.data.schemas import SCHEMAS, WEB_CAPTION_INDEX
from capfilt.engines.base import SHARDS, Engine
from capfilt.engines.local import LocalEngine
from capfilt.errors import FingerprintMismatchError, UsageError
from capfilt.progress import Progress
from capfilt.settings import FilterSettings, RankSettings
from capfilt.settings.values import did_you_mean

MANIFEST_VERSION = 1
"""Version of the stage: a change of what it writes counts it up."""

SOURCES = ("web", "synthetic")
"""Sources of captions that a selection takes, unless fewer are asked for."""

_FACTS = ("url", "width", "height", "sha256")


@dataclass(frozen=True, slots=True)
class RankedCaption:
    """One caption of an image with its place among them."""

    caption_index: int
    text: str
    clip_score: float | None
    rank: int | None
    duplicate_of: int | None


def rank_captions(captions: Sequence[tuple[int, str, float | None]], *, include_web: bool) -> list[RankedCaption]:
    """Rank the captions of one image.

    Args:
        captions: (caption_index, text, CLIP score or None where the text is empty), by ascending index.
        include_web: rank the web caption as well.

    Returns:
        The captions in the order given. Rank 1 is best; None for what is not ranked: an empty text, a
        duplicate, the web caption unless included.
    """
    first: dict[str, int] = {}
    duplicate_of: dict[int, int] = {}
    scores: dict[int, np.float32] = {}
    for index, text, score in captions:
        if score is None or (index == WEB_CAPTION_INDEX and not include_web):
            continue
        if text in first:
            duplicate_of[index] = first[text]
        else:
            first[text] = index
            scores[index] = np.float32(score)  # as it is stored
    ordered = sorted(scores, key=lambda index: (-scores[index], index))
    ranks = {index: place for place, index in enumerate(ordered, start=1)}
    return [
        RankedCaption(index, text, score, ranks.get(index), duplicate_of.get(index)) for index, text, score in captions
    ]


def captions_to_filter(captions: Sequence[RankedCaption], *, keep: int, include_web: bool) -> list[RankedCaption]:
    """The captions of one image that the ITM head looks at: the top K, and a web caption not ranked."""
    return [
        caption
        for caption in captions
        if caption.clip_score is not None
        and (
            (caption.rank is not None and caption.rank <= keep)
            or (caption.caption_index == WEB_CAPTION_INDEX and not include_web)
        )
    ]


def select_pairs(
    shard: str,
    samples: pa.Table,
    clip: pa.Table,
    itm: pa.Table,
    *,
    threshold: float,
    keep: int,
    include_web: bool,
    sources: Sequence[str] = SOURCES,
) -> pa.Table:
    """The manifest of a shard.

    Args:
        shard: its name.
        samples: columns key, url, width, height, sha256 of the shard.
        clip: rows of the CLIP stage.
        itm: rows of the ITM stage.
        threshold: lowest ITM score kept.
        keep: ranks kept.
        include_web: whether the web caption was ranked.
        sources: some of SOURCES; pairs of others are dropped.

    Returns:
        A row for every row of `clip`, in its order (columns of SCHEMAS["manifest"]). The first that applies
        is the drop reason: empty, other_source, duplicate, low_clip, low_itm. A synthetic caption that reads as
        the web caption beside which it would be kept is a duplicate.
    """
    scores = itm["itm_score"].take(pc.index_in(_pair_names(clip), value_set=_pair_names(itm)))
    is_web = pc.equal(clip["caption_index"], WEB_CAPTION_INDEX)
    web = clip.filter(is_web)
    web_text = web["text"].take(pc.index_in(clip["key"], value_set=web["key"].combine_chunks()))
    in_top = pc.fill_null(pc.less_equal(clip["rank"], keep), False)
    passes = in_top if include_web else pc.or_(in_top, is_web)
    repeats_web = pc.and_(pc.invert(is_web), pc.equal(clip["text"], web_text))
    takes_web = pa.scalar("web" in sources)
    is_low = pc.fill_null(pc.less(pc.cast(scores, pa.float64()), threshold), True)
    conditions = {
        "empty": pc.is_null(clip["clip_score"]),
        "other_source": pc.invert(pc.is_in(clip["source"], value_set=pa.array(sources, pa.string()))),
        "duplicate": pc.is_valid(clip["duplicate_of"]),
        "low_clip": pc.invert(passes),
        "low_itm": is_low,
        "duplicate ": pc.and_(repeats_web, takes_web),
    }
    flags = pa.StructArray.from_arrays([_flat(condition) for condition in conditions.values()], names=list(conditions))
    reasons = [name.strip() for name in conditions]
    drop_reason = pc.case_when(flags, *reasons, pa.scalar(None, pa.string()))
    place = pc.index_in(clip["key"], value_set=samples["key"].combine_chunks())
    columns = {
        **{name: clip[name] for name in ("key", "caption_index", "source", "text", "clip_score", "rank")},
        **{name: samples[name].take(place) for name in _FACTS},
        "shard": pa.array([shard] * clip.num_rows, pa.string()),
        "itm_score": scores,
        "kept": pc.is_null(drop_reason),
        "drop_reason": drop_reason,
    }
    schema = SCHEMAS["manifest"]
    return pa.table([columns[name] for name in schema.names], schema=schema).combine_chunks()


def manifest_fields(
    *, threshold: float, keep: int, include_web: bool, sources: Sequence[str] = SOURCES
) -> dict[str, Any]:
    """What the fingerprint of the manifest covers; the sources only where they are not all."""
    fields: dict[str, Any] = {
        "stage_version": MANIFEST_VERSION, "threshold": threshold, "keep": keep, "include_web": include_web,
    }  # fmt: skip
    return fields if tuple(sources) == SOURCES else fields | {"sources": list(sources)}


def commit_manifest(run: RunDir, shard: str, fields: Mapping[str, Any]) -> pa.Table:
    """Select anew and publish the manifest of a shard; an earlier selection gives way."""
    samples = read_table(run.stage_file("shards", shard), columns=["key", *_FACTS])
    clip, itm = read_table(run.read_file("clip", shard)), read_table(run.read_file("itm", shard))
    scored = pc.is_in(clip["key"], value_set=itm["key"].combine_chunks())
    chosen = {name: fields[name] for name in ("threshold", "keep", "include_web", "sources") if name in fields}
    table = select_pairs(shard, samples, clip.filter(scored), itm, **chosen)
    num_kept = pc.sum(table["kept"]).as_py() or 0
    commit_stage(
        run, "manifest", shard, table, fields=fields, input_digest=input_digest(run, "manifest", shard),
        rows_in=read_commit_record(run.read_file("itm", shard)).rows_kept, extra={"pairs_kept": num_kept},
        replace=True,
    )  # fmt: skip
    return table


@dataclass(frozen=True, slots=True)
class SelectionSummary:
    """What a selection kept."""

    num_shards: int
    num_new_shards: int
    """Shards whose selection changed."""
    num_pairs: int
    num_kept: int
    drop_reasons: dict[str, int]
    threshold: float
    keep: int
    sources: tuple[str, ...]
    seconds: float

    def line(self) -> str:
        """One line for people."""
        share = self.num_kept / max(self.num_pairs, 1)
        dropped = ", ".join(f"{reason} {count:,}" for reason, count in self.drop_reasons.items())
        kept = f"{self.num_kept:,} of {self.num_pairs:,} pairs ({share:.1%}; dropped: {dropped or 'none'})"
        if not self.num_new_shards:
            only = "" if self.sources == SOURCES else f" of {self.sources[0]} captions"
            return f"Nothing to do: threshold {self.threshold:g} and top {self.keep}{only} keep {kept} already."
        return f"Kept {kept} in {self.seconds:.1f} s."


def reselect(
    run: RunDir,
    threshold: float | None = None,
    keep: int | None = None,
    progress: Progress | None = None,
    *,
    sources: Sequence[str] | None = None,
    engine: Engine | None = None,
) -> SelectionSummary:
    """Choose anew from the stored scores; replaces the manifest of this generation.

    What is not given stays as the present manifest has it; `sources` are some of SOURCES; `engine` carries it out,
    unset: threads of this process. Raises UsageError where a shard has no ITM scores, `keep` asks for captions the
    filter did not see, or a source is none.
    """
    started = time.monotonic()
    with run.lock():
        shards = stage_shards(run)
        stored = _stored_ranking(run, shards)
        present = _present_choice(run, shards)
        chosen = FilterSettings(threshold=present["threshold"] if threshold is None else threshold).threshold
        top = RankSettings(keep=min(present["keep"], stored["keep"]) if keep is None else keep).keep
        _refuse_unseen(run, top, stored["keep"])
        taken = _checked_sources(present.get("sources", SOURCES) if sources is None else sources)
        fields = manifest_fields(threshold=chosen, keep=top, include_web=stored["include_web"], sources=taken)
        num_new, num_pairs, reasons = 0, 0, Counter[str]()
        work = _SelectShards(run, fields, len(shards))
        for _, found in (engine or LocalEngine()).run(work, shards, progress):
            num_new += found.is_new
            num_pairs += found.num_pairs
            reasons += found.drop_reasons
    num_kept = num_pairs - reasons.total()
    ordered = dict(sorted(reasons.items(), key=lambda item: (-item[1], item[0])))
    return SelectionSummary(
        len(shards), num_new, num_pairs, num_kept, ordered, chosen, top, taken, time.monotonic() - started
    )


@dataclass(frozen=True, slots=True)
class _Selected:
    """What the selection of a shard is."""

    is_new: bool
    num_pairs: int
    drop_reasons: Counter[str]


@dataclass(frozen=True)
class _SelectShards:
    """The work of `reselect`."""

    run: RunDir
    fields: dict[str, Any]
    total: int
    unit = SHARDS
    is_light, has_models = True, False
    title = "select"

    def open(self) -> _SelectShards:
        """Nothing is loaded."""
        self.run.join()
        return self

    def __call__(self, shard: str, _progress: Progress) -> _Selected:
        is_new = not _is_selected(self.run, shard, self.fields)
        if is_new:
            table = commit_manifest(self.run, shard, self.fields)
        else:
            table = read_table(self.run.stage_file("manifest", shard), columns=["drop_reason"])
        counts = pc.value_counts(table["drop_reason"].drop_null()).to_pylist()
        return _Selected(is_new, table.num_rows, Counter({entry["values"]: entry["counts"] for entry in counts}))


def _checked_sources(sources: Sequence[str]) -> tuple[str, ...]:
    """Those asked for, in the order of SOURCES."""
    if not sources or set(sources) - set(SOURCES):
        nearest = "".join(did_you_mean(source, SOURCES) for source in sources if source not in SOURCES)
        expected = f"some of {', '.join(SOURCES)}.{nearest}"
        raise UsageError(f"sources is {', '.join(sources) or 'empty'}; expected {expected}")
    return tuple(source for source in SOURCES if source in sources)


def _present_choice(run: RunDir, shards: Sequence[str]) -> dict[str, Any]:
    """Threshold and `keep` of the manifest that is there, the default generation's where this one has none yet;
    where there is none at all, what `filter` would have taken."""
    for path in (RunDir(run.path, name).read_file("manifest", shards[0]) for name in (run.generation, None)):
        if exists(path):
            return read_commit_record(path).fields
    return {"threshold": FilterSettings.threshold, **_ranking_of(run, shards[0])}


def _ranking_of(run: RunDir, shard: str) -> dict[str, Any]:
    fields = read_commit_record(run.read_file("clip", shard)).fields
    return {name: fields[name] for name in ("keep", "include_web")}


def _stored_ranking(run: RunDir, shards: Sequence[str]) -> dict[str, Any]:
    """What the scores were made with: `include_web`, and the lowest `keep` of the shards."""
    for stage, command in (("clip", "rank"), ("itm", "filter")):
        made = set(run.committed(stage))
        lacking = next((shard for shard in shards if shard not in made), None)
        if lacking is not None:
            options = " with the options it had for other shards" if made else ""
            first = command if run.committed("captions") else "caption"
            raise UsageError(
                f"Shard {lacking} of {run.path} has no {stage} scores. Run `capfilt {first} "
                f"{run.path}{run.generation_option}`{options} first."
            )
    if not shards:
        raise UsageError(f"{run.path} has no shards. Run `capfilt download TABLE {run.path}` first.")
    stored = [record.fields for record in records_of(run, "clip", shards)]
    return {"include_web": stored[-1]["include_web"], "keep": min(int(ranking["keep"]) for ranking in stored)}


def _refuse_unseen(run: RunDir, keep: int, stored_keep: int) -> None:
    if keep > stored_keep:
        raise UsageError(
            f"keep is {keep}, but the filter saw the top {stored_keep} of some shards only. Run "
            f"`capfilt rank {run.path} --keep {keep} --generation top{keep}` with the same model, "
            f"then `capfilt filter {run.path} --generation top{keep}`."
        )


def _is_selected(run: RunDir, shard: str, fields: Mapping[str, Any]) -> bool:
    try:
        return stage_state(run, "manifest", shard, fields, input_digest(run, "manifest", shard)) == "done"
    except FingerprintMismatchError:  # another selection, which this one replaces
        return False


def _pair_names(table: pa.Table) -> pa.Array:
    index = pc.cast(table["caption_index"], pa.string())
    return _flat(pc.binary_join_element_wise(index, table["key"], "/"))


def _flat(array: Any) -> pa.Array:
    return array.combine_chunks() if isinstance(array, pa.ChunkedArray) else array
