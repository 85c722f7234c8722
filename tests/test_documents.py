"""The documents say what is there: files, commands, recipes, make targets."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import typer

from capfilt.cli.main import app
from capfilt.recipes import bundled_recipes
from tests.cli.conftest import capfilt

ROOT = Path(__file__).resolve().parent.parent
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_tree_has_a_line_for_every_file() -> None:
    listed, folder = set(), ""
    for line in CONTRIBUTING.partition("capfilt/\n")[2].partition("```")[0].splitlines():
        name = line.split()[0]
        if name.endswith("/"):
            folder = name
        elif line.startswith("    "):
            listed.add(folder + name)
        else:
            listed.add(name)
    package = ROOT / "capfilt"
    there = {str(path.relative_to(package)) for path in package.rglob("*.py") if path.name != "__init__.py"}
    assert sorted(listed ^ there) == []


def test_files_that_contributing_names_are_there() -> None:
    named = re.findall(r"`((?:capfilt|tests|pipelines|examples|benchmarks)/[\w./]*)`", CONTRIBUTING)
    assert named
    assert [name for name in named if not (ROOT / name).exists()] == []


def _commands_in(help_text: str) -> str:
    return help_text.partition("Commands:")[2].partition("\n\n")[0]


def test_readme_lists_every_command_and_recipe() -> None:
    help_text = _commands_in(capfilt("--help").out)
    commands = re.findall(r"^  (\w+)  ", help_text, flags=re.MULTILINE)
    assert len(commands) > 10
    assert [command for command in commands if f"| `capfilt {command}" not in README] == []
    assert [name for name in bundled_recipes() if f"| `{name}` |" not in README] == []
    trainings = re.findall(r"^  ([\w-]+)  ", _commands_in(capfilt("train", "--help").out), re.MULTILINE)
    assert [name for name in trainings if f"`{name}`" not in README] == []


def _strings_of(path: Path) -> list[str]:
    """Every text in a Python file, docstrings and the parts of f-strings included."""
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    return [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]


def test_commands_that_messages_name_exist() -> None:
    group = typer.main.get_command(app)
    groups = {name: inner.commands for name, inner in group.commands.items() if hasattr(inner, "commands")}
    commands = {(name,) for name in group.commands} | {(name, inner) for name in groups for inner in groups[name]}
    named = {
        (str(path.relative_to(ROOT)), words if words[0] in groups and words[1] else words[:1])
        for path in (ROOT / "capfilt").rglob("*.py")
        for text in _strings_of(path)
        for words in re.findall(r"(?:^|`|Next: )capfilt ([a-z]\w*)(?: ([a-z][\w-]*))?", text)
    }
    assert len(named) > 20
    assert sorted(entry for entry in named if entry[1] not in commands) == []


@pytest.mark.parametrize("target", ["demo", "test", "stress", "check", "bench", "assets", "docs", "help"])
def test_make_has_its_targets(target: str) -> None:
    assert re.search(rf"^{target}:.*## ", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)


def test_the_lock_names_no_host_and_pins_everything() -> None:
    lines = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if line[:1] not in "#"]
    assert lines
    assert [line for line in lines if "://" in line or "==" not in line] == []
