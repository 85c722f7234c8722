"""Recipes: the bundled ones are complete, and every mistake is refused with its line."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import open_clip
import pytest

from capfilt.errors import UsageError
from capfilt.recipes import Recipe, bundled_recipes, examine_recipe, find_recipe, read_recipe
from capfilt.recipes.reading import line_of
from capfilt.settings import EMBEDDED, BlipTrainSettings, Stage1Settings, TrainSettings
from capfilt.trainings import MODEL_SETTINGS, TRAININGS, Stage2Section
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


@pytest.mark.parametrize("name", sorted(bundled_recipes()))
def test_bundled_recipes_read(name: str) -> None:
    recipe = read_recipe(name)
    assert recipe.name == name
    assert recipe.description
    assert recipe.caption is not None
    assert find_recipe(f"{name}.toml") == find_recipe(name)


@pytest.mark.parametrize("name", sorted(bundled_recipes()))
def test_models_of_bundled_recipes_have_names_that_mean_something(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hub ids, folders or embedded models for the folders; for CLIP a name and a tag of open_clip's."""
    monkeypatch.setattr(find, "download_snapshot", lambda _name, _patterns: tmp_path)
    recipe = read_recipe(name)
    assert recipe.caption is not None
    assert recipe.filter is not None
    named = [recipe.caption.captioner, recipe.filter.filter_model]
    for section in recipe.trainings:
        named += [
            getattr(section.settings, setting, "") for setting in MODEL_SETTINGS if setting not in section.results
        ]
    for model in filter(None, named):
        assert find.find_model_dir(model, "model").is_dir()
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
    stage1, stage2 = recipe.trainings
    assert (stage1.name, stage1.settings) == ("stage1", Stage1Settings(image_encoder="embedded", losses=("itc",)))
    assert (stage2.name, stage2.results) == ("stage2", {"init": "stage1"})
    assert stage2.settings == Stage2Section(llm="embedded-opt", dropout=0.0)
    assert (stage2.output, stage2.data.runs, stage2.data.own_run) == ("stage2", (), True)


def test_sections_are_fields_of_a_recipe_or_trainings() -> None:
    trainings = {f"train.{name}" for name in TRAININGS}
    assert set(Recipe.sections) - trainings <= {f.name for f in fields(Recipe)}
    assert trainings <= set(Recipe.sections)


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
        ("[train.stage2]", "[trian.stage2]", 26, "unknown section trian.stage2. Did you mean train.stage2?"),
        ("[train.stage2]", "[zzz]", 26, "unknown section zzz. Known: description, run_dir, source, download"),
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


FORMS = """\
caption.top_p = 1
"filter" = {threshold = 1}
rank . "keep" = 2

[train]
stage1.losses = ["itc"]   # [train.stage2]
  [ train . "stage2" ] # x = 1
  llm = "[caption]"
  'dropout'=0
"""


@pytest.mark.parametrize(
    ("section", "key", "line"),
    [
        ("caption", "top_p", 1), ("caption", "top_k", 1), (None, "caption", 1), ("filter", "threshold", 2),
        ("rank", "keep", 3), (None, "train.stage1", 6), ("train.stage1", "losses", 6), ("train.stage1", "init", 6),
        (None, "train.stage2", 7), ("train.stage2", "llm", 8), ("train.stage2", "dropout", 9),
        ("train.stage2", "init", 7), (None, "nothing", 1),
    ],
)  # fmt: skip
def test_lines_are_found_in_every_form_of_toml(section: str | None, key: str, line: int) -> None:
    assert line_of(FORMS, section, key) == line


def test_stages_that_lack_what_they_start_from_are_refused(tmp_path: Path) -> None:
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


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a = " + "[" * 5000, "nested too deeply"),
        ("[caption]\nnum_captions = " + "9" * 5000, "not a TOML file"),
        ("[filter]\nthreshold = 1" + "0" * 400, "mine.toml:2: .* expected a smaller number"),
        ("[source]\nworld_urls = -5", "mine.toml:2: .*world_urls is -5; expected 1 to"),
    ],
)
def test_numbers_and_depths_that_no_recipe_has_are_refused(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        read_recipe(write(tmp_path, text))


def test_lines_of_many_mistakes_are_found_at_once(tmp_path: Path) -> None:
    """Twenty seconds when each looked through the whole file."""
    names = [f"name{number}" for number in range(2000)]
    _, mistakes = examine_recipe(Path(write(tmp_path, "[caption]\n" + "".join(f"{name} = 1\n" for name in names))))
    lines = [one.line for one in mistakes if "has no setting" in one.said]
    assert lines == list(range(2, 2002))


def test_a_mark_before_the_text_is_passed_over_and_lines_end_as_editors_end_them(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text("\ufeff# a\u2028b\u0085c\r\n[filter]\r\nthreshhold = 1\r\n", encoding="utf-8")
    with pytest.raises(UsageError, match=r"mine\.toml:3: .*Did you mean threshold"):
        read_recipe(str(tmp_path / "mine.toml"))


# --- trainings ----------------------------------------------------------------------------------------------

CHAIN = """\
[train.blip]
tokenizer = "embedded"

[train.captioner]
init = "@blip"
prompt = "a picture of "

[train.filter]
init = "@blip"
runs = ["runs/human", "runs/more"]
run_weights = [1, 2.0, 0.5]

[train.stage1]
image_encoder = "@captioner"
output = "first"

[train.stage2]
llm = "embedded-opt"
runs = ["runs/human"]
own_run = false
"""


def test_trainings_come_in_the_order_of_the_file_and_name_earlier_ones(tmp_path: Path) -> None:
    found = read_recipe(write(tmp_path, CHAIN)).trainings
    assert [(section.name, section.output) for section in found] == [
        ("blip", "blip"), ("captioner", "captioner"), ("filter", "filter"), ("stage1", "first"), ("stage2", "stage2"),
    ]  # fmt: skip
    assert [section.results for section in found] == [
        {}, {"init": "blip"}, {"init": "blip"}, {"image_encoder": "captioner"}, {"init": "stage1"},
    ]  # fmt: skip
    assert found[2].settings.run_weights == (1.0, 2.0, 0.5)
    assert found[2].data.runs == ("runs/human", "runs/more")
    assert (found[4].data.runs, found[4].data.own_run) == (("runs/human",), False)


@pytest.mark.parametrize(
    ("old", "new", "line", "said"),
    [
        (
            '[train.captioner]\ninit = "@blip"',
            '[train.captioner]\ninit = "@blipp"',
            5,
            "hub id, or @blip of an earlier",
        ),
        (
            '[train.captioner]\ninit = "@blip"',
            "[train.captioner]",
            4,
            "init is not given; expected a BLIP model, or @blip",
        ),
        (
            '[train.captioner]\ninit = "@blip"',
            '[train.captioner]\ninit = "@filter"',
            5,
            "or @blip of an earlier section",
        ),
        (
            'image_encoder = "@captioner"',
            'image_encoder = "@stage1"',
            14,
            "@captioner or @filter of an earlier section",
        ),
        ('tokenizer = "embedded"', 'tokenizer = "@blip"', 2, "expected a folder or a hub id."),
        (
            '[train.stage1]\nimage_encoder = "@captioner"\noutput = "first"',
            "",
            15,
            "init is '@stage1', but no section [train.stage1] stands before [train.stage2]",
        ),
        ('prompt = "a', 'losses = ["lm"]\nprompt = "a', 6, "no setting losses"),
        ('tokenizer = "embedded"', 'prompt = "a"', 2, "no setting prompt"),
        ("run_weights = [1, 2.0, 0.5]", "run_weights = [1, 2.0]", 11, "has 2 weights; expected 3, for the own run and"),
        ("run_weights = [1, 2.0, 0.5]", "run_weights = [1, 2.0, 0]", 11, "expected more than 0 each"),
        ("own_run = false", "own_run = false\nrun_weights = [1, 1]", 21, "has 2 weights; expected 1, for runs = "),
        ('runs = ["runs/human"]\nown_run', "own_run", 19, "own_run is False; expected true where no other runs"),
        ('output = "first"', 'output = "manifest"', 15, "none of the run's own folders"),
        ('output = "first"', 'output = "../first"', 15, "output is '../first'; expected letters"),
        ('output = "first"', 'output = "stage1@x"', 15, "output is 'stage1@x'; expected letters"),
        ('output = "first"', 'output = "filter"', 15, "which an earlier section writes to"),
        ('llm = "embedded-opt"', 'init = ""\nllm = "x"', 17, "image_encoder is ''; expected that of a new Q-Former"),
        ('llm = "embedded-opt"', "num_queries = 4", 18, "num_queries is 4; expected to be left out with init"),
        ('llm = "embedded-opt"', 'lm = "embedded-opt"', 18, "Did you mean llm?"),
        ('output = "first"', 'ouput = "first"', 15, "Did you mean output?"),
        ("own_run = false", "own_run = 0", 20, "expected true or false"),
    ],
)
def test_a_mistake_of_a_training_is_refused_with_its_line(
    tmp_path: Path, old: str, new: str, line: int, said: str
) -> None:
    assert CHAIN.count(old) == 1
    path = write(tmp_path, CHAIN.replace(old, new))
    with pytest.raises(UsageError) as caught:
        read_recipe(path)
    assert f"{path}:{line}:" in str(caught.value)
    assert said in str(caught.value)


def test_a_section_that_stands_too_late_is_refused(tmp_path: Path) -> None:
    text = '[train.stage2]\nllm = "embedded-opt"\n[train.stage1]\nimage_encoder = "embedded"'
    with pytest.raises(UsageError, match=r":1: .*no section \[train.stage1\] stands before \[train.stage2\]"):
        read_recipe(write(tmp_path, text))


def test_a_stage2_without_stage1_is_read(tmp_path: Path) -> None:
    text = '[train.stage2]\ninit = ""\nimage_encoder = "embedded"\nnum_queries = 4\nllm = "embedded-opt"'
    (section,) = read_recipe(write(tmp_path, text)).trainings
    assert section.results == {}
    assert section.settings == Stage2Section(init="", image_encoder="embedded", num_queries=4, llm="embedded-opt")


# --- the recipes of the miniature world ---------------------------------------------------------------------

WORLD = [name for name in sorted(bundled_recipes()) if name.startswith("world-")]


def test_world_recipes_share_a_run_and_what_is_curated_and_trained_in_it() -> None:
    """What one has done the others find: the same run and sections, and no folder with two contents."""
    recipes = [read_recipe(name) for name in WORLD]
    assert len(recipes) == 6
    curated = [(r.run_dir, r.source, r.download, r.caption, r.rank, r.filter) for r in recipes]
    assert all(sections == curated[0] for sections in curated)
    by_output: dict[str, set[TrainSettings]] = {}
    for section in (section for recipe in recipes for section in recipe.trainings):
        by_output.setdefault(section.output, set()).add(section.settings)
    assert {output for output, contents in by_output.items() if len(contents) > 1} == set()
    assert set(by_output) == {
        "stage1", "stage1-no-itg", "stage2-opt", "stage2-t5", "stage2-alone", "blip", "captioner", "filter",
    }  # fmt: skip


def test_what_is_compared_differs_in_nothing_else() -> None:
    """With and without ITG; with and without stage 1; OPT and T5."""
    sections = {section.output: section.settings for name in WORLD for section in read_recipe(name).trainings}
    assert replace(sections["stage1"], losses=("itc", "itm")) == sections["stage1-no-itg"]
    assert replace(sections["stage2-opt"], llm="embedded-t5", max_steps=2000) == sections["stage2-t5"]
    stage1, alone = sections["stage1"], sections["stage2-alone"]
    start = ("image_encoder", "init_cross_attention", "num_queries", "seed")
    assert [getattr(alone, name) for name in start] == [getattr(stage1, name) for name in start]
    defaults = {"image_encoder": "", "init_cross_attention": False, "num_queries": 32}
    assert replace(alone, init="@stage1", **defaults) == sections["stage2-opt"]


def test_schedules_are_the_papers() -> None:
    """Images in a step, as the recipes' comments count them, and the schedules (BLIP §4.1; BLIP-2 §3.4)."""
    blip = {section.name: section.settings for section in read_recipe("blip").trainings}
    assert blip["blip"].batch_size * blip["blip"].accumulation_steps * 32 == 2880
    assert isinstance(blip["blip"], BlipTrainSettings)
    assert blip["blip"].queue_size % 2880 == 0
    assert (blip["blip"].learning_rate, blip["blip"].weight_decay, blip["blip"].warmup_steps) == (3e-4, 0.05, 3000)
    assert [blip[part].learning_rate for part in ("captioner", "filter")] == [1e-5, 1e-5]
    stages = {section.name: section.settings for section in read_recipe("blip2").trainings}
    assert [stages[name].batch_size * 16 for name in ("stage1", "stage2")] == [2320, 1920]
    assert [stages[name].max_steps for name in ("stage1", "stage2")] == [250_000, 80_000]
    assert {(s.beta2, s.learning_rate, s.warmup_steps, s.weight_decay) for s in stages.values()} == {
        (0.98, 1e-4, 2000, 0.05)
    }
    assert [stages[name].min_learning_rate for name in ("stage1", "stage2")] == [0.0, 5e-5]
