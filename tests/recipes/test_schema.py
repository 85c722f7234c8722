"""The JSON Schema takes what `read_recipe` takes, and refuses what it refuses where no two settings are concerned."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from capfilt.errors import UsageError
from capfilt.recipes import bundled_recipes, read_recipe
from capfilt.recipes.complete import complete_text
from capfilt.recipes.recipe import Recipe, settings_of
from capfilt.recipes.schema import recipe_schema, schema_text, settings_in
from tests.recipes.test_reading import CHAIN, FULL

SCHEMA = json.loads(schema_text())
VALIDATOR = jsonschema.Draft7Validator(SCHEMA)

BEFORE = {
    "rank": "[caption]\n", "filter": "[caption]\n", "source": "",
    "train.captioner": '[train.blip]\ntokenizer = "embedded"\n',
    "train.filter": '[train.blip]\ntokenizer = "embedded"\n',
    "train.stage2": '[train.stage1]\nimage_encoder = "embedded"\n',
}  # fmt: skip
"""What a section cannot stand without."""
WITH = {"source": 'table = "x"\n', "train.captioner": 'init = "@blip"\n', "train.filter": 'init = "@blip"\n'}
"""What it cannot lack itself."""
VALUES = (
    "-1", "0", "1", "2", "16", "50", "100", "101", "0.5", "-0.1", "1.5", "1e30", "true", "false", '""', '"x"',
    '"cuda:1"', '"cpu"', '"auto"', '"adamw"', '"nucleus"', '"cls"', '"full"', "[]", "[1]", "[-1]", "[0.5]",
    '["itc"]', '["x"]', '["itc", "lm"]', "{}",
)  # fmt: skip


def accepts(text: str) -> bool:
    return VALIDATOR.is_valid(tomllib.loads(text))


def reads(text: str, folder: Path) -> bool:
    (folder / "mine.toml").write_text(text, encoding="utf-8")
    try:
        read_recipe(str(folder / "mine.toml"))
    except UsageError:
        return False
    return True


def test_it_is_a_schema() -> None:
    jsonschema.Draft7Validator.check_schema(SCHEMA)


@pytest.mark.parametrize("name", sorted(bundled_recipes()))
def test_bundled_recipes_keep_to_it_as_they_stand_and_complete(name: str) -> None:
    text = bundled_recipes()[name].read_text(encoding="utf-8")
    assert [e.message for e in VALIDATOR.iter_errors(tomllib.loads(text))] == []
    assert [e.message for e in VALIDATOR.iter_errors(tomllib.loads(complete_text(read_recipe(name))))] == []


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("captioner =", "captoiner ="), ("[rank]", "[ranke]"), ("run_dir =", "rundir ="), ("top_p = 1", "top_p = 3"),
        ("top_p = 1", 'top_p = "x"'), ("top_p = 1", "top_p = true"), ("ports = [80, 8080]", "ports = 80"),
        ("ports = [80, 8080]", 'ports = ["a"]'), ("include_web = true", "include_web = 1"),
        ('tars = ["a.tar", "b-{00..09}.tar"]', "world_seed = 1"), ('tars = ["a.tar",', 'table = "x"\ntars = ["a.tar",'),
        ("[train.stage2]", "[train.stage3]"), ("dropout = 0", "dropout = 2"), ('"runs/x"', "7"),
        ('losses = ["itc"]', "losses = []"), ('losses = ["itc"]', 'losses = ["lm"]'),
        ("dropout = 0", 'device = "gpu"'), ("[caption]", "[download.x]"), ("dropout = 0", "weight_decay = -1"),
    ],
)  # fmt: skip
def test_wrong_recipes_are_refused(old: str, new: str) -> None:
    assert accepts(FULL)
    assert accepts(CHAIN)
    assert not accepts(FULL.replace(old, new))


def test_ranks_and_a_filter_want_captions_and_a_captioner_its_start() -> None:
    assert not accepts("[rank]")
    assert not accepts("[filter]")
    assert not accepts("[train.captioner]")


@pytest.mark.parametrize("section", list(Recipe.sections))
def test_it_is_never_stricter_than_the_reader(section: str, tmp_path: Path) -> None:
    """Each setting with each value, alone: an editor marks nothing that would run."""
    num_refused = 0
    for setting in settings_of(section):
        for value in VALUES:
            own = "".join(line for line in WITH.get(section, "").splitlines(True) if not line.startswith(setting))
            text = f"{BEFORE.get(section, '')}[{section}]\n{own}{setting} = {value}\n"
            if reads(text, tmp_path):
                assert accepts(text), text
            else:
                num_refused += not accepts(text)
    assert num_refused > 2 * len(settings_of(section))


def _allowed(section: str, setting: str) -> dict[str, Any]:
    return dict(next(s.allowed for s in settings_in(section) if s.name == setting))


def test_ranges_and_names_are_known_where_one_setting_says_them() -> None:
    assert _allowed("caption", "top_p") == {"type": "number", "exclusiveMinimum": 0, "maximum": 1}
    assert _allowed("caption", "min_length") == {"type": "integer", "minimum": 1}
    assert _allowed("caption", "decoding")["enum"] == ["nucleus", "greedy", "beam", "top-k"]
    assert _allowed("download", "jpeg_quality") == {"type": "integer", "minimum": 1, "maximum": 100}
    assert _allowed("train.blip", "warmup_steps") == {"type": "integer", "minimum": 0}
    assert _allowed("train.albef", "mlm_share") == {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1}
    losses = {"type": "array", "items": {"type": "string", "enum": ["itc", "itm", "itg"]}, "minItems": 1}
    assert _allowed("train.stage1", "losses") == losses


def test_every_setting_has_a_sentence_and_its_default() -> None:
    properties = recipe_schema()["properties"]
    sections = [*(properties[name] for name in properties if "properties" in properties[name] and name != "train")]
    sections += properties["train"]["properties"].values()
    assert len(sections) == len(Recipe.sections)
    for section in sections:
        assert section["description"]
        assert all(one["description"].endswith(".") for one in section["properties"].values())
    assert properties["caption"]["properties"]["num_captions"]["default"] == 10
    assert properties["train"]["properties"]["captioner"]["properties"]["prompt"]["default"] == "a picture of "
