"""COCO's and VQA's results files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capfilt.data.json_lists import as_id
from capfilt.data.result_files import (
    read_answer_results,
    read_caption_results,
    write_answer_results,
    write_caption_results,
)
from capfilt.errors import UsageError


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("results") / "results.json"


_text = st.text(st.characters(exclude_categories=["Cs"]))


@given(texts=st.dictionaries((st.integers() | _text.filter(bool)).map(as_id), _text, min_size=1))
def test_what_is_written_is_read(path: Path, texts: dict) -> None:
    for write, read in ((write_caption_results, read_caption_results), (write_answer_results, read_answer_results)):
        write(path, texts)
        assert read(path) == texts
    assert [file.name for file in path.parent.iterdir()] == ["results.json"]


def test_the_published_form(path: Path) -> None:
    write_caption_results(path, {404464: "black and white photo of a man", 380932: "group of people"})
    assert json.loads(path.read_text()) == [
        {"image_id": 404464, "caption": "black and white photo of a man"},
        {"image_id": 380932, "caption": "group of people"},
    ]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ([], "has no entries; expected a list of objects with 'image_id' and 'caption'"),
        ([{"image_id": 1, "caption": "a"}, {"image_id": "1", "caption": "b"}], r"\[1\] is a second entry"),
        ([{"image_id": 1}], r"\[0\] has no 'caption'"),
        ([{"question_id": 1, "answer": "a"}], r"\[0\] has no 'image_id'"),
        ({"annotations": []}, "expected JSON: a list"),
    ],
)
def test_files_that_are_refused(path: Path, content: object, said: str) -> None:
    path.write_text(json.dumps(content))
    with pytest.raises(UsageError, match=said):
        read_caption_results(path)
