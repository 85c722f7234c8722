"""What every command and group has: examples in its help, and what was meant where a name does not exist."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from capfilt.cli.completion import short
from capfilt.cli.console import clean
from capfilt.cli.examples import EXAMPLES
from capfilt.cli.parameters import command_lines, first_sentence, is_argument, shown, usage_words
from capfilt.settings.values import did_you_mean

MAX_LINE_CHARS = 2000

PARSER_ERROR: type[Exception] = typer.BadParameter.__bases__[0]
"""What Typer's parser raises for an option that does not exist, and the like; Typer gives it no public name."""
_HELP_INSTEAD = "NoArgsIsHelpError"
"""The one whose message is a group's help, which stands in lines."""


class CapfiltCommand(TyperCommand):
    """A command whose help ends with examples."""

    def shell_complete(self, ctx: Any, incomplete: str) -> list[Any]:
        """As the base class, each text in one line."""
        return _shortened(super().shell_complete(ctx, incomplete))

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """What follows the command's name."""
        return ["[OPTIONS]", *(usage_words(one) for one in self.get_params(ctx) if is_argument(one))]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Arguments and options."""
        _write_parameters(self, ctx, formatter)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """The examples, then what the base class writes."""
        _write_examples(ctx, formatter)
        super().format_epilog(ctx, formatter)


class CapfiltGroup(TyperGroup):
    """A group of commands; what its parser says of a mistake is fit to print, and names what was meant."""

    def make_context(self, *args: Any, **options: Any) -> Any:
        """As the base class."""
        with _helpful_messages():
            return super().make_context(*args, **options)

    def invoke(self, ctx: Any) -> Any:
        """As the base class; commands inside the group are parsed here."""
        with _helpful_messages():
            return super().invoke(ctx)

    def shell_complete(self, ctx: Any, incomplete: str) -> list[Any]:
        """As the base class, each text in one line."""
        return _shortened(super().shell_complete(ctx, incomplete))

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """As the base class; of a command that does not exist, the error names the nearest one."""
        try:
            return super().resolve_command(ctx, args)
        except PARSER_ERROR as error:
            if not hasattr(error, "option_name"):
                error.message = f"{error}{did_you_mean(args[0], _paths(self))}"  # type: ignore[attr-defined]
            raise

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Commands, each with the first sentence of its help, then options."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, first_sentence(inner.help or "")) for name, inner in self.commands.items()])
        _write_parameters(self, ctx, formatter)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """The examples, then what the base class writes."""
        _write_examples(ctx, formatter)
        super().format_epilog(ctx, formatter)


class CapfiltTyper(typer.Typer):
    """A `typer.Typer` whose commands are `CapfiltCommand`s."""

    def __init__(self, *, cls: type[CapfiltGroup] = CapfiltGroup, **options: Any) -> None:
        # plain help: half the time to the first line
        super().__init__(cls=cls, no_args_is_help=True, rich_markup_mode=None, suggest_commands=False, **options)

    def command(self, name: str | None = None, **options: Any) -> Any:
        """As the base class."""
        return super().command(name, cls=CapfiltCommand, **options)


def _shortened(items: list[Any]) -> list[Any]:
    for item in items:
        item.help = short(item.help) if item.help else item.help
    return items


def words_of(ctx: Any) -> str:
    """The words of a command after `capfilt`: "train stage1"."""
    return ctx.command_path.partition(" ")[2]


def _paths(group: TyperGroup) -> Iterator[str]:
    """The commands of a group, those of groups inside with both words."""
    for name, command in group.commands.items():
        yield name
        if isinstance(command, TyperGroup):
            yield from (f"{name} {inner}" for inner in command.commands)


def _write_parameters(command: Any, ctx: Any, formatter: Any) -> None:
    parameters = [one for one in command.get_params(ctx) if not one.hidden]
    for title, wanted in (("Arguments", True), ("Options", False)):
        if rows := [(one.name, one.text) for one in map(shown, parameters) if one.name.startswith("-") is not wanted]:
            with formatter.section(title):
                formatter.write_dl(rows)


def _write_examples(ctx: Any, formatter: Any) -> None:
    if examples := EXAMPLES.get(words_of(ctx), ()):
        with formatter.section("Examples"):
            for command, sentence in examples:
                formatter.write_text(sentence)
                with formatter.indentation():
                    indent = " " * formatter.current_indent
                    for line in command_lines(command, formatter.width - len(indent)):
                        formatter.write(f"{indent}{line}\n")


@contextmanager
def _helpful_messages() -> Iterator[None]:
    """What the parser says: without what a terminal acts upon, with the nearest option of the command."""
    try:
        yield
    except PARSER_ERROR as error:
        if type(error).__name__ == _HELP_INSTEAD:
            raise
        said = clean(getattr(error, "message", ""), MAX_LINE_CHARS)
        if getattr(error, "possibilities", None) is not None:
            error.possibilities = None  # type: ignore[attr-defined]
            said += f".{_nearest_option(error)}"
        error.message = said  # type: ignore[attr-defined]
        raise


def _nearest_option(error: Any) -> str:
    options = [name for parameter in error.ctx.command.get_params(error.ctx) for name in parameter.opts]
    return did_you_mean(error.option_name, [name for name in options if name.startswith("--")])
