"""A JSON Schema of recipes, with which editors complete, explain and check them (taplo: `#:schema FILE`).

Made from the settings: their types, defaults and sentences, and what their classes refuse. What depends on two settings
(a length between two others) is left to `capfilt recipe check`.
"""

from __future__ import annotations

import json
import re
from typing import Any

from capfilt.recipes.recipe import TRAIN, Recipe, SourceSettings, settings_of
from capfilt.settings.described import Setting, describe
from capfilt.trainings import RESULT, TRAININGS

SCHEMA_FILE = "capfilt-recipe.schema.json"
"""Name under which `capfilt recipe new` puts it beside a recipe."""
TITLE = "A recipe of capfilt"


def recipe_schema() -> dict[str, Any]:
    """The schema (draft-07, which editors know) as JSON's types."""
    texts = {key: {"type": "string", "description": sentence} for key, sentence in Recipe.texts.items()}
    stages = {name: _section(name) for name in Recipe.sections if not name.startswith(TRAIN)}
    trainings = {name: _section(f"{TRAIN}{name}") for name in TRAININGS}
    given = {"not": {"enum": ["", [], 0]}}
    stages["source"]["oneOf"] = [
        {"required": [name], "properties": {name: given}} for name in SourceSettings.alternatives
    ]
    train = {"description": "Trainings, in the order of the file."} | _table(trainings)
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": TITLE,
        **_table(texts | stages | {"train": train}),
        "dependencies": {"rank": ["caption"], "filter": ["caption"]},
    }


def schema_text() -> str:
    """The schema as the file that editors read."""
    return json.dumps(recipe_schema(), indent=2, ensure_ascii=False) + "\n"


def settings_in(section: str) -> list[Setting]:
    """The settings that a section may have, described, in order."""
    by_class = {cls: {one.name: one for one in describe(cls)} for cls in set(settings_of(section).values())}
    return [by_class[cls][name] for name, cls in settings_of(section).items()]


def section_sentence(section: str) -> str:
    """What a section is: the first paragraph of its class's docstring."""
    paragraph = (Recipe.sections[section].__doc__ or "").strip().partition("\n\n")[0]
    return re.sub(r"\s+", " ", paragraph)


def _table(properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "additionalProperties": False, "properties": properties}


def _section(section: str) -> dict[str, Any]:
    properties = {setting.name: _property(setting) for setting in settings_in(section)}
    found = {"description": section_sentence(section)} | _table(properties)
    training = TRAININGS.get(section.removeprefix(TRAIN)) if section.startswith(TRAIN) else None
    if training is None:
        return found
    for setting, names in training.results.items():
        properties[setting]["examples"] = [RESULT + name for name in names]
    return found | ({"required": ["init"]} if training.needs_init else {})


def _property(setting: Setting) -> dict[str, Any]:
    described = {"description": setting.sentence, **setting.allowed}
    if setting.default is None:
        return described
    return described | {"default": list(setting.default) if isinstance(setting.default, tuple) else setting.default}
