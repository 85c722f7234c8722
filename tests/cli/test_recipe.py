"""`capfilt recipe`: what it prints and writes is a recipe, and mistakes are told all at once."""

from __future__ import annotations

import json
import tomllib
from dataclasses import asdict, replace
from pathlib import Path

import jsonschema
import pytest

from capfilt.recipes import bundled_recipes, read_recipe
from tests.cli.conftest import capfilt

WRONG = """\
descripton = "x"

[caption]
captoiner = "embedded"
top_p = 3
min_length = "x"
decoding = "nuclues"

[filter]
threshold = 2

[train.captioner]
init = "@blpi"
"""


def test_list_names_every_bundled_recipe() -> None:
    assert set(capfilt("recipe", "list", "--json").json()) == set(bundled_recipes())
    assert "quickstart           Quick start: 300 URLs" in capfilt("recipe", "list").out


@pytest.mark.parametrize("name", ["quickstart", "blip2"])
def test_show_prints_what_reads_as_the_same_recipe(name: str, tmp_path: Path) -> None:
    saved = tmp_path / "saved.toml"
    saved.write_text(capfilt("recipe", "show", name).out, encoding="utf-8")
    recipe = read_recipe(name)
    assert replace(read_recipe(str(saved)), name=recipe.name, path=recipe.path) == recipe
    found = capfilt("recipe", "show", name, "--json").json()
    assert found["sections"]["caption"] == json.loads(json.dumps(asdict(recipe.caption)))
    assert [key for key in found["sections"] if "." in key] == [f"train.{t.name}" for t in recipe.trainings]


def test_show_as_written_is_the_file(tmp_path: Path) -> None:
    assert capfilt("recipe", "show", "blip", "--as-written").out == bundled_recipes()["blip"].read_text()
    assert capfilt("recipe", "show", "blip", "--as-written", "--json").code == 2
    mine = tmp_path / "mine.toml"
    mine.write_text("# \u202e\x7f\n".replace("\x7f", "") + 'description = "\u202e"\n')
    assert "\u202e" not in capfilt("recipe", "show", mine, "--as-written").out


def test_new_writes_a_recipe_that_is_valid_at_once(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    assert capfilt("recipe", "new", file, "--from", "world-blip").code == 0
    recipe = read_recipe("world-blip")
    assert replace(read_recipe(str(file)), name=recipe.name, path=recipe.path) == recipe
    schema = tmp_path / file.read_text().splitlines()[0].removeprefix("#:schema ")
    jsonschema.validate(tomllib.loads(file.read_text()), json.loads(schema.read_text()))
    assert capfilt("recipe", "schema").out == schema.read_text()
    assert capfilt("recipe", "check", file).code == 0


def test_new_replaces_nothing_unasked(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text("# mine\n")
    done = capfilt("recipe", "new", file)
    assert (done.code, "--overwrite" in done.err) == (2, True)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.toml"]
    assert file.read_text() == "# mine\n"
    assert capfilt("recipe", "new", file, "--overwrite").code == 0
    assert capfilt("recipe", "new", tmp_path / "other.toml").code == 0  # the schema beside it is ours
    schema = tmp_path / "capfilt-recipe.schema.json"
    schema.write_text('{"title": "mine"}')
    done = capfilt("recipe", "new", tmp_path / "third.toml")
    assert (done.code, schema.read_text()) == (2, '{"title": "mine"}')
    assert not (tmp_path / "third.toml").exists()
    assert capfilt("recipe", "new", tmp_path / "third.toml", "--no-schema").code == 0
    assert "#:schema" not in (tmp_path / "third.toml").read_text()
    assert (capfilt("recipe", "new", tmp_path / "a.json").code, (tmp_path / "a.json").exists()) == (2, False)
    assert capfilt("recipe", "new", tmp_path / "a.toml", "--from", "quikstart").err.endswith("mean quickstart?")


def test_check_tells_all_mistakes_with_their_lines(tmp_path: Path) -> None:
    file = tmp_path / "wrong.toml"
    file.write_text(WRONG)
    done = capfilt("recipe", "check", file, "quickstart", tmp_path / "none.toml")
    assert done.code == 2
    lines = done.out.splitlines()
    told = [
        (1, "unknown key descripton. Did you mean description?"),
        (4, "[caption] has no setting captoiner. Did you mean captioner?"),
        (5, "[caption] top_p is 3.0; expected more than 0, at most 1."),
        (6, "[caption] min_length is 'x'; expected a whole number."),
        (7, "[caption] decoding is 'nuclues'; expected one of nucleus, greedy, beam, top-k."),
        (10, "[filter] threshold is 2.0; expected 0 to 1."),
        (13, "[train.captioner] init is '@blpi'; expected a folder or a hub id, or @blip of an earlier section."),
    ]
    assert [line.startswith(f"{file}:{number}: {said}") for line, (number, said) in zip(lines, told, strict=False)] == [
        True
    ] * len(told), done.out
    assert lines[len(told)].startswith("quickstart: no mistakes. It would download 300 URLs of the miniature world")
    assert lines[len(told) + 1].startswith(f"No recipe {tmp_path}/none.toml")
    assert len(lines) == len(told) + 2


def test_check_tells_a_program(tmp_path: Path) -> None:
    file = tmp_path / "wrong.toml"
    file.write_text("[rank]\nkeep = 1\n[caption]\n\n[caption]\n")
    done = capfilt("recipe", "check", file, "blip", "--json")
    wrong, right = done.json()
    assert (done.code, wrong["does"], right["mistakes"]) == (2, None, [])
    assert [mistake["line"] for mistake in wrong["mistakes"]] == [5]
    assert right["does"].endswith("train filter to filter")


def test_what_depends_on_a_wrong_value_is_not_told_too(tmp_path: Path) -> None:
    file = tmp_path / "wrong.toml"
    file.write_text(
        '[source]\ntabel = "x"\n[train.stage1]\nlearning_rate = -1\nmin_learning_rate = 5e-4\nbatch_size = 1\n'
        '[train.stage2]\nllm = "embedded-opt"\n'
    )
    mistakes = capfilt("recipe", "check", file, "--json").json()[0]["mistakes"]
    assert [mistake["line"] for mistake in mistakes] == [2, 4, 6]
