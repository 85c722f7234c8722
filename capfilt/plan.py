"""What a recipe would do to a run, and what of it is there already: `capfilt run --dry-run`.

In: a recipe and a run directory. Out: a line for each step. Changes nothing, loads no model, asks no network.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from capfilt.curation.download import download_fields
from capfilt.curation.selection import SOURCES
from capfilt.data.commit import file_sha256, input_digest, read_commit_record
from capfilt.data.field_changes import field_changes
from capfilt.data.paths import AnyPath
from capfilt.data.retries import stage_shards
from capfilt.data.rundir import RunDir, is_run
from capfilt.pipeline import (
    download_settings,
    no_shards,
    open_further_runs,
    read_site,
    require_manifest,
    require_place,
    resolved_settings,
    training_dir,
    world_dir,
)
from capfilt.progress import counted
from capfilt.recipes import Recipe, SourceSettings, TrainingSection
from capfilt.settings import TrainSettings
from capfilt.trainings import MODEL_SETTINGS, RESULT, TRAININGS
from capfilt.weights.find import find_local_dir


@dataclass(frozen=True)
class StepPlan:
    """One line of the plan: what would be done, and how much of it is there."""

    name: str
    what: str
    state: str
    """"to do", "done", "2 of 3 shards", "500 steps", or "other settings" where what is there was made otherwise."""
    differences: str = ""
    """What differs where the state is "other settings"; `capfilt run` refuses to mix it."""
    lacking: tuple[str, ...] = field(default=(), repr=False)
    """Of a stage of curation: shards that are there and lack it, or would be given it anew."""


@dataclass(frozen=True)
class _Stage:
    """A stage of the recipe: the settings its commit record must agree with, and its model."""

    name: str
    what: str
    settings: Mapping[str, Any]
    model: str = ""
    embedded: str | None = None


def plan_recipe(recipe: Recipe, run_path: AnyPath, generation: str | None = None) -> list[StepPlan]:
    """What `run_recipe` would do, and what of it is there.

    Raises UsageError as `run_recipe` does before it begins, CorruptionError for a damaged record.
    """
    require_place(recipe, run_path)
    for section in recipe.trainings:
        open_further_runs(section, run_path)
    run = RunDir.open(run_path, generation) if is_run(run_path) else None
    shards = stage_shards(run) if run else []
    if not shards and recipe.source is None:
        raise no_shards(recipe, run_path)
    if run is not None and shards and recipe.filter is None and recipe.trainings:
        require_manifest(run)  # the recipe makes none
    plans = [_plan_shards(recipe, run, shards)]
    if run is None or not shards:
        return plans + [StepPlan(name, what, "to do") for name, what in _steps_after_the_shards(recipe)]
    stages = list(_plan_stages(recipe, run, shards))
    plans += [plan for plan, _ in stages]
    done = stages[-1][1] if stages else set(shards)
    has_manifest = set(shards) == done and done <= set(run.committed("manifest"))
    return plans + _plan_trainings(recipe, run, has_manifest=has_manifest)


def _plan_stages(recipe: Recipe, run: RunDir, shards: Sequence[str]) -> Iterator[tuple[StepPlan, set[str]]]:
    """The plan of each stage, and the shards that have it and all before it."""
    ready = set(shards)
    for stage in _stages(recipe):
        plan, ready = _plan_stage(stage, run, ready, len(shards))
        lacking = () if plan.differences else tuple(shard for shard in shards if shard not in ready)
        yield replace(plan, lacking=lacking), ready


def _plan_shards(recipe: Recipe, run: RunDir | None, shards: list[str]) -> StepPlan:
    """The shards; those that were downloaded are compared by their settings and their world; a table is not read."""
    what, source = _source_text(recipe.source), recipe.source
    if run is None or not shards or source is None or source.tars:
        return StepPlan("shards", what, _shards_text(shards))
    made_with = read_commit_record(run.stage_file("shards", shards[0])).fields
    wanted = download_fields(made_with.get("table_sha256", ""), download_settings(recipe))
    wanted = {name: wanted.get(name) for name in dict.fromkeys([*wanted, *made_with])}
    old = {name: made_with.get(name) for name in wanted}
    if source.world_urls:
        known = read_site(world_dir(run.path)) or {}
        wanted |= {"world_urls": source.world_urls, "world_seed": source.world_seed}
        old |= {"world_urls": known.get("num_urls"), "world_seed": known.get("seed")}
    differences = ", ".join(field_changes(old, wanted))
    return StepPlan("shards", what, "other settings" if differences else _shards_text(shards), differences)


def _steps_after_the_shards(recipe: Recipe) -> Iterator[tuple[str, str]]:
    yield from ((stage.name, stage.what) for stage in _stages(recipe))
    yield from ((section.name, _training_text(section)) for section in recipe.trainings)


def _stages(recipe: Recipe) -> list[_Stage]:
    found = []
    if said := recipe.caption:
        what = f"{said.num_captions} captions an image ({said.decoding}) by {_model_text(said.captioner, 'captioner')}"
        settings = {name: getattr(said, name) for name in said.fingerprint_fields}
        if said.prompt is None:  # the model's own
            del settings["prompt"]
        settings |= _precision(said.dtype)
        found.append(_Stage("captions", what, settings, said.captioner, "captioner"))
    if said := recipe.rank:
        name = said.clip_model + (f" / {said.clip_weights}" if said.clip_weights else "")
        local = said.clip_weights or said.clip_model
        what = f"CLIP scores by {_model_text(name, 'clip', local)}, best {said.keep} kept"
        settings = {name: getattr(said, name) for name in said.fingerprint_fields} | _precision(said.dtype)
        found.append(_Stage("clip", what, settings, said.clip_weights or said.clip_model, "clip"))
    if said := recipe.filter:
        what = f"ITM scores by {_model_text(said.filter_model, 'filter')}"
        settings = {name: getattr(said, name) for name in said.fingerprint_fields} | _precision(said.dtype)
        found.append(_Stage("itm", what, settings, said.filter_model, "filter"))
        ranking = {} if recipe.rank is None else {"keep": recipe.rank.keep, "include_web": recipe.rank.include_web}
        chosen = {"threshold": said.threshold, **ranking, "sources": list(SOURCES)}
        found.append(_Stage("manifest", f"threshold {said.threshold:g}", chosen))
    return found


def _precision(dtype: str) -> dict[str, str]:
    """Where it is the device's to choose, it is known when the models are loaded."""
    return {} if dtype == "auto" else {"dtype": dtype}


def _model_text(name: str, embedded: str, local: str = "") -> str:
    """The model's name; what is no folder here is not looked up, so it may be another than the one used before."""
    if not name:
        return "(none named)"
    return name if find_local_dir(local or name, embedded) else f"{name} (no folder here: not compared)"


def _plan_stage(stage: _Stage, run: RunDir, ready: set[str], num_shards: int) -> tuple[StepPlan, set[str]]:
    """The plan of a stage, and the shards that have it; `ready` have the stage before it as it will be."""
    done, differences = set[str](), ""
    compared: dict[str, str] = {}  # shards that were made alike are compared once
    for shard in sorted(run.committed(stage.name)):
        path = run.read_file(stage.name, shard)
        record = read_commit_record(path)
        if record.fingerprint not in compared:
            compared[record.fingerprint] = _differences(stage, record.fields)
        found = compared[record.fingerprint]
        if found and path == run.stage_file(stage.name, shard):
            differences = differences or found
        elif not found and shard in ready and record.input_digest == input_digest(run, stage.name, shard):
            done.add(shard)
    if differences:
        return StepPlan(stage.name, stage.what, "other settings", differences), set()
    state = f"{len(done):,} of {counted(num_shards, 'shard')}" if done else "to do"
    return StepPlan(stage.name, stage.what, state), done


def _differences(stage: _Stage, made_with: Mapping[str, Any]) -> str:
    """Settings, and the model where it is a folder here, that differ from those of a commit record."""
    made_with = {"sources": list(SOURCES), **made_with}  # recorded where `select` took fewer
    differing = field_changes({name: made_with.get(name) for name in stage.settings}, stage.settings)
    folder = find_local_dir(stage.model, stage.embedded)
    if folder is not None and not _has_files(folder, made_with["model"]):
        differing.append(f"another model than {stage.model}")
    return ", ".join(differing)


def _has_files(folder: Path, digests: Mapping[str, str]) -> bool:
    return all((folder / name).is_file() and file_sha256(folder / name) == digest for name, digest in digests.items())


def _plan_trainings(recipe: Recipe, run: RunDir, *, has_manifest: bool) -> list[StepPlan]:
    """Trainings, compared by settings, pairs and their models where those are here.

    A training is compared when what it reads is as it will be; until then it is to do.
    """
    plans: dict[str, StepPlan] = {}
    for section in recipe.trainings:
        output_dir = training_dir(run.path, section.output, run.generation)
        is_ready = (has_manifest or not section.data.own_run) and all(
            plans[name].state == "done" for name in section.results.values()
        )
        if is_ready and output_dir.is_dir():
            plans[section.name] = _compare_training(section, recipe, run, output_dir)
        else:
            plans[section.name] = StepPlan(section.name, _training_text(section), "to do")
    return list(plans.values())


def _compare_training(section: TrainingSection, recipe: Recipe, run: RunDir, output_dir: Path) -> StepPlan:
    from capfilt.train.checkpoint import find_checkpoint, read_training_record, setting_changes
    from capfilt.train.loop import binding_settings
    from capfilt.train.pairs import runs_digest
    from capfilt.train.processes import launched_autocast

    name, what, training = section.name, _training_text(section), TRAININGS[section.name]
    record = read_training_record(output_dir)
    if record is not None:
        state, fields = "done", record["fields"]
    elif (found := find_checkpoint(output_dir)) is not None:
        state, fields = f"{found[1]['step']:,} steps", found[1]["fields"]
    else:
        return StepPlan(name, what, "to do")
    settings = resolved_settings(recipe, section, run)
    settings = replace(settings, autocast=launched_autocast(settings))
    wanted = {key: value for key, value in binding_settings(settings).items() if key not in training.unused}
    own = [run] if section.data.own_run else []
    wanted["input"] = runs_digest([*own, *open_further_runs(section, run.path)])
    if all(_is_here(model) for model in _models_of(settings).values()):
        wanted |= training.identity(settings)
    changes = setting_changes({field: value for field, value in fields.items() if field in wanted}, wanted)
    return StepPlan(name, what, "other settings" if changes else state, changes)


def _models_of(settings: TrainSettings) -> dict[str, str]:
    """The settings that name a model, where one is named."""
    named = {setting: getattr(settings, setting, "") for setting in MODEL_SETTINGS}
    return {setting: model for setting, model in named.items() if model}


def _is_here(model: str) -> bool:
    """Whether a model can be compared without a network: an embedded one, a folder, a file."""
    return find_local_dir(model, "captioner") is not None or Path(model).expanduser().is_file()


def _training_text(section: TrainingSection) -> str:
    """Steps, what it starts from, what it reads, where it goes: `600 steps of 64 images from @stage1, llm …`."""
    settings, models = section.settings, _models_of(section.settings)
    shown = {
        setting: model if model.startswith(RESULT) or _is_here(model) else f"{model} (not here: not compared)"
        for setting, model in models.items()
    }
    start = f"from {shown.pop('init')}" if "init" in shown else "from no earlier training"
    parts = [
        f"{settings.max_steps:,} steps of {settings.batch_size * settings.accumulation_steps:,} images {start}",
        *(f"{setting} {model}" for setting, model in shown.items()),
    ]
    if section.data.runs:
        parts.append(f"on {' and '.join([*(['this run'] if section.data.own_run else []), *section.data.runs])}")
    return ", ".join(parts) + (f", into {section.output}" if section.data.output else "")


def _source_text(source: SourceSettings | None) -> str:
    if source is None:
        return "the shards that are there"
    if source.world_urls:
        return f"download {source.world_urls:,} URLs of the miniature world"
    return f"download {source.table}" if source.table else f"import {', '.join(source.tars)}"


def _shards_text(shards: Sequence[str]) -> str:
    return counted(len(shards), "shard") if shards else "to do"
