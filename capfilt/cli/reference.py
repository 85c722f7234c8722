"""The reference of the command line, docs/cli.md, made from the commands: `make docs`.

In: the tree of commands. Out: Markdown, a section for every command with its usage, arguments, options and examples.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from capfilt.cli.examples import EXAMPLES
from capfilt.cli.main import ENVIRONMENT, EXIT_CODES, app
from capfilt.cli.parameters import Shown, command_lines, first_sentence, is_argument, shown

WIDTH = 110
_HEAD = """\
<!-- Made by `make docs` from the commands. Change their texts in capfilt/cli/, then make it anew. -->

# The commands

Every one has `--help`, which says the same. Results go to standard output, everything else to standard error; with
`--json` the result is one JSON document."""


def reference() -> str:
    """The whole document."""
    root = typer.main.get_command(app)
    commands = list(_walk(root, ("capfilt",)))
    blocks = [_HEAD, "\n".join(_contents(commands)), *_tables()]
    for words, command in commands:
        blocks += _section(words, command)
    return "\n\n".join(blocks) + "\n"


def _walk(command: Any, words: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command with its words, groups before what is in them."""
    yield words, command
    for name, inner in getattr(command, "commands", {}).items():
        yield from _walk(inner, (*words, name))


def _contents(commands: list[tuple[tuple[str, ...], Any]]) -> Iterator[str]:
    yield "| command | does |"
    yield "|---|---|"
    for words, command in commands[1:]:
        yield f"| [`{' '.join(words)}`](#{'-'.join(words)}) | {_cell(first_sentence(command.help or ''))} |"


def _tables() -> Iterator[str]:
    yield "## Exit codes"
    yield _table("code", "means", {str(code): sentence for code, sentence in EXIT_CODES.items()})
    yield "## Environment"
    yield _table("variable", "does", {f"`{name}`": sentence for name, sentence in ENVIRONMENT.items()})


def _section(words: tuple[str, ...], command: Any) -> Iterator[str]:
    """A command: what it does, its usage, arguments, options, examples."""
    own = [one for one in command.params if one.name != "help" and not one.hidden]
    arguments = [one for one in own if is_argument(one)]
    options = [one for one in own if not is_argument(one)]
    context = command.make_context(" ".join(words), [], resilient_parsing=True)
    yield f"## {' '.join(words)}"
    yield _fence([" ".join([*words, *command.collect_usage_pieces(context)])])
    yield from (_prose(paragraph) for paragraph in (command.help or "").split("\n\n"))
    if arguments:
        yield _parameters("argument", arguments)
    if options:
        yield _parameters("option", options)
    if examples := EXAMPLES.get(" ".join(words[1:]), ()):
        lines = [(f"# {sentence}", *command_lines(line, WIDTH)) for line, sentence in examples]
        yield _fence([line for example in lines for line in example])


def _parameters(kind: str, parameters: list[Any]) -> str:
    return _table(kind, "what", {f"`{one.name}`": _with_notes(one) for one in map(shown, parameters)})


def _with_notes(one: Shown) -> str:
    notes = "; ".join(f"`{note}`" if note.startswith("default") else note for note in one.notes)
    return f"{_cell(one.sentence)}{f' ({notes})' if notes else ''}"


def _table(first: str, second: str, rows: dict[str, str]) -> str:
    lines = [f"| {first} | {second} |", "|---|---|"]
    return "\n".join([*lines, *(f"| {key.replace('|', chr(92) + '|')} | {value} |" for key, value in rows.items())])


def _cell(text: str) -> str:
    """A text in a cell of a table; what Markdown acts upon is escaped."""
    return re.sub(r"([|<>*_\[\]])", r"\\\1", _prose(text))


def _prose(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()


def _fence(lines: list[str]) -> str:
    return "\n".join(["```", *lines, "```"])


def main(path: Path) -> None:
    """Write the reference to a file."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(reference(), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "docs/cli.md"))
