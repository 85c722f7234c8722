"""Recipes: the bundled ones are complete, and every mistake is refused with its line."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import open_clip
import pytest

from capfilt.errors import UsageError
from capfilt.recipes import Recipe, bundled_recipes, find_recipe, read_recipe
from capfilt.settings import EMBEDDED, Stage2Settings
from capfilt.weights import find

FULL = """\
description = "all of it"
run_dir = "runs/x"

[source]
tars = ["a.tar", "b-{00..09}.tar"]

[download]
timeout_seconds = 3
ports = [80, 8080]

[caption]
captioner = "embedded"
prompt = "a picture of "
top_p = 1

[rank]
include_web = true

[filter]
filter_model = "embedded"

[train.stage1]
image_encoder = "embedded"
losses = ["itc"]

[train.stage2]
llm = "embedded-opt"
dropout = 0
"""


def write(folder: Path, text: str) -> str:
    path = folder / "mine.toml"
    path.write_text(text, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("name", ["quickstart", "capfilt", "blip", "blip2"])
def test_bundled_recipes_read(name: str) -> None:
    recipe = read_recipe(name)
    assert recipe.name == name
    assert recipe.description
    assert recipe.caption is not None
    assert set(bundled_recipes()) >= {name}
    assert find_recipe(f"{name}.toml") == find_recipe(name)


@pytest.mark.parametrize("name", sorted(bundled_recipes()))
def test_models_of_bundled_recipes_have_names_that_mean_something(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hub ids, folders or embedded models for the folders; for CLIP a name and a tag of open_clip's."""
    monkeypatch.setattr(find, "download_snapshot", lambda _name, _patterns: tmp_path)
    recipe = read_recipe(name)
    for section, settings_of in (
        (recipe.caption, ("captioner",)),
        (recipe.filter, ("filter_model",)),
        (recipe.stage1, ("image_encoder", "qformer_init")),
        (recipe.stage2, ("llm",)),
    ):
        for setting in settings_of if section else ():
            if setting != "qformer_init" or getattr(section, setting):
                assert find.find_model_dir(getattr(section, setting), setting).is_dir()
    if recipe.rank and recipe.rank.clip_model != EMBEDDED:
        assert recipe.rank.clip_weights in open_clip.list_pretrained_tags_by_model(recipe.rank.clip_model)


def test_every_setting_arrives_typed(tmp_path: Path) -> None:
    recipe = read_recipe(write(tmp_path, FULL))
    assert recipe.source is not None
    assert recipe.source.tars == ("a.tar", "b-{00..09}.tar")
    assert recipe.download.timeout_seconds == 3.0
    assert isinstance(recipe.download.timeout_seconds, float)
    assert recipe.download.ports == (80, 8080)
    assert recipe.caption is not None
    assert recipe.caption.top_p == 1.0
    assert recipe.caption.prompt == "a picture of "
    assert recipe.rank is not None
    assert recipe.rank.include_web is True
    assert recipe.filter is not None
    assert recipe.stage1 is not None
    assert recipe.stage1.losses == ("itc",)
    assert recipe.stage2 is not None
    assert recipe.stage2.llm == "embedded-opt"
    assert recipe.stage2.settings() == Stage2Settings(dropout=0.0)


def test_sections_are_fields_of_a_recipe() -> None:
    assert {name.rpartition(".")[2] for name in Recipe.sections} <= {f.name for f in fields(Recipe)}


@pytest.mark.parametrize(
    ("old", "new", "line", "said"),
    [
        ("captioner =", "captoiner =", 12, "Did you mean captioner?"),
        ("[rank]", "[ranke]", 16, "Did you mean rank?"),
        ("run_dir =", "rundir =", 2, "Did you mean run_dir?"),
        ("top_p = 1", "top_p = 3", 14, "top_p is 3.0; expected more than 0, at most 1"),
        ("top_p = 1", 'top_p = "x"', 14, "expected a number"),
        ("top_p = 1", "top_p = true", 14, "expected a number"),
        ("ports = [80, 8080]", "ports = 80", 9, "expected a list"),
        ("ports = [80, 8080]", 'ports = ["a"]', 9, "expected a whole number"),
        ("include_web = true", "include_web = 1", 17, "expected true or false"),
        ('tars = ["a.tar", "b-{00..09}.tar"]', "world_seed = 1", 4, "source gives none of them"),
        ('tars = ["a.tar",', 'table = "x"\ntars = ["a.tar",', 4, "source gives table and tars"),
        ("[train.stage2]", "[train.stage3]", 26, "Did you mean train.stage"),
        ("dropout = 0", "dropout = 2", 28, "dropout is 2.0; expected 0 or more"),
        ("llm =", "lm =", 27, "Did you mean llm?"),
        ('"runs/x"', "7", 2, "expected a text in quotes"),
        ("dropout = 0", "log_every_steps = 0", 28, "log_every_steps is 0; expected at least 1"),
        ("dropout = 0", "save_every_steps = 0", 28, "save_every_steps is 0; expected at least 1"),
        ("dropout = 0", 'device = "gpu"', 28, "device is 'gpu'; expected one of auto, cpu, cuda, mps"),
    ],
)
def test_a_mistake_is_refused_with_its_line(tmp_path: Path, old: str, new: str, line: int, said: str) -> None:
    assert FULL.count(old) == 1
    path = write(tmp_path, FULL.replace(old, new))
    with pytest.raises(UsageError) as caught:
        read_recipe(path)
    assert f"{path}:{line}:" in str(caught.value)
    assert said in str(caught.value)


def test_stages_that_lack_what_they_start_from_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"\[train.stage2\] without \[train.stage1\]"):
        read_recipe(write(tmp_path, '[train.stage2]\nllm = "embedded-opt"'))
    with pytest.raises(UsageError, match=r"has no \[caption\]"):
        read_recipe(write(tmp_path, "[rank]"))


def test_what_is_not_toml_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"not a TOML file.*line 1"):
        read_recipe(write(tmp_path, "a = ="))
    (tmp_path / "mine.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="not a TOML file"):
        read_recipe(str(tmp_path / "mine.toml"))
    with pytest.raises(UsageError, match="Did you mean quickstart"):
        read_recipe("quickstrat")
    with pytest.raises(UsageError, match="caption is 3; expected a section"):
        read_recipe(write(tmp_path, "caption = 3"))
