"""Texts that a language model is pre-trained on: JSON lines of preamble, question and text.

In: `LlmText`s, or a file. Out: the file, or the texts. A line is {"preamble": …, "question": …, "text": …}; a
field that a line leaves out is "".
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from capfilt.errors import UsageError

MAX_LINE_BYTES = 65_536


@dataclass(frozen=True, slots=True)
class LlmText:
    """A caption, or the answer to a question, and what stands before it."""

    text: str
    """The caption or the answer."""
    preamble: str = ""
    """Words that tell what the text is about, where visual prompts will stand; "" for none."""
    question: str = ""
    """The question that `text` answers; "" for a caption."""


def write_llm_texts(path: Path, texts: Iterable[LlmText]) -> int:
    """Writes JSON lines; returns their number."""
    num_texts = 0
    with open(path, "w", encoding="utf-8") as handle:
        for text in texts:
            handle.write(json.dumps({k: v for k, v in asdict(text).items() if v}, ensure_ascii=False) + "\n")
            num_texts += 1
    return num_texts


def read_llm_texts(path: str | Path) -> list[LlmText]:
    """Reads JSON lines. UsageError naming the line that is not an object of strings with a "text"."""
    try:
        with open(path, "rb") as handle:
            texts = [_parse(line, f"{path}, line {number}") for number, line in enumerate(handle, 1)]
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror}). Give a file of JSON lines.") from error
    if not texts:
        raise UsageError(f'{path} is empty; expected JSON lines such as {{"text": "a red ball"}}.')
    return texts


def _parse(line: bytes, where: str) -> LlmText:
    try:
        fields = json.loads(line) if len(line) <= MAX_LINE_BYTES else None
    except (ValueError, RecursionError):  # the latter for lines of a thousand brackets
        fields = None
    known = {"text", "preamble", "question"}
    if (
        not isinstance(fields, dict)
        or not all(isinstance(value, str) for value in fields.values())
        or not fields.get("text")
        or not fields.keys() <= known
    ):
        raise UsageError(
            f'{where}: expected an object of at most {MAX_LINE_BYTES:,} bytes, with a string "text" and, '
            f'if wanted, strings "preamble" and "question".'
        )
    return LlmText(**fields)
