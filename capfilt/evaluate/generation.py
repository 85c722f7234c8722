"""The texts of a whole data set: written batch by batch, kept as they come, taken up again after an interruption.

In: a writer and the requests of a data set. Out: texts by id, and what could not be used. Where a results file is
wanted, finished batches lie in FILE.partial until it is written; the same command goes on from there.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from capfilt.data.json_lists import Id
from capfilt.data.result_files import looks_like_results
from capfilt.errors import FingerprintMismatchError, RunLockedError, UsageError
from capfilt.evaluate.streaming import Request, TextWriter, write_texts
from capfilt.progress import NullProgress, Progress


@dataclass(frozen=True)
class Unusable:
    """An image or question of which nothing was written."""

    id: Id
    image: str
    reason: str


@dataclass(frozen=True)
class Generated:
    """What a writer made of a data set."""

    texts: dict[Id, str]
    unusable: list[Unusable]
    fields: dict[str, Any] = field(default_factory=dict)
    """Model, prompt and decoding, as the writer states them."""


def write_all(
    writer: TextWriter,
    requests: Sequence[Request],
    results: Path | None = None,
    progress: Progress | None = None,
    *,
    unit: str = "image",
) -> Generated:
    """Write a text for every request; `results` is the file beside which finished batches are kept.

    Raises FingerprintMismatchError where another model, other settings or other requests began the file, and
    RunLockedError where another command is at it.
    """
    shown = progress or NullProgress()
    unusable: list[Unusable] = []
    with nullcontext(_Partial()) if results is None else _open_partial(results, writer.fields, requests) as partial:
        texts = dict(partial.texts)
        left = [request for request in requests if request.id not in texts]
        shown.start("writing", len(requests), unit)
        shown.advance(len(requests) - len(left), already=True)
        for written in write_texts(writer, left):
            request = written.request
            if written.text is None:
                unusable.append(Unusable(request.id, request.image.name, written.problem or ""))
            else:
                texts[request.id] = written.text
                partial.add(request.id, written.text)
            shown.advance(unusable=len(unusable)) if unusable else shown.advance()
        shown.finish()
    in_order = {request.id: texts[request.id] for request in requests if request.id in texts}
    return Generated(in_order, unusable, writer.fields)


def write_data_set(
    writer: TextWriter,
    requests: Sequence[Request],
    results: Path | None,
    write_results: Callable[[Path, dict[Id, str]], None],
    progress: Progress | None = None,
    *,
    unit: str = "image",
) -> Generated:
    """`write_all`, then the results file where one is named, by `write_results`. Errors as `check_results_path` too."""
    check_results_path(results)
    generated = write_all(writer, requests, results, progress, unit=unit)
    if results is not None:
        if generated.texts:
            write_results(results, generated.texts)
        partial_path(results).unlink(missing_ok=True)
    return generated


def refuse_nothing_written(generated: Generated, what: str) -> None:
    """UsageError where no text could be written at all, with the reason of the first."""
    if not generated.texts:
        first = generated.unusable[0]
        raise UsageError(f"None of {len(generated.unusable):,} {what}; the first: {first.image}: {first.reason}.")


def partial_path(results: Path) -> Path:
    """Where finished batches lie until the results file is written."""
    return results.with_name(f"{results.name}.partial")


def check_results_path(results: Path | None) -> None:
    """Raises UsageError where a results file cannot be written: before hours of work, not after."""
    if results is None:
        return
    if results.is_dir() or not results.parent.is_dir():
        raise UsageError(f"{results} cannot be written: expected a file in a folder that is there. Name another.")
    if results.exists() and not (results.is_file() and looks_like_results(results)):
        raise UsageError(f"{results} is there and is no results file; it would be lost. Name another, or remove it.")


class _Partial:
    """What earlier commands have finished, and where this one adds to it."""

    def __init__(self, texts: dict[Id, str] | None = None, file: TextIO | None = None) -> None:
        self.texts = texts or {}
        self._file = file

    def add(self, key: Id, text: str) -> None:
        if self._file is not None:
            self._file.write(json.dumps({"id": key, "text": text}) + "\n")
            self._file.flush()


@contextmanager
def _open_partial(results: Path, fields: dict[str, Any], requests: Sequence[Request]) -> Iterator[_Partial]:
    path = partial_path(results)
    digest = hashlib.sha256()
    for request in requests:
        digest.update(f"{request.id}\0{request.image.name}\0{request.prompt}\0".encode(errors="surrogateescape"))
    header = {"fields": fields, "files": _model_files(fields), "requests": digest.hexdigest()}
    with open(path, "a+", encoding="utf-8", newline="\n") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunLockedError(f"Another command is writing {path}. Wait for it, or name another file.") from None
        file.seek(0)
        lines = file.read().split("\n")
        texts = _read_partial(path, header, lines[:-1])
        os.ftruncate(file.fileno(), sum(len(line.encode()) + 1 for line in lines[:-1]))  # a line that was cut off
        if not lines[:-1]:
            file.write(json.dumps(header) + "\n")
            file.flush()
        yield _Partial(texts, file)


def _model_files(fields: dict[str, Any]) -> list[list[Any]]:
    """Name, size and date of the local models' files: another training in the same folder is another model."""
    found: list[list[Any]] = []
    for name in ("model", "llm", "image_encoder"):
        if name in fields:
            found += _files_of(Path(fields[name]))
    return found


def _files_of(model: Path) -> list[list[Any]]:
    paths = sorted(model.rglob("*")) if model.is_dir() else [model]
    files = [(str(path.relative_to(model)), path.stat()) for path in paths if path.is_file()]
    return [[name, facts.st_size, facts.st_mtime_ns] for name, facts in files]


def _read_partial(path: Path, header: dict[str, Any], lines: Sequence[str]) -> dict[Id, str]:
    if not lines:
        return {}
    try:
        found, *entries = (json.loads(line) for line in lines)
        texts = {entry["id"]: str(entry["text"]) for entry in entries}
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path} cannot be read ({error}). Remove it to begin anew.") from None
    if found != json.loads(json.dumps(header)):
        raise FingerprintMismatchError(
            f"{path} was begun with another model, other settings or other images. Remove it, or name another file."
        )
    return texts
