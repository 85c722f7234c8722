"""What was meant is named, wherever a name does not exist."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from capfilt.settings.values import did_you_mean, nearest_of
from tests.cli.conftest import capfilt


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("captoin x", "caption"),
        ("Filter x", "filter"),
        ("train stgae1 x", "stage1"),
        ("train stage x", "stage1 or stage2"),
        ("stage1 x", "train stage1"),
        ("evaluate captoins x", "captions"),
        ("recipe sho blip", "show"),
        ("filter x --trheshold 0.5", "--threshold"),
        ("filter x --trheshold=0.5", "--threshold"),
        ("train stage1 x --ouput y", "--output"),
        ("--verison", "--version"),
        ("train --hlep", "--help"),
        ("run quikstart", "quickstart"),
        ("recipe show blip3", "blip"),
        ("recipe new mine.toml --from Quickstart", "quickstart"),
        ("train stage1 x --output y --set optimiser=muon", "optimizer"),
        ("train stage1 x --output y --set optimizer=moun", "muon"),
        ("train stage1 x --output y --set losses=itc,itt", "itc or itg or itm"),
        ("train stage1 x --output y --autocast bfloat61", "bfloat16"),
        ("train stage1 x --output y --autocast bf16", "bfloat16"),
        ("train stage1 x --output y --sharding ful", "full"),
        ("train llm x --tokenizer y --output z --architecture t6", "t5"),
        ("caption x --decoding nuclues", "nucleus"),
        ("caption x --device gpu", "cuda"),
        ("caption x --device cdua:1", "cuda"),
        ("caption x --dtype float61", "float16"),
        ("filter x --resizer pilow", "pillow"),
        ("filter x --first-token clss", "cls"),
        ("filter x --engine rya", "ray"),
        ("evaluate retrieval x --references y --dtype float23", "float32"),
    ],
)
def test_the_nearest_name_is_told(typed: str, meant: str) -> None:
    done = capfilt(*typed.split())
    said = " ".join(f"{done.out} {done.err}".split())
    assert (done.code, f"Did you mean {meant}?" in said) == (2, True), said


@pytest.mark.parametrize("typed", ["xyz", "caption x --qqq 1", "run zzzz", "caption x --decoding ------"])
def test_nothing_is_told_where_nothing_is_near(typed: str) -> None:
    done = capfilt(*typed.split())
    assert (done.code, "Did you mean" in done.err) == (2, False)


@pytest.mark.parametrize(
    ("columns", "options", "advice"),
    [
        (("Url", "txet"), (), "Did you mean --url-column Url --caption-column txet?"),
        (("image_url", "alt_text"), (), "Did you mean --url-column image_url --caption-column alt_text?"),
        (("link", "TEXT"), (), "Did you mean --url-column link --caption-column TEXT?"),
        (("url", "the caption"), ("--caption-column", "the captoin"), "Did you mean --caption-column 'the caption'?"),
        (("url", "zzz"), (), "Name one of them: --caption-column NAME"),
    ],
)
def test_a_missing_column_lists_those_there_and_the_nearest(
    tmp_path: Path, columns: tuple[str, str], options: tuple[str, ...], advice: str
) -> None:
    pq.write_table(pa.table({name: ["a"] for name in columns} | {"n": [1]}), tmp_path / "urls.parquet")
    done = capfilt("download", tmp_path / "urls.parquet", tmp_path / "run", *options)
    assert done.code == 2
    assert f"Columns found: {columns[0]}, {columns[1]}, n. {advice}" in done.err


def test_a_column_of_numbers_is_not_meant(tmp_path: Path) -> None:
    pq.write_table(pa.table({"url": ["a"], "texts": [1], "txt": ["b"]}), tmp_path / "urls.parquet")
    done = capfilt("download", tmp_path / "urls.parquet", tmp_path / "run")
    assert "Did you mean --caption-column txt?" in done.err


def test_what_was_typed_is_fit_to_print() -> None:
    done = capfilt("caption", "x", "--\x1b[31mdevice", "cpu")
    assert "\x1b" not in done.err
    assert "\x1b" not in capfilt("capti\x1b[31mon").err


def test_all_that_are_as_near_are_named() -> None:
    known = ["stage2", "stage1", "blip"]
    assert nearest_of("stage", known) == ["stage1", "stage2"]
    assert nearest_of("STAGE1", known) == ["stage1"]
    assert nearest_of("quite another", known) == []
    assert did_you_mean("stage1x", known) == " Did you mean stage1?"
    assert did_you_mean("blp", known, "@") == " Did you mean @blip?"
