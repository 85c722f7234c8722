"""COCO's and VQA's results files: what a model wrote, one text for each image or question.

In: a JSON list of {image_id, caption} or {question_id, answer}. Out: texts by id; and back to a file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

from capfilt.data.json_lists import Id, read_entries
from capfilt.data.whole_files import whole_file
from capfilt.errors import UsageError

_BEGINNING = re.compile(rb'\s*\[\s*(\{\s*"(image_id|question_id)"|\]\s*$)')


def looks_like_results(path: Path) -> bool:
    """Whether an existing file begins as a results file does, and may be written anew as one; an empty one may too."""
    with open(path, "rb") as file:
        beginning = file.read(256)
    return not beginning or _BEGINNING.match(beginning) is not None


def read_caption_results(path: Path) -> dict[Id, str]:
    """Captions by image id. Raises UsageError naming the entry that is something else, or a second one of an id."""
    return _read(path, "image_id", "caption")


def read_answer_results(path: Path) -> dict[Id, str]:
    """Answers by question id; errors as `read_caption_results`."""
    return _read(path, "question_id", "answer")


def write_caption_results(path: Path, captions: Mapping[Id, str]) -> None:
    """Write COCO's results file, whole or not at all."""
    _write(path, "image_id", "caption", captions)


def write_answer_results(path: Path, answers: Mapping[Id, str]) -> None:
    """Write VQA's results file, whole or not at all."""
    _write(path, "question_id", "answer", answers)


def _read(path: Path, id_name: str, text_name: str) -> dict[Id, str]:
    texts: dict[Id, str] = {}
    for entry in read_entries(path, {""}):
        key = entry.id(id_name)
        if key in texts:
            raise UsageError(f"{entry.where} is a second entry with the {id_name} {key!r}; expected each once.")
        texts[key] = entry.text(text_name)
    if not texts:
        raise UsageError(f"{path} has no entries; expected a list of objects with {id_name!r} and {text_name!r}.")
    return texts


def _write(path: Path, id_name: str, text_name: str, texts: Mapping[Id, str]) -> None:
    with whole_file(path) as file:
        json.dump([{id_name: key, text_name: text} for key, text in texts.items()], file, indent=0)
        file.write("\n")
