"""The check between source and captions: a run without a single image has nothing to go on with."""

from __future__ import annotations

from collections import Counter

from capfilt.data.commit import read_commit_record, read_quarantine
from capfilt.data.reasons import SETTLED_REASONS, shorten_counts
from capfilt.data.rundir import RunDir
from capfilt.errors import CapfiltError

PRIVATE_REASONS = {"blocked_address", "bad_port"}
"""What `allow_private_addresses` would let through."""


def require_images(run: RunDir) -> None:
    """Raises CapfiltError, with the reasons, where the shards of `run` hold rows and not one image."""
    shards = run.shard_names()
    records = []
    for shard in shards:
        records.append(read_commit_record(run.stage_file("shards", shard)))
        if records[-1].rows_kept:
            return
    if not records:
        return
    reasons: Counter[str] = Counter()
    for shard in shards:
        reasons.update(read_quarantine(run, "shards", shard)["reason"].to_pylist())
    advice = f"`capfilt stats {run.path}` shows what failed."
    open_reasons = reasons.keys() - SETTLED_REASONS
    if "table_sha256" in records[0].fields and open_reasons:
        tried = " ".join(f"--reason {reason}" for reason in sorted(open_reasons))
        if open_reasons <= PRIVATE_REASONS:
            advice += " Private networks and other ports are opened with --allow-private-addresses."
            tried += " --allow-private-addresses"
        advice += f" `capfilt retry {run.path} {tried}` tries them again."
    raise CapfiltError(
        f"None of the {sum(record.rows_in for record in records):,} rows gave an image "
        f"({shorten_counts(dict(reasons.most_common())) or 'there are none'}). {advice}"
    )
