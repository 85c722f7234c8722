"""A whole recipe, from the miniature world's site to stage 2, with small random models; then again."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

from capfilt.curation.selection import reselect
from capfilt.data.manifest import read_manifest
from capfilt.data.rundir import RunDir
from capfilt.errors import FingerprintMismatchError, UsageError
from capfilt.pipeline import open_world, run_dir_of, run_recipe
from capfilt.plan import plan_recipe
from capfilt.recipes import Recipe, read_recipe
from tests import factories
from tests.train import small_models

NUM_URLS = 40
RECIPE = """
description = "all steps"

[source]
world_urls = {num_urls}
world_seed = {seed}

[download]
samples_per_shard = 20
timeout_seconds = 3
num_processes = 1

[caption]
captioner = "{models}/captioner"
num_captions = 2
max_length = 12

[rank]
clip_model = "{models}/clip"
keep = 1

[filter]
filter_model = "{models}/filter"
threshold = 0.0

[train.stage1]
image_encoder = "{models}/captioner"
num_queries = 2
max_steps = 2
batch_size = 4
warmup_steps = 0

[train.stage2]
llm = "{models}/opt"
max_steps = 2
batch_size = 4
warmup_steps = 0
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    factories.save_captioner(folder / "captioner")
    factories.save_filter(folder / "filter")
    factories.save_clip(folder / "clip")
    small_models.save_opt(folder / "opt")
    return folder


def recipe_with(folder: Path, models: Path, *, seed: int = 3, old: str = "", new: str = "") -> Recipe:
    text = RECIPE.format(models=models, seed=seed, num_urls=NUM_URLS)
    path = folder / "all.toml"
    path.write_text(text.replace(old, new) if old else text, encoding="utf-8")
    return read_recipe(str(path))


def test_whole_recipe_then_again(models: Path, tmp_path: Path) -> None:
    recipe, run = recipe_with(tmp_path, models), tmp_path / "run"
    assert [plan.state for plan in plan_recipe(recipe, run)] == ["to do"] * 7
    assert not run.exists()

    results = {step.name: step.summary for step in run_recipe(recipe, run)}
    assert list(results) == ["download", "annotate", "stage1", "stage2"]
    assert results["download"].num_rows == NUM_URLS
    assert results["download"].num_succeeded + sum(results["download"].failures.values()) == NUM_URLS
    assert results["stage1"].steps == results["stage2"].steps == 2
    manifest = read_manifest([run])
    assert manifest.num_rows == 3 * results["download"].num_succeeded
    assert json.loads((run / "stage2" / "config.json").read_text())["model_type"] == "blip-2"

    again = {step.name: step.summary for step in run_recipe(recipe, run)}
    assert again["download"].num_new_shards == 0
    assert again["annotate"].stages["captions"].num_new_shards == 0
    assert again["stage1"].already_done
    assert again["stage2"].already_done
    assert read_manifest([run]).equals(manifest)
    states = {plan.name: plan.state for plan in plan_recipe(recipe, run)}
    assert states["manifest"] == "2 of 2 shards"
    assert states["stage2"] == "done"

    reselect(RunDir.open(run), sources=["web"])
    refused = {plan.name: plan.differences for plan in plan_recipe(recipe, run) if plan.state == "other settings"}
    assert refused == {"manifest": "sources ['web'] -> ['web', 'synthetic']"}
    reselect(RunDir.open(run), sources=["web", "synthetic"])

    changed = recipe_with(tmp_path, models, old="num_captions = 2", new="num_captions = 3")
    with pytest.raises(FingerprintMismatchError, match="num_captions"):
        list(run_recipe(changed, run))
    refused = {plan.name: plan.differences for plan in plan_recipe(changed, run) if plan.state == "other settings"}
    assert refused == {"captions": "num_captions 2 -> 3"}
    in_generation = {plan.name: plan.state for plan in plan_recipe(changed, run, "three")}
    assert in_generation.pop("shards") == "2 shards"
    assert set(in_generation.values()) == {"to do"}
    other_model = recipe_with(tmp_path, models, old=f"{models}/clip", new=f"{models}/filter")
    refused = {plan.name: plan.differences for plan in plan_recipe(other_model, run) if plan.state == "other settings"}
    assert refused == {"clip": f"another model than {models}/filter"}
    other_shards = recipe_with(tmp_path, models, old="samples_per_shard = 20", new="samples_per_shard = 30")
    assert plan_recipe(other_shards, run)[0].differences == "samples_per_shard 20 -> 30"
    with_rules = recipe_with(tmp_path, models, old="[download]", new="[download]\nrobots_txt = true")
    assert "robots_txt" in plan_recipe(with_rules, run)[0].differences
    hub_model = recipe_with(tmp_path, models, old=f"{models}/clip", new="owner/name")
    assert "owner/name (no folder here: not compared)" in plan_recipe(hub_model, run)[2].what
    more_steps = recipe_with(tmp_path, models, old="max_steps = 2", new="max_steps = 3")
    steps = {plan.name: plan for plan in plan_recipe(more_steps, run)}
    assert (steps["captions"].state, steps["stage1"].state) == ("2 of 2 shards", "other settings")
    assert "max_steps 2 -> 3" in steps["stage1"].differences
    with pytest.raises(FingerprintMismatchError, match=r"max_steps 2 -> 3.*--generation"):
        list(run_recipe(more_steps, run))
    before = (run / "stage2" / "training.json").read_bytes()
    summaries = {step.name: step.summary for step in run_recipe(changed, run, generation="three")}
    assert not summaries["stage1"].already_done
    fields = [json.loads((run / name / "training.json").read_text())["fields"] for name in ("stage2", "stage2@three")]
    assert fields[0]["input"] != fields[1]["input"], "trained on the generation's own pairs"
    assert fields[0]["init_sha256"] != fields[1]["init_sha256"]
    assert (run / "stage2" / "training.json").read_bytes() == before
    assert {plan.state for plan in plan_recipe(changed, run, "three")[-2:]} == {"done"}
    with pytest.raises(UsageError, match="Name another run"):
        list(run_recipe(recipe_with(tmp_path, models, seed=4), run))


def test_a_world_keeps_its_addresses(tmp_path: Path) -> None:
    with open_world(tmp_path / "a", 5, seed=1) as first:
        first_table = first.read_bytes()
    with open_world(tmp_path / "b", 5, seed=1) as second:
        assert second.read_bytes() == first_table  # the same port, because it is free
        with open_world(tmp_path / "c", 5, seed=1) as third:
            assert third.read_bytes() != first_table
    with open_world(tmp_path / "c", 5, seed=1) as third:
        assert json.loads((tmp_path / "c" / "world" / "site.json").read_text())["num_urls"] == 5
    described = json.loads((tmp_path / "a" / "world" / "site.json").read_text())
    with socket.create_server(("127.0.0.1", described["port"])):
        with open_world(tmp_path / "a", 5, seed=1, serve=False) as table:
            assert table.read_bytes() == first_table
        with pytest.raises(UsageError, match="port"), open_world(tmp_path / "a", 5, seed=1):
            pass


def test_run_directory(models: Path, tmp_path: Path) -> None:
    recipe = recipe_with(tmp_path, models)
    assert run_dir_of(recipe, None) == Path("runs/all")
    assert run_dir_of(recipe, Path("x")) == Path("x")
    assert run_dir_of(read_recipe("quickstart"), None) == Path("runs/quickstart")


def test_a_recipe_without_a_source_needs_shards(tmp_path: Path) -> None:
    recipe = read_recipe("capfilt")
    with pytest.raises(UsageError, match="capfilt download"):
        list(run_recipe(recipe, tmp_path / "none"))
    with pytest.raises(UsageError, match="No shards"):
        plan_recipe(recipe, tmp_path / "none")
