"""Human captions of imported shards straight into a manifest: all of them are kept, no model is asked.

In: a run whose shards were imported. Out: its manifest, with a row for every caption, source `human`. A sample's
captions are the list `captions` (or the text `caption`) of its KEY.json, else its KEY.txt. What is empty or repeats
another caption of its image is dropped.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from capfilt.data.commit import commit_stage, input_digest, read_commit_record, read_table, stage_state
from capfilt.data.paths import exists
from capfilt.data.rundir import RunDir
from capfilt.data.schemas import HUMAN, SCHEMAS, SUCCESS
from capfilt.data.tars import index_members, read_member
from capfilt.errors import UsageError
from capfilt.progress import NullProgress, Progress

_FIELDS = {"stage_version": 1, "captions": HUMAN}
_FACTS = ["key", "url", "caption", "status", "width", "height", "sha256"]


@dataclass(frozen=True, kw_only=True)
class HumanSummary:
    """What became of the captions."""

    num_shards: int
    num_new_shards: int
    """Shards whose manifest this command wrote."""
    num_kept: int
    """Captions kept, in these."""
    num_dropped: int
    seconds: float

    def line(self) -> str:
        """One line for people."""
        if not self.num_new_shards:
            return f"The manifest of {self.num_shards:,} shards is there already."
        return f"Kept {self.num_kept:,} human captions, dropped {self.num_dropped:,} (empty or repeated)."


def write_human_manifest(run: RunDir, progress: Progress | None = None) -> HumanSummary:
    """Commit the manifest of every shard that has none, or one of other images.

    Raises UsageError where the shards were downloaded or have synthetic captions, FingerprintMismatchError where a
    manifest of another kind is there, CorruptionError for damage.
    """
    progress, started = progress or NullProgress(), time.monotonic()
    num_new = num_kept = num_dropped = 0
    with run.lock():
        shards = run.shard_names()
        progress.start("human captions", len(shards), "shard")
        for shard in shards:
            _refuse_others(run, shard)
            digest = input_digest(run, "manifest", shard)
            state = stage_state(run, "manifest", shard, _FIELDS, digest)
            if state != "done":
                table = _manifest_of(run, shard)
                kept = sum(table["kept"].to_pylist())
                commit_stage(
                    run, "manifest", shard, table, fields=_FIELDS, input_digest=digest,
                    rows_in=read_commit_record(run.stage_file("shards", shard)).rows_kept,
                    extra={"pairs_kept": kept}, replace=state == "stale_input",
                )  # fmt: skip
                num_new, num_kept, num_dropped = num_new + 1, num_kept + kept, num_dropped + table.num_rows - kept
            progress.advance(1, already=state == "done")
        progress.finish()
    return HumanSummary(
        num_shards=len(shards), num_new_shards=num_new, num_kept=num_kept, num_dropped=num_dropped,
        seconds=time.monotonic() - started,
    )  # fmt: skip


def _refuse_others(run: RunDir, shard: str) -> None:
    if read_commit_record(run.stage_file("shards", shard)).fields.get("maker") != "import":
        raise UsageError(f"{run.path} was downloaded; human captions come with imported tars. Name another run.")
    if exists(run.stage_file("captions", shard)):
        raise UsageError(
            f"{run.path} has synthetic captions; a run of human captions has none. Import into another run, and "
            f"train on both: `capfilt train blip RUN HUMAN_RUN`."
        )


def _manifest_of(run: RunDir, shard: str) -> pa.Table:
    samples = read_table(run.stage_file("shards", shard), columns=_FACTS).to_pylist()
    written = _captions_in_tar(run, shard)
    rows: list[dict[str, Any]] = []
    for sample in samples:
        if sample.pop("status") != SUCCESS:
            continue
        own = written[sample["key"]] or [sample["caption"] or ""]
        del sample["caption"]
        for index, text in enumerate(own):
            reason = "empty" if not text.strip() else "duplicate" if text in own[:index] else None
            verdict = {"caption_index": index, "source": HUMAN, "text": text, "kept": reason is None}
            rows.append({"shard": shard, **sample, **verdict, "drop_reason": reason})
    return pa.Table.from_pylist(rows, schema=SCHEMAS["manifest"])


def _captions_in_tar(run: RunDir, shard: str) -> dict[str, list[str]]:
    """Key → the captions of the sample's own metadata; none where there are none."""
    tar = run.tar_path(shard)
    found: dict[str, list[str]] = {}
    sha256 = read_commit_record(run.stage_file("shards", shard)).extra["tar_sha256"]
    with run.open_tar(shard, str(sha256)) as file:
        for member in list(index_members(file, tar)):
            if member.name.endswith(".json"):
                content = json.loads(read_member(file, tar, member.name, member.offset, member.length))
                found[member.name.removesuffix(".json")] = list(_texts_of(content.get("original") or {}))
    return found


def _texts_of(metadata: dict[str, Any]) -> Iterator[str]:
    captions = metadata.get("captions", metadata.get("caption"))
    for text in captions if isinstance(captions, list) else [captions]:
        if isinstance(text, str):
            yield text.encode("utf-8", "replace").decode()
