"""What every translation of weights needs: tables of names, and the refusal of names that no table knows.

In: names of weights, ours and theirs. Out: tables, counts; UsageError where a checkpoint is not what it should be.
"""

from __future__ import annotations

from collections.abc import Iterable

from capfilt.errors import UsageError


def pair(ours: str, theirs: str) -> dict[str, str]:
    """Names of weight and bias of one of our modules → theirs."""
    return {f"{ours}.{kind}": f"{theirs}.{kind}" for kind in ("weight", "bias")}


def count_layers(names: Iterable[str], prefix: str) -> int:
    """How many numbers follow the prefix: layers of a stack."""
    return len({name[len(prefix) :].split(".")[0] for name in names if name.startswith(prefix)})


def refuse_odd_keys(found: Iterable[str], expected: Iterable[str], what: str) -> None:
    """UsageError naming every key that is missing or unknown, how many first."""
    found, expected = set(found), set(expected)
    both = {"missing": expected - found, "unknown": found - expected}
    if odd := {kind: sorted(keys) for kind, keys in both.items() if keys}:
        counts = " and ".join(f"{len(keys)} {kind}" for kind, keys in odd.items())
        lists = "; ".join(f"{kind}: {', '.join(keys)}" for kind, keys in odd.items())
        raise UsageError(f"The weights are not those of {what}, which has {len(expected)}: {counts}; {lists}.")
