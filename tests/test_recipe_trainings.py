"""Recipes that train alone: a chain of five, several runs, a kill, several processes; `--dry-run` of every recipe."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import (
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
)

from capfilt.data.rundir import RunDir
from capfilt.errors import FingerprintMismatchError, UsageError
from capfilt.pipeline import StepResult, run_recipe
from capfilt.plan import plan_recipe
from capfilt.recipes import Recipe, bundled_recipes, read_recipe
from capfilt.train.pairs import runs_digest
from capfilt.weights.model_files import weights_digest
from tests.cli.conftest import capfilt
from tests.curation.small_runs import make_run
from tests.train import small_models

ROOT = Path(__file__).resolve().parent.parent
NAMES = ["blip", "captioner", "filter", "stage1", "stage2"]
CHAIN = """
description = "five trainings, each from the ones before it"

[train.blip]
tokenizer = "{models}/bert"
image_size_px = 32
patch_size_px = 8
vision_width = 32
vision_depth = 1
text_width = 32
text_depth = 2
head_width = 16
embed_dim = 16
max_positions = 40
queue_size = 16
max_steps = 2
batch_size = 4
warmup_steps = 0

[train.captioner]
init = "@blip"
prompt = "here is "
max_steps = 2
batch_size = 4
warmup_steps = 0

[train.filter]
init = "@blip"
queue_size = 16
max_steps = 2
batch_size = 4
warmup_steps = 0

[train.stage1]
image_encoder = "@captioner"
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
    small_models.save_bert(folder / "bert")
    small_models.save_opt(folder / "opt")
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return small_models.save_run(tmp_path / "run", [10, 6]).path


def chain(folder: Path, models: Path, *changes: tuple[str, str]) -> Recipe:
    """The recipe with parts of its text replaced."""
    text = CHAIN.format(models=models)
    for old, new in changes:
        assert text.count(old) >= 1, old
        text = text.replace(old, new)
    path = folder / "chain.toml"
    path.write_text(text, encoding="utf-8")
    return read_recipe(str(path))


def only_blip(folder: Path, models: Path, more: str = "") -> Recipe:
    path = folder / "pretrain.toml"
    path.write_text(CHAIN.format(models=models).partition("[train.captioner]")[0] + more, encoding="utf-8")
    return read_recipe(str(path))


def finish(recipe: Recipe, run: Path, generation: str | None = None) -> dict[str, StepResult]:
    return {step.name: step for step in run_recipe(recipe, run, generation=generation)}


def fields_of(folder: Path) -> dict:
    return json.loads((folder / "training.json").read_text())["fields"]


# --- five trainings in a row --------------------------------------------------------------------------------


def test_five_trainings_each_from_what_it_names_then_again(models: Path, run: Path, tmp_path: Path) -> None:
    recipe = chain(tmp_path, models)
    assert [(plan.name, plan.state) for plan in plan_recipe(recipe, run)] == [
        ("shards", "2 shards"), *((name, "to do") for name in NAMES),
    ]  # fmt: skip
    results = finish(recipe, run)
    assert list(results) == NAMES
    assert [results[name].output_dir for name in NAMES] == [run / name for name in NAMES]
    for cls, folder in (
        (BlipForConditionalGeneration, "blip/captioner"), (BlipForImageTextRetrieval, "blip/filter"),
        (BlipForConditionalGeneration, "captioner"), (BlipForImageTextRetrieval, "filter"),
        (Blip2ForImageTextRetrieval, "stage1"), (Blip2ForConditionalGeneration, "stage2"),
    ):  # fmt: skip
        _, info = cls.from_pretrained(run / folder, output_loading_info=True)
        assert not info["missing_keys"], folder
    assert fields_of(run / "captioner")["origin_sha256"] == weights_digest(run / "blip" / "captioner")
    assert fields_of(run / "filter")["origin_sha256"] == weights_digest(run / "blip" / "filter")
    assert fields_of(run / "stage1")["image_encoder_sha256"] == weights_digest(run / "captioner")
    assert fields_of(run / "stage2")["init_sha256"] == weights_digest(run / "stage1")

    assert all(step.summary.already_done for step in finish(recipe, run).values())
    assert [plan.state for plan in plan_recipe(recipe, run)] == ["2 shards", *["done"] * 5]

    changed = chain(tmp_path, models, ('prompt = "here is "', 'prompt = "a "'))
    plans = {plan.name: plan for plan in plan_recipe(changed, run)}
    assert [plans[name].state for name in NAMES] == ["done", "other settings", "done", "to do", "to do"]
    assert plans["captioner"].differences == "prompt 'here is ' -> 'a '"
    with pytest.raises(FingerprintMismatchError, match=r"captioner holds .*prompt 'here is ' -> 'a '.*--generation"):
        finish(changed, run)


def test_a_generation_has_trainings_of_its_own(models: Path, run: Path, tmp_path: Path) -> None:
    recipe = chain(tmp_path, models)
    finish(recipe, run)
    before = (run / "stage2" / "training.json").read_bytes()
    first = small_models.save_generation(run, "first")
    assert {plan.state for plan in plan_recipe(recipe, run, "first")[1:]} == {"to do"}
    finish(recipe, run, "first")
    assert fields_of(run / "blip@first")["input"] == runs_digest([first]) != runs_digest([run])
    assert fields_of(run / "captioner@first")["origin_sha256"] == weights_digest(run / "blip@first" / "captioner")
    assert fields_of(run / "stage2@first")["init_sha256"] == weights_digest(run / "stage1@first")
    assert (run / "stage2" / "training.json").read_bytes() == before
    assert {plan.state for plan in plan_recipe(recipe, run, "first")[1:]} == {"done"}


def test_a_plan_says_what_each_training_starts_from(models: Path, run: Path, tmp_path: Path) -> None:
    recipe = chain(
        tmp_path, models,
        ("[train.captioner]\n", "[train.captioner]\naccumulation_steps = 3\n"),
        ('image_encoder = "@captioner"', f'qformer_init = "{models}/bert"\nimage_encoder = "owner/clip"'),
        ("num_queries = 2", 'num_queries = 2\noutput = "one"'),
    )  # fmt: skip
    done = capfilt("run", recipe.path, run, "--dry-run")
    assert done.code == 0, done.err
    *lines, there, left, disk = done.out.splitlines()[3:]
    assert [line.split()[0] for line in (there, left, disk)] == ["there", "left", "disk"]
    texts = {line.split()[0]: " ".join(line.split()[3:]) for line in lines}
    assert texts == {
        "blip": f"2 steps of 4 images from no earlier training, tokenizer {models}/bert",
        "captioner": "2 steps of 12 images from @blip",
        "filter": "2 steps of 4 images from @blip",
        "stage1": "2 steps of 4 images from no earlier training, image_encoder owner/clip (not here: not compared), "
        f"qformer_init {models}/bert, into one",
        "stage2": f"2 steps of 4 images from @stage1, llm {models}/opt",
    }


# --- which runs ---------------------------------------------------------------------------------------------


def test_trainings_read_further_runs(models: Path, run: Path, tmp_path: Path) -> None:
    human = small_models.save_run(tmp_path / "human", [8], seed=9).path
    recipe = chain(
        tmp_path, models,
        ("[train.blip]\n", f'[train.blip]\nruns = ["{human}"]\nrun_weights = [1.0, 2.0]\n'),
        ('init = "@blip"\nprompt', f'init = "@blip"\nruns = ["{human}"]\nown_run = false\nprompt'),
    )  # fmt: skip
    finish(recipe, run)
    inputs = [fields_of(run / name)["input"] for name in NAMES]
    both, own, other = runs_digest([run, human]), runs_digest([run]), runs_digest([human])
    assert len({both, own, other}) == 3
    assert inputs == [both, other, own, own, own]
    assert fields_of(run / "blip")["run_weights"] == [1.0, 2.0]
    plans = {plan.name: plan for plan in plan_recipe(recipe, run)}
    assert {plans[name].state for name in NAMES} == {"done"}
    assert plans["blip"].what.endswith(f", on this run and {human}")
    assert plans["captioner"].what.endswith(f", on {human}")
    without = chain(tmp_path, models)
    refused = {plan.name: plan.differences for plan in plan_recipe(without, run) if plan.state == "other settings"}
    assert refused == {"blip": "another input (other pairs or texts), run_weights [1.0, 2.0] -> []"}


def test_a_further_run_that_is_none_is_named_before_anything_is_done(models: Path, run: Path, tmp_path: Path) -> None:
    RunDir.create(tmp_path / "empty")
    source = "[source]\nworld_urls = 10\n"
    for name, said in (
        ("missing", "is no run|is not a run"), ("empty", "No shards in"), ("run", "names .*run in runs, which is the"),
    ):  # fmt: skip
        text = only_blip(tmp_path, models).path.read_text() + f'runs = ["{tmp_path / name}"]\n'
        path = tmp_path / "named.toml"
        path.write_text(text + source, encoding="utf-8")
        recipe = read_recipe(str(path))
        target = run if name == "run" else tmp_path / "new"
        for start in (lambda r=recipe, t=target: finish(r, t), lambda r=recipe, t=target: plan_recipe(r, t)):
            with pytest.raises(UsageError, match=said) as caught:
                start()
            assert str(tmp_path / name) in str(caught.value)
        assert not (tmp_path / "new").exists()


def test_a_run_without_what_is_trained_on_is_refused(models: Path, tmp_path: Path) -> None:
    recipe = only_blip(tmp_path, models)
    shards_alone = make_run(tmp_path / "shards").path
    for start in (finish, plan_recipe):
        with pytest.raises(UsageError, match="is not a run|No shards"):
            start(recipe, tmp_path / "none")
        with pytest.raises(UsageError, match="has no manifest yet"):
            start(recipe, shards_alone)


# --- a kill, several processes ------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_kill_in_the_second_training_costs_nothing(models: Path, tmp_path: Path) -> None:
    recipe = chain(
        tmp_path, models,
        ('prompt = "here is "\nmax_steps = 2', 'prompt = "here is "\nsave_every_steps = 5\nmax_steps = 100'),
        ("[train.stage1]" + CHAIN.format(models=models).partition("[train.stage1]")[2], ""),
    )  # fmt: skip
    killed, undisturbed = (small_models.save_run(tmp_path / name, [10, 6]).path for name in ("killed", "whole"))
    command = [sys.executable, "-m", "capfilt", "run", str(recipe.path), str(killed)]
    with subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE) as process:
        deadline = time.monotonic() + 120
        while not list((killed / "captioner" / "checkpoints").glob("step-*")):
            assert process.poll() is None, process.stderr and process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert (killed / "blip" / "training.json").exists()
    assert not (killed / "captioner" / "training.json").exists()
    plans = {plan.name: plan.state for plan in plan_recipe(recipe, killed)}
    step = int(plans["captioner"].split()[0])
    assert 0 < step < 100
    assert step % 5 == 0
    assert [plans[name] for name in ("blip", "filter")] == ["done", "to do"]

    resumed, whole = finish(recipe, killed), finish(recipe, undisturbed)
    assert resumed["blip"].summary.already_done
    assert not resumed["captioner"].summary.already_done
    for name in ("captioner", "filter"):
        assert resumed[name].summary.last_losses == pytest.approx(whole[name].summary.last_losses, rel=1e-4)
        found, expected = (load_file(path / name / "model.safetensors") for path in (killed, undisturbed))
        assert found.keys() == expected.keys()
        assert max(float((found[key] - expected[key]).abs().max()) for key in found) < 1e-4


@pytest.mark.slow
def test_several_processes_train_what_was_curated(models: Path, run: Path, tmp_path: Path) -> None:
    """The captioner that the recipe names is nowhere: with torchrun the curation is left alone."""
    curation = '[caption]\ncaptioner = "no/where"\n[filter]\nfilter_model = "no/where"\n'
    recipe = only_blip(tmp_path, models, curation)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "capfilt"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*launch, "run", str(recipe.path), str(run)],
        env=environment, capture_output=True, text=True, timeout=240, cwd=ROOT, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("blip: 2 steps") == 1
    assert fields_of(run / "blip")["num_processes"] == 2


# --- every bundled recipe -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(bundled_recipes()))
def test_dry_run_of_every_bundled_recipe(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a run with shards alone; nothing is changed, no model is loaded. Runs of human captions are not there yet."""
    monkeypatch.chdir(tmp_path)
    run = make_run(tmp_path / "run", num_shards=1, num_samples=2).path
    before = sorted(run.rglob("*"))
    curation = capfilt("run", name, run, "--dry-run", "--json", "--curate-only")
    assert [step["name"] for step in curation.json()["steps"]] == ["shards", "captions", "clip", "itm", "manifest"]
    further = {named for section in read_recipe(name).trainings for named in section.data.runs}
    if further:
        refused = capfilt("run", name, run, "--dry-run")
        assert (refused.code, f"{min(further)} is not a run" in refused.err) == (2, True)
    for named in further:
        small_models.save_run(tmp_path / named, [3])
    done = capfilt("run", name, run, "--dry-run", "--json")
    assert done.code == 0, done.err
    steps = {step["name"]: step for step in done.json()["steps"]}
    trainings = [section.name for section in read_recipe(name).trainings]
    assert list(steps) == ["shards", "captions", "clip", "itm", "manifest", *trainings]
    assert {steps[training]["state"] for training in trainings} <= {"to do"}
    assert sorted(run.rglob("*")) == before


@pytest.mark.slow
@pytest.mark.network
def test_every_recipe_of_the_world_runs_as_it_stands(tmp_path: Path) -> None:
    """With fewer URLs, a step each and small batches; all in one run, whose curation and stage 1 are done once."""
    world = [read_recipe(name) for name in sorted(bundled_recipes()) if name.startswith("world-")]
    done_before: set[str] = set()
    for recipe in world:
        assert recipe.source is not None
        short = replace(
            recipe,
            source=replace(recipe.source, world_urls=24),
            trainings=tuple(
                replace(section, settings=replace(section.settings, max_steps=1, batch_size=4))
                for section in recipe.trainings
            ),
        )
        for step in run_recipe(short, tmp_path / "run"):
            if step.output_dir is not None:
                assert step.summary.already_done == (step.output_dir.name in done_before), step
                done_before.add(step.output_dir.name)
            elif recipe is not world[0]:
                assert step.summary.line().startswith("Nothing to"), step
        assert {plan.state for plan in plan_recipe(short, tmp_path / "run")[5:]} == {"done"}
    assert len(done_before) == 8
