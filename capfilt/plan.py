"""What a recipe would do to a run, and what of it is there already: `capfilt run --dry-run`.

In: a recipe and a run directory. Out: a line for each step. Changes nothing, loads no model, asks no network.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from capfilt.data.commit import file_sha256, read_commit_record
from capfilt.data.rundir import RunDir
from capfilt.errors import UsageError
from capfilt.pipeline import training_dir
from capfilt.recipes import Recipe, SourceSettings
from capfilt.settings import TrainSettings
from capfilt.weights.find import find_local_dir


@dataclass(frozen=True)
class StepPlan:
    """One line of the plan: what would be done, and how much of it is there."""

    name: str
    what: str
    state: str
    """"to do", "done", "2 of 3 shards", or "other settings" where what is there was made otherwise."""
    differences: str = ""
    """What differs where the state is "other settings"; `capfilt run` refuses to mix it."""


@dataclass(frozen=True)
class _Stage:
    """A stage of the recipe: the settings its commit record must agree with, and its model."""

    name: str
    what: str
    settings: Mapping[str, Any]
    model: str = ""
    embedded: str | None = None


def plan_recipe(recipe: Recipe, run_path: Path, generation: str | None = None) -> list[StepPlan]:
    """What `run_recipe` would do, and what of it is there.

    Raises UsageError when the recipe has no [source] and the run no shards.
    """
    run = RunDir.open(run_path, generation) if (run_path / "run.json").exists() else None
    shards = run.shard_names() if run else []
    if not shards and recipe.source is None:
        raise UsageError(f"No shards in {run_path}/shards, and {recipe.path} has no [source].")
    plans = [StepPlan("shards", _source_text(recipe.source), _count(len(shards)))]
    plans += [_plan_stage(stage, run, shards) for stage in _stages(recipe)]
    if recipe.stage1 is not None:
        models = {"image_encoder_sha256": find_local_dir(recipe.stage1.image_encoder, "captioner")}
        plans.append(_plan_training("stage1", recipe.stage1, training_dir(run_path, "stage1", generation), run, models))
    if recipe.stage2 is not None:
        models = {"llm_sha256": find_local_dir(recipe.stage2.llm, None)}
        output_dir = training_dir(run_path, "stage2", generation)
        plans.append(_plan_training("stage2", recipe.stage2.settings(), output_dir, run, models))
    return plans


def _stages(recipe: Recipe) -> list[_Stage]:
    found = []
    if said := recipe.caption:
        what = f"{said.num_captions} captions an image ({said.decoding}) by {said.captioner or '(none named)'}"
        settings = {name: getattr(said, name) for name in said.fingerprint_fields}
        if said.prompt is None:  # the model's own
            del settings["prompt"]
        found.append(_Stage("captions", what, settings, said.captioner, "captioner"))
    if said := recipe.rank:
        name = said.clip_model + (f" / {said.clip_weights}" if said.clip_weights else "")
        what = f"CLIP scores by {name}, best {said.keep} kept"
        settings = {name: getattr(said, name) for name in said.fingerprint_fields}
        found.append(_Stage("clip", what, settings, said.clip_weights or said.clip_model, "clip"))
    if said := recipe.filter:
        what = f"ITM scores by {said.filter_model or '(none named)'}"
        settings = {name: getattr(said, name) for name in said.fingerprint_fields}
        found.append(_Stage("itm", what, settings, said.filter_model, "filter"))
        ranking = {} if recipe.rank is None else {"keep": recipe.rank.keep, "include_web": recipe.rank.include_web}
        found.append(_Stage("manifest", f"threshold {said.threshold:g}", {"threshold": said.threshold, **ranking}))
    return found


def _plan_stage(stage: _Stage, run: RunDir | None, shards: list[str]) -> StepPlan:
    done = [shard for shard in shards if shard in set(run.committed(stage.name))] if run else []
    if run is None or not done:
        return StepPlan(stage.name, stage.what, "to do")
    path = run.read_file(stage.name, done[0])
    differences = _differences(stage, read_commit_record(path).fields)
    if not differences:
        return StepPlan(stage.name, stage.what, f"{len(done):,} of {_count(len(shards))}")
    if path != run.stage_file(stage.name, done[0]):  # of the default generation, which this one does not use then
        return StepPlan(stage.name, stage.what, "to do")
    return StepPlan(stage.name, stage.what, "other settings", differences)


def _differences(stage: _Stage, made_with: Mapping[str, Any]) -> str:
    """Settings, and the model where it is a folder here, that differ from those of a commit record."""
    differing = [
        f"{name} {made_with.get(name)!r} -> {value!r}"
        for name, value in stage.settings.items()
        if made_with.get(name) != value
    ]
    folder = find_local_dir(stage.model, stage.embedded) if stage.model else None
    if folder is not None and not _has_files(folder, made_with["model"]):
        differing.append(f"another model than {stage.model}")
    return ", ".join(differing)


def _has_files(folder: Path, digests: Mapping[str, str]) -> bool:
    return all((folder / name).is_file() and file_sha256(folder / name) == digest for name, digest in digests.items())


def _plan_training(
    name: str, settings: TrainSettings, output_dir: Path, run: RunDir | None, models: Mapping[str, Path | None]
) -> StepPlan:
    """A training, compared by its settings, the pairs of the run and those of its models that are folders here."""
    from capfilt.train.checkpoint import setting_changes
    from capfilt.train.loop import binding_settings
    from capfilt.train.pairs import runs_digest
    from capfilt.weights.model_files import weights_digest

    what = f"{settings.max_steps:,} steps of {settings.batch_size} images"
    record = output_dir / "training.json"
    if run is None or not record.exists():
        return StepPlan(name, what, "to do")
    wanted = binding_settings(settings) | {"input": runs_digest([run])}
    wanted |= {field: weights_digest(folder) for field, folder in models.items() if folder is not None}
    made_with = {name: value for name, value in json.loads(record.read_text())["fields"].items() if name in wanted}
    changes = setting_changes(made_with, wanted)
    return StepPlan(name, what, "other settings" if changes else "done", changes)


def _source_text(source: SourceSettings | None) -> str:
    if source is None:
        return "the shards that are there"
    if source.world_urls:
        return f"download {source.world_urls:,} URLs of the miniature world"
    return f"download {source.table}" if source.table else f"import {', '.join(source.tars)}"


def _count(num_shards: int) -> str:
    return f"{num_shards:,} shard{'' if num_shards == 1 else 's'}" if num_shards else "to do"
