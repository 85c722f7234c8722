"""Files of texts for language models: what is written is read, what is odd is refused with its line."""

from __future__ import annotations

from pathlib import Path

import pytest

from capfilt.data.llm_texts import MAX_LINE_BYTES, LlmText, read_llm_texts, write_llm_texts
from capfilt.errors import UsageError

TEXTS = [
    LlmText("a red ball"),
    LlmText("red", "a red ball.", "what color is the ball?"),
    LlmText('Zürich\n"犬"', "x"),
]


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    assert write_llm_texts(path, iter(TEXTS)) == 3
    assert read_llm_texts(path) == TEXTS


@pytest.mark.parametrize(
    "line",
    [
        "no json", "[]", "{}", '{"text": ""}', '{"text": 1}', '{"text": "a", "preamble": null}',
        '{"text": "a", "caption": "b"}', "", '{"text": "' + "a" * MAX_LINE_BYTES + '"}', "\x00\xff",
        "[" * 50_000,
    ],
)  # fmt: skip
def test_an_odd_line_is_refused_by_its_number(tmp_path: Path, line: str) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_bytes(b'{"text": "fine"}\n' + line.encode("latin-1") + b"\n")
    with pytest.raises(UsageError, match="line 2"):
        read_llm_texts(path)


def test_no_file_and_no_text_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        read_llm_texts(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(UsageError, match="is empty"):
        read_llm_texts(tmp_path / "empty.jsonl")
