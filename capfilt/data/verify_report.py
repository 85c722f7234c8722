"""What `verify` says of a run: what was found where, sums per stage, and what to do about it.

In: findings and counts, shard by shard. Out: an exit code, a line, and a remedy a sentence each.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields

from capfilt.data.rundir import COMMANDS, STAGES
from capfilt.errors import CapfiltError, CorruptionError
from capfilt.progress import counted


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is not as it should be."""

    stage: str
    """Folder of the stage: `clip`, or `clip@NAME` in a generation."""
    shard: str
    """Name of the shard; empty when it concerns none."""
    problem: str
    """What was found."""


@dataclass(slots=True)
class StageCounts:
    """Sums over the shards of one stage."""

    num_shards: int = 0
    rows_in: int = 0
    rows_kept: int = 0
    rows_rejected: int = 0
    rows_quarantined: int = 0

    def merge(self, other: StageCounts) -> None:
        """Add other shards'."""
        for entry in fields(self):
            setattr(self, entry.name, getattr(self, entry.name) + getattr(other, entry.name))


@dataclass(slots=True)
class Report:
    """What `verify_run` found."""

    findings: list[Finding] = field(default_factory=list)
    """Damage: what is on disk is not what was committed, or does not agree with itself."""
    unfinished: list[Finding] = field(default_factory=list)
    """Work that an interrupted command has left; repeating the command mends it."""
    counts: dict[str, StageCounts] = field(default_factory=dict)
    """Folder of the stage → sums of its commit records."""
    maker: str = ""
    """The command that made the shards, as far as a record of one says so."""

    def merge(self, other: Report) -> None:
        """Add what was found elsewhere."""
        self.findings += other.findings
        self.unfinished += other.unfinished
        for folder, counts in other.counts.items():
            self.counts.setdefault(folder, StageCounts()).merge(counts)

    @property
    def exit_code(self) -> int:
        """5 with damage, 1 when unfinished, 0 when complete and reconciled."""
        return CorruptionError.exit_code if self.findings else CapfiltError.exit_code if self.unfinished else 0

    def remedies(self) -> list[str]:
        """What to do about it, a sentence each."""
        return [*self._of_damage(), *self._of_unfinished()]

    def line(self) -> str:
        """The report in one line."""
        shards = self.counts.get("shards", StageCounts())
        begun = [stage for stage in STAGES[1:] if stage in {folder.partition("@")[0] for folder in self.counts}]
        state = {0: "complete and reconciled", 1: "not finished"}.get(self.exit_code, "DAMAGED")
        return (
            f"{state}: {counted(shards.num_shards, 'shard')}, {counted(shards.rows_in, 'row')} = "
            f"{counted(shards.rows_kept, 'sample')} + {shards.rows_quarantined:,} quarantined; stages: "
            f"{', '.join(begun) or 'none yet'}; {counted(len(self.findings), 'damage')}, "
            f"{len(self.unfinished):,} left to do"
        )

    def _of_damage(self) -> Iterator[str]:
        folders = {finding.stage for finding in self.findings}
        if "shards" in folders:
            yield (
                "A damaged or lost shard: put its .tar and .parquet back from a copy; or remove its .parquet, where "
                f"there is one, and repeat {self._commands(['shards'])} as it was given (of a recipe: `capfilt run`). "
                "What other stages made of the same bytes stays good; a tar that they were made of is kept as .tar.old "
                "where other bytes come in its place. Files of a number that this run never had may be removed."
            )
        if others := folders - {"shards"}:
            yield f"A damaged file of another stage: remove its .parquet and repeat {self._commands(others)}."

    def _of_unfinished(self) -> Iterator[str]:
        folders = {finding.stage for finding in self.unfinished}
        if folders:
            yield f"Unfinished: repeat {self._commands(folders)} as it was given; it goes on where it was."
        if generations := sorted({name for folder in folders for _, at, name in [folder.partition("@")] if at}):
            removed = " and ".join(f"the folders whose names end in @{name}" for name in generations)
            yield f"Or give a generation up that is not wanted any more: remove {removed}."

    def _commands(self, folders: Iterable[str]) -> str:
        """Those that make what lies in `folders`, in order: one that goes through several stages does too."""
        stages = {(folder.partition("@")[0], folder.partition("@")[2]) for folder in folders}
        is_human = not {folder.partition("@")[0] for folder in self.counts} & {"captions", "clip", "itm"}
        known = {**COMMANDS, "shards": self.maker} | ({"manifest": self.maker} if is_human else {})
        asked = [
            f"`capfilt {known[stage]}{f' --generation {name}' if name else ''}`"
            for stage, name in sorted(stages, key=lambda entry: (STAGES.index(entry[0]), entry[1]))
            if known[stage]
        ]
        return " and ".join(dict.fromkeys(asked)) or "the command that made it"
