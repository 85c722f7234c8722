"""docs/cli.md is what the commands say now; every command, argument and option has its words and its examples."""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from capfilt import errors
from capfilt.cli.examples import EXAMPLES
from capfilt.cli.main import ENVIRONMENT, EXIT_CODES, app
from capfilt.cli.parameters import command_lines, first_sentence
from capfilt.cli.reference import reference
from tests.cli.conftest import capfilt

ROOT = Path(__file__).resolve().parent.parent.parent
TREE: Any = typer.main.get_command(app)


def walk(command: Any, words: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    yield words, command
    for name, inner in getattr(command, "commands", {}).items():
        yield from walk(inner, (*words, name))


COMMANDS = dict(walk(TREE))


def test_the_reference_is_not_stale() -> None:
    assert (ROOT / "docs" / "cli.md").read_text(encoding="utf-8") == reference(), "make docs"


@pytest.mark.parametrize("words", list(COMMANDS), ids=" ".join)
def test_every_command_and_parameter_is_explained(words: tuple[str, ...]) -> None:
    command = COMMANDS[words]
    section = reference().partition(f"\n## {' '.join(('capfilt', *words))}\n")[2].partition("\n## ")[0]
    help_text = capfilt(*words, "--help").out
    for text in (section, " ".join(help_text.split())):
        assert first_sentence(command.help) in text
    assert len(command.params) > 0 or hasattr(command, "commands") or words == ("recipe", "schema")
    for parameter in command.params:
        assert parameter.help, parameter.name
        shown = parameter.opts if parameter.param_type_name == "option" else [parameter.metavar]
        for name in shown:
            assert name.replace("|", "\\|") in section
            assert name in help_text


@pytest.mark.parametrize("words", list(COMMANDS), ids=" ".join)
def test_every_command_has_examples_that_its_parser_takes(words: tuple[str, ...]) -> None:
    examples = EXAMPLES[" ".join(words)]
    assert examples
    help_text = capfilt(*words, "--help").out
    for line, sentence in examples:
        assert sentence.endswith(":")
        assert sentence in " ".join(help_text.split())
        program, *arguments = shlex.split(line)
        assert program == "capfilt"
        assert tuple(arguments[: len(words)]) == words
        parse(arguments)


def test_no_example_is_of_a_command_that_is_not_there() -> None:
    assert {tuple(words.split()) for words in EXAMPLES} == set(COMMANDS)


def parse(arguments: list[str]) -> None:
    """By the command's own parser, which raises for what it does not know and what it misses."""
    command = TREE
    while hasattr(command, "commands"):
        command = command.commands[arguments.pop(0)]
    command.make_context("capfilt", arguments)


@pytest.mark.parametrize(
    "line", ["filter runs/x --trheshold 1", "download urls.csv", "stats a b", "rank runs/x --keep few", "train stage3"]
)
def test_a_wrong_example_would_be_found(line: str) -> None:
    with pytest.raises((typer.BadParameter.__bases__[0], KeyError)):
        parse(line.split())


@pytest.mark.parametrize(
    "words", [words for words, found in COMMANDS.items() if hasattr(found, "commands")], ids=" ".join
)
def test_a_group_alone_shows_its_help(words: tuple[str, ...]) -> None:
    alone, asked = capfilt(*words), capfilt(*words, "--help")
    assert (alone.code, alone.out, alone.err.rstrip()) == (2, "", asked.out.rstrip())
    assert len(asked.out.splitlines()) > 10


def test_exit_codes_and_variables_are_in_the_help() -> None:
    classes = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    assert {getattr(kind, "exit_code") for kind in classes} | {0, 130, 143} == set(EXIT_CODES)  # noqa: B009
    text = capfilt("--help").out
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "capfilt").rglob("*.py")]
    read = {name for source in sources for name in re.findall(r"CAPFILT_[A-Z_]+", source)}
    assert len(read) > 2
    assert read <= set(ENVIRONMENT)
    for name in (*ENVIRONMENT, *map(str, EXIT_CODES)):
        assert f"\n  {name} " in text


@pytest.mark.parametrize("width", [20, 60, 110])
def test_a_command_in_several_lines_is_the_same_to_a_shell(width: int) -> None:
    lines = [line for examples in EXAMPLES.values() for line, _ in examples]
    folded = [list(command_lines(line, width)) for line in lines]
    assert width < 110 or max(len(line) for one in folded for line in one) <= width
    assert width == 110 or any(len(one) > 1 for one in folded)
    script = "capfilt() { printf '%s\\n' capfilt \"$@\" ''; }\n" + "\n".join(line for one in folded for line in one)
    done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n\n")[:-1] == ["\n".join(shlex.split(line)) for line in lines]
