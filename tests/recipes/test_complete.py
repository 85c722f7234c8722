"""A recipe written out reads as the same recipe, whatever is in it, and says of every setting what it is."""

from __future__ import annotations

import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capfilt.recipes import bundled_recipes, read_recipe
from capfilt.recipes.complete import complete_text, toml_value
from capfilt.recipes.recipe import Recipe, settings_of


def reread(text: str, folder: Path) -> Recipe:
    path = folder / "again.toml"
    path.write_text(text, encoding="utf-8")
    return read_recipe(str(path))


@pytest.mark.parametrize("name", sorted(bundled_recipes()))
def test_a_recipe_written_out_is_the_same_recipe(name: str, tmp_path: Path) -> None:
    recipe = read_recipe(name)
    again = reread(complete_text(recipe, head="of a test\x1b[31m", schema="x.json"), tmp_path)
    assert replace(again, name=recipe.name, path=recipe.path) == recipe


@pytest.mark.parametrize("name", ["blip", "blip2", "quickstart"])
def test_every_setting_has_its_line_and_its_sentence(name: str) -> None:
    lines = complete_text(read_recipe(name)).splitlines()
    for section in ("caption", *(f"train.{t.name}" for t in read_recipe(name).trainings)):
        start = lines.index(f"[{section}]")
        own = lines[start : lines.index("", start) if "" in lines[start:] else None]
        for setting in settings_of(section):
            place = next(n for n, line in enumerate(own) if line.startswith((f"{setting} = ", f"# {setting} = ")))
            assert own[place - 1].startswith("# "), setting


def test_defaults_are_named_where_the_recipe_departs_from_them() -> None:
    lines = complete_text(read_recipe("quickstart")).splitlines()
    assert "samples_per_shard = 100  # default: 1000" in lines
    assert "num_threads = 32" in lines
    assert "# num_shards = …  # not set" in lines
    assert '# table = "urls.parquet"  # not set' in lines


def test_a_section_that_is_left_out_is_named(tmp_path: Path) -> None:
    text = complete_text(reread('[caption]\ncaptioner = "embedded"\n', tmp_path))
    assert "# [source]\n" in text
    assert "# [filter] is left out" in text
    assert "[filter]" not in [line for line in text.splitlines() if not line.startswith("#")]


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_texts_come_back_and_no_terminal_acts_upon_them(text: str) -> None:
    written = toml_value(text)
    assert tomllib.loads(f"a = {written}") == {"a": text}
    assert written.isprintable()


@given(st.one_of(st.floats(allow_nan=False), st.integers(-(2**63), 2**63 - 1), st.booleans()))
def test_numbers_come_back(value: object) -> None:
    found = tomllib.loads(f"a = {toml_value(value)}")["a"]
    assert (found, type(found)) == (value, type(value))


def test_a_setting_of_the_file_is_escaped(tmp_path: Path) -> None:
    recipe = reread('description = "a\\u202eb\\u009b"\n[caption]\nprompt = "\\u001b[31m\\""\n', tmp_path)
    text = complete_text(recipe)
    assert 'description = "a\\u202Eb\\u009B"' in text
    assert reread(text, tmp_path) == replace(recipe, name="again", path=tmp_path / "again.toml")
