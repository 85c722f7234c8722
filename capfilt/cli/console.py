"""What the commands print: results on standard output, everything else on standard error.

Text that came from the web, a file or a model goes through `clean` before it is shown.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from capfilt.data.texts import clean_for_terminal
from capfilt.progress import NullProgress, Progress, StreamProgress, terminal_columns, terminal_lines

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

IS_MAIN_PROCESS = os.environ.get("RANK", "0") == "0"
"""Of the processes that torchrun started, the first one speaks."""


def say(text: str = "") -> None:
    """One line on standard output."""
    if not IS_MAIN_PROCESS:
        return
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def draw(renderable_of: Callable[[int], RenderableType]) -> None:
    """What rich draws, for the terminal's width (a pipe is 100 columns wide, or as `COLUMNS` says); NO_COLOR holds."""
    if IS_MAIN_PROCESS:
        console = _rich_console()
        console.print(renderable_of(console.width))


@contextmanager
def redraw() -> Iterator[Callable[[Callable[[int], RenderableType]], None]]:
    """A screen of the terminal's own that is drawn again and again; the last one stays when it ends, by Ctrl-C too.

    What is higher than the terminal is cut at the bottom until then.
    """
    from rich.control import Control

    last: Callable[[int], RenderableType] | None = None
    try:
        with _rich_console().screen() as screen:

            def show(renderable_of: Callable[[int], RenderableType]) -> None:
                nonlocal last
                last, sized = renderable_of, _rich_console()
                screen.console.size = sized.size  # the terminal may have another size by now
                screen.console.control(Control.home())
                screen.update(renderable_of(sized.width))

            yield show
    finally:
        if last is not None:
            draw(last)


def _rich_console() -> Console:
    from rich.console import Console

    asked = os.environ.get("COLUMNS", "")
    width = int(asked) if asked.isdecimal() and int(asked) else terminal_columns(sys.stdout)
    return Console(
        file=sys.stdout, width=width, height=terminal_lines(sys.stdout), markup=False, emoji=False, highlight=False
    )


def note(text: str) -> None:
    """One line on standard error: what a script does not want to read."""
    if not IS_MAIN_PROCESS:
        return
    sys.stderr.write(_printable(text) + "\n")
    sys.stderr.flush()


def clean(text: object, max_chars: int = 200) -> str:
    """Untrusted text, safe to print."""
    return clean_for_terminal(str(text), max_chars)


def _printable(text: str) -> str:
    """Lines with names in them, of files and folders, without what a terminal acts upon."""
    return "\n".join(line if line.isprintable() else clean(line, len(line)) for line in text.split("\n"))


def open_progress() -> Progress:
    """Progress on standard error."""
    return StreamProgress(sys.stderr) if IS_MAIN_PROCESS else NullProgress()


def end(summary: str, next_command: str | None = None) -> None:
    """The one-line summary of a command, and the command to try next."""
    say(_printable(summary))
    if next_command:
        note(f"Next: {next_command}")


def command(*words: object, generation: str | None = None) -> str:
    """A command to try next, as a shell takes it: `capfilt`, the words, and the generation where there is one."""
    option = ["--generation", generation] if generation else []
    return shlex.join(["capfilt", *map(str, words), *option])


def say_json(value: object) -> None:
    """`value` (a dataclass, mapping, list, …) as one JSON document on standard output."""
    say(json.dumps(to_plain(value), ensure_ascii=True, indent=2, allow_nan=False))


def say_json_line(value: object) -> None:
    """`value` as JSON on one line of standard output."""
    say(json.dumps(to_plain(value), ensure_ascii=True, allow_nan=False))


def to_plain(value: Any) -> Any:
    """Dataclasses, paths and tuples as JSON's types; floats that are not finite as null."""
    if is_dataclass(value) and not isinstance(value, type):
        return to_plain(asdict(value))
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return str(value) if isinstance(value, Path) else value


def say_result(value: object, summary: str, next_command: str | None, *, as_json: bool) -> None:
    """A command's result: the JSON document a script asked for, or the summary and the next command."""
    if as_json:
        say_json(value)
    else:
        end(summary, next_command)
