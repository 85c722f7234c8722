"""A run's scores beside what is true of its pairs: labels of the user's, or the miniature world's truth.

In: a run with a manifest, and labels. Out: `LabelledPairs` to be measured. Nothing is left out in silence: what could
not be joined is an error that counts and names it, or counted where the user allows it. (That a committed score is a
finite number is seen to when it is committed.)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from capfilt.data.labels import PairLabel
from capfilt.data.manifest import iterate_manifest, read_manifest
from capfilt.data.paths import local_path
from capfilt.data.rundir import RunDir
from capfilt.data.texts import clean_for_terminal
from capfilt.errors import UsageError
from capfilt.evaluate.labelled_scores import Labels, Scores
from capfilt.world.audit import judge_pairs

_NUM_NAMED = 5


@dataclass(frozen=True)
class LabelledPairs:
    """Pairs with a score and a label."""

    scores: Scores
    labels: Labels
    sources: list[str] | None
    """web, synthetic, … of each pair; None where it is not known."""
    num_unscored: int = 0
    """Labelled pairs that have no score: the stage did not judge them."""
    num_unjoined: int = 0
    """Labels of pairs that are not there."""
    num_unlabelled: int = 0
    """Scored pairs of the run without a label."""


def join_labels(run: RunDir, labels: Sequence[PairLabel], score: str, *, allow_unjoined: bool = False) -> LabelledPairs:
    """The pairs of a run that have a label, with their `score` (itm or clip).

    A label with a text alone stands for every pair of its image that reads so. Raises UsageError for labels that
    contradict each other, and for those that belong to no pair unless that is allowed.
    """
    by_index, by_text = _index_labels(labels)
    joined: set[int] = set()
    rows: list[tuple[float, bool, str]] = []
    num_unscored = num_unlabelled = 0
    columns = ["key", "caption_index", "source", "text", f"{score}_score"]
    for row in _manifest_rows(run, columns):
        number, also = by_index.get((row["key"], row["caption_index"])), by_text.get((row["key"], row["text"]))
        if number is None or labels[number].text not in (None, row["text"]):
            number = also
        elif also is not None:
            joined.add(also)
            if labels[number].is_true != labels[also].is_true:
                raise _contradiction(labels[number], labels[also])
        value = row[f"{score}_score"]
        if number is None:
            num_unlabelled += value is not None
            continue
        joined.add(number)
        if value is None:
            num_unscored += 1
        else:
            rows.append((value, labels[number].is_true, row["source"]))
    known = {*by_index.values(), *by_text.values()}
    unjoined = sorted(known - joined)
    if unjoined and not allow_unjoined:
        raise UsageError(_unjoined_message(run, [labels[number] for number in unjoined], len(known)))
    return _collected(rows, num_unscored=num_unscored, num_unjoined=len(unjoined), num_unlabelled=num_unlabelled)


def label_by_world(run: RunDir, score: str) -> LabelledPairs:
    """The scored pairs of a run of the miniature world, judged by its truth. UsageError for other runs."""
    truth = local_path(run.path, "The truth of a miniature world lies beside its run, not on") / "world/truth.parquet"
    if not truth.is_file():
        raise UsageError(
            f"{run.path} has no world/truth.parquet: only runs of the miniature world have it. Make one: `capfilt run "
            "quickstart RUN` or `capfilt demo`; for other runs give --labels FILE."
        )
    table = read_manifest([run], ["key", "url", "caption_index", "source", "text", f"{score}_score"])
    rows: list[tuple[float, bool, str]] = []
    num_unscored = 0
    for row, is_true in zip(table.to_pylist(), judge_pairs(table, truth), strict=True):
        if row[f"{score}_score"] is None:
            num_unscored += 1
        else:
            rows.append((row[f"{score}_score"], is_true, row["source"]))
    return _collected(rows, num_unscored=num_unscored)


def _collected(rows: list[tuple[float, bool, str]], **counts: int) -> LabelledPairs:
    scores, labels, sources = zip(*rows, strict=True) if rows else ((), (), ())
    return LabelledPairs(np.array(scores, np.float64), np.array(labels, np.bool_), list(sources), **counts)


def _manifest_rows(run: RunDir, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Row after row; a shard at a time is in memory."""
    for _, _, table in iterate_manifest([run], columns):
        yield from table.to_pylist()


def _index_labels(
    labels: Sequence[PairLabel],
) -> tuple[dict[tuple[str, int], int], dict[tuple[str, str], int]]:
    """(key, caption_index) → number of the label, and (key, text) → number of those without an index."""
    by_index: dict[tuple[str, int], int] = {}
    by_text: dict[tuple[str, str], int] = {}
    for number, label in enumerate(labels):
        if label.caption_index is not None:
            first = by_index.setdefault((label.key, label.caption_index), number)
        else:
            assert label.text is not None
            first = by_text.setdefault((label.key, label.text), number)
        earlier = labels[first]
        if earlier.is_true != label.is_true or earlier.text != label.text:
            raise _contradiction(earlier, label)
    return by_index, by_text


def _contradiction(one: PairLabel, other: PairLabel) -> UsageError:
    return UsageError(f"{one.where} and {other.where} say different things of one pair. Keep one of them.")


def _unjoined_message(run: RunDir, unjoined: Sequence[PairLabel], num_labels: int) -> str:
    named = "; ".join(
        clean_for_terminal(
            f"{label.where}: key {label.key!r}"
            + (f", caption {label.caption_index}" if label.caption_index is not None else "")
            + (f", text {label.text!r}" if label.text is not None else "")
        )
        for label in unjoined[:_NUM_NAMED]
    )
    return (
        f"{len(unjoined):,} of {num_labels:,} labels belong to no pair of {run.path}: {named}"
        f"{'; …' if len(unjoined) > _NUM_NAMED else ''}. Mend the file (keys are texts: leading zeros count), or leave "
        "them out with --allow-unjoined."
    )
