"""The run directory: where every file of a run lies, and how one gets there.

    RUN/run.json              format version and date
    RUN/.lock                 held (flock) by the command that writes; contains its process id
    RUN/.workers              held (flock, shared) by processes that work for it on other machines
    RUN/.publish              held (flock) for the moment in which a tar and its record get their names
    RUN/.staging/ATTEMPT/     files of an attempt that is under way; void as soon as its process is gone
    RUN/shards/00000.tar      images and captions        RUN/shards/00000.parquet   its commit record and rows
    RUN/STAGE/00000.parquet   what a stage made of a shard; RUN/STAGE@NAME/ in the generation NAME
    RUN/quarantine/STAGE-00000.parquet

In: a path, or an address of an object store (`object_store` tells what is different there). Out: paths, the names of
committed shards, the lock. What is inside the files is not known here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

from capfilt import __version__
from capfilt.data.disk import Disk
from capfilt.data.paths import AnyPath, exists, folders_in, names_in, path_of, read_bytes
from capfilt.data.stores import Attempt, Store
from capfilt.errors import CapfiltError, CorruptionError, UsageError

FORMAT_VERSION = 1
"""Version of the layout and of the commit records; a run of a later version is refused."""

STAGES = ("shards", "captions", "clip", "itm", "manifest")
"""Stages in the order in which one feeds the next."""

COMMANDS = {"captions": "caption", "clip": "rank", "itm": "filter", "manifest": "filter"}
"""Stage → the command that makes it. The shards come of `import` or `download`."""

_GENERATION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_SHARD = re.compile(r"[0-9]{5,}")
_MAX_RUN_JSON_BYTES = 1 << 16


class RunDir:
    """One run directory, seen in one generation. Make it with `create` or `open`."""

    def __init__(self, path: AnyPath, generation: str | None = None) -> None:
        if generation is not None and not _GENERATION.fullmatch(generation):
            raise UsageError(
                f"The generation is named {generation!r}; expected a letter or digit, then letters, digits, "
                "'.', '_' or '-'. Give another name: --generation NAME."
            )
        self.path = path
        self.generation = generation
        self._store = _store_of(path)

    @classmethod
    def create(cls, path: str | AnyPath, generation: str | None = None) -> RunDir:
        """Open the run at `path`, making it and its run.json where they are missing."""
        root = path_of(path)
        if not is_run(root):
            store = _store_of(root)
            store.prepare()
            content = {
                "format_version": FORMAT_VERSION,
                "created": datetime.now(UTC).isoformat(timespec="seconds"),
                "capfilt": __version__,
            }
            store.write_new("run.json", json.dumps(content, indent=2))
        return cls.open(root, generation)

    @classmethod
    @contextmanager
    def new(cls, path: str | AnyPath, generation: str | None = None) -> Iterator[RunDir]:
        """`create`, for a command that fills the run; what it made is removed where a UsageError leaves it empty."""
        root = path_of(path)
        was_there, was_run = isinstance(root, Path) and root.exists(), is_run(root)
        run = cls.create(root, generation)
        try:
            yield run
        except UsageError:
            if not was_run:
                with suppress(OSError, CapfiltError):  # the error is what the user must read
                    run._store.remove_empty(with_directory=not was_there)
            raise

    @classmethod
    def open(cls, path: str | AnyPath, generation: str | None = None) -> RunDir:
        """Open an existing run. Raises UsageError when `path` is not a run of a version that is read, CorruptionError
        when its run.json is damaged."""
        root = path_of(path)
        try:
            version = json.loads(read_bytes(root / "run.json", _MAX_RUN_JSON_BYTES))["format_version"]
        except NotADirectoryError:
            raise UsageError(f"{root} is a file; expected a run, which is a folder.") from None
        except FileNotFoundError:
            is_there = not isinstance(root, Path) or root.is_dir()
            raise UsageError(
                f"{root} is not a run: {'it has no run.json' if is_there else 'there is no such folder'}. Make one: "
                f"`capfilt download TABLE {root}` or `capfilt import TARS {root}`."
            ) from None
        except OSError as error:
            raise UsageError(f"{root}/run.json cannot be read ({error.strerror or error}). Mend its rights.") from None
        except (ValueError, KeyError, TypeError) as error:
            content = json.dumps({"format_version": FORMAT_VERSION})
            raise CorruptionError(
                f"{root}/run.json is damaged ({error}); expected what `capfilt` wrote when it made the run. Restore it "
                f"from a copy, or, for a run of this version, write {content} into it: nothing else hangs on it."
            ) from None
        if version != FORMAT_VERSION:
            raise UsageError(
                f"{root} has format version {version}; this capfilt reads {FORMAT_VERSION}. "
                "Install the capfilt that made it, or make a new run."
            )
        return cls(root, generation)

    def shard_names(self) -> list[str]:
        """Names of the shards that are committed, in order."""
        return self.committed("shards")

    def committed(self, stage: str) -> list[str]:
        """Names of the shards that have a file of `stage` in this generation's view, in order."""
        names = self._own_names(stage)
        if self._falls_back(stage):
            made_anew = set[str]().union(*map(self._own_names, self._stages_before(stage)))
            names |= self._names_in(stage) - made_anew
        return sorted(filter(is_shard_name, names), key=lambda name: (len(name), name))

    def own_names(self, stage: str) -> list[str]:
        """Names of the files of `stage` that are this generation's own, in order, those of no shard too."""
        return sorted(self._own_names(stage))

    def tar_names(self) -> list[str]:
        """Names of the tars that are there, committed or not, in order."""
        return sorted(self._names_in("shards", ".tar"))

    def stage_file(self, stage: str, shard: str) -> AnyPath:
        """Where `stage` of `shard` is written in this generation. Shards have no generations."""
        return self.path / self._folder(stage) / f"{shard}.parquet"

    def read_file(self, stage: str, shard: str) -> AnyPath:
        """Where `stage` of `shard` is read: this generation's file, or the default's where it has none.

        Nothing falls back behind a stage that the generation made anew: scores belong to the captions they are of. Nor
        does the manifest: a generation is what its own manifest says.
        """
        own = self.stage_file(stage, shard)
        if not self._falls_back(stage) or exists(own):
            return own
        if any(exists(self.stage_file(before, shard)) for before in self._stages_before(stage)):
            return own
        return self.path / stage / f"{shard}.parquet"

    def tar_path(self, shard: str) -> AnyPath:
        """Where the images of `shard` are."""
        return self.path / "shards" / f"{shard}.tar"

    def quarantine_file(self, stage: str, shard: str, seal: str = "") -> AnyPath:
        """Where the quarantine of `stage` and `shard`, of that seal, is written in this generation."""
        return self.path / "quarantine" / self._store.quarantine_name(self._folder(stage), shard, seal)

    def read_quarantine_file(self, stage: str, shard: str, seal: str = "") -> AnyPath:
        """Where the quarantine that belongs to `read_file(stage, shard)`, of that seal, is."""
        folder = self.read_file(stage, shard).parent.name
        return self.path / "quarantine" / self._store.quarantine_name(folder, shard, seal)

    def generations(self) -> list[str]:
        """Names of the generations beside the default one that have any stage."""
        parts = (folder.partition("@") for folder in folders_in(self.path))
        return sorted({name for stage, at, name in parts if at and stage in STAGES})

    @property
    def generation_option(self) -> str:
        """What a command advised for this run needs: empty, or ` --generation NAME`."""
        return f" --generation {self.generation}" if self.generation else ""

    def _folder(self, stage: str) -> str:
        if stage not in STAGES:
            raise ValueError(f"stage is {stage!r}; expected one of {', '.join(STAGES)}")
        return stage if self.generation is None or stage == "shards" else f"{stage}@{self.generation}"

    def _own_names(self, stage: str) -> set[str]:
        """Of the shards that have a file of this generation's own."""
        return self._names_in(self._folder(stage))

    def _names_in(self, folder: str, ending: str = ".parquet") -> set[str]:
        """Names of the files with that ending, without it."""
        return {name.removesuffix(ending) for name in names_in(self.path / folder) if name.endswith(ending)}

    def _stages_before(self, stage: str) -> tuple[str, ...]:
        """Those of which a generation has its own, before `stage`."""
        return STAGES[1 : STAGES.index(stage)]

    def _falls_back(self, stage: str) -> bool:
        return self.generation is not None and stage not in ("shards", "manifest")

    def lock(self) -> AbstractContextManager[None]:
        """Hold the run for this process; within it the lock may be taken again.

        Raises RunLockedError with the holder. What dead attempts left is removed.
        """
        return self._store.lock()

    def join(self) -> None:
        """Be a worker of the command that holds the run, until this process ends; where it is this one, nothing.

        Should that command die first, the next one waits until its workers are gone.
        """
        self._store.join()

    def new_staging(self) -> AbstractContextManager[Path]:
        """Give a private, empty directory of this machine; it is removed at the end, or after a crash by the next
        command."""
        return self._store.new_staging()

    def sharing(self) -> AbstractContextManager[Callable[[Path], AnyPath]]:
        """Gives what hands a staged file to workers on other machines: where they find it, until the end of this."""
        return self._store.sharing()

    def publish(self, attempt: Attempt) -> None:
        """Give the files of an attempt their names. CommittedError where another was first."""
        self._store.publish(attempt)

    def write_note(self, name: str, text: str) -> None:
        """Write a small file that no stage depends on, FOLDER/NAME. OSError or StoreError where that fails."""
        self._store.write_new(name, text)

    def open_tar(self, shard: str, sha256: str, *, anew: bool = False) -> AbstractContextManager[BinaryIO]:
        """The tar of a shard, to read wherever one likes in it; `anew`: not what was kept of an earlier reading.

        FileNotFoundError where there is none.
        """
        return self._store.open_tar(shard, sha256, anew=anew)


def is_shard_name(name: str) -> bool:
    """Whether a shard may have that name."""
    return _SHARD.fullmatch(name) is not None


def is_run(path: AnyPath) -> bool:
    """Whether a run was begun there."""
    return exists(path / "run.json")


def _store_of(path: AnyPath) -> Store:
    if isinstance(path, Path):
        return Disk(path)
    from capfilt.data.object_store import ObjectStore

    return ObjectStore(path)
