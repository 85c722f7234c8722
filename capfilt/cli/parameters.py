"""Arguments and options as help and reference show them: one form for both."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_WORDS = {int: "N", float: "NUMBER", str: "TEXT", Path: "PATH"}
"""What stands for a value whose parameter has no word of its own."""


@dataclass(frozen=True)
class Shown:
    """A parameter, as it is shown."""

    name: str
    """"RUN", "--output, -o FILE"."""
    sentence: str
    notes: tuple[str, ...]
    """Its default, its bounds, whether it is required."""

    @property
    def text(self) -> str:
        """The sentence with the notes behind it."""
        return f"{self.sentence}  [{'; '.join(self.notes)}]" if self.notes else self.sentence


def shown(parameter: Any) -> Shown:
    """A parameter of Typer's, as it is shown."""
    word = parameter.metavar or _WORDS.get(parameter.type_descriptor.annotation, "VALUE")
    if is_argument(parameter):
        name = word
    else:
        options = ", ".join(sorted(parameter.opts, key=len, reverse=True))
        name = options if parameter.is_flag else f"{options} {word}"
    notes = [f"default: {default}"] if (default := _default(parameter)) else []
    if bounds := _bounds(parameter.min, parameter.max):
        notes.append(bounds)
    if parameter.required:
        notes.append("required")
    return Shown(name, parameter.help or "", tuple(notes))


def is_argument(parameter: Any) -> bool:
    """Whether a parameter is given by its place."""
    return parameter.param_type_name == "argument"


def usage_words(parameter: Any) -> str:
    """An argument in the line of usage; in brackets where it may be left out."""
    word = shown(parameter).name
    return word if parameter.required else f"[{word}]"


def first_sentence(text: str) -> str:
    """What a help text begins with."""
    paragraph = re.sub(r"\s+", " ", text.strip().partition("\n\n")[0])
    return re.split(r"(?<=\.) ", paragraph, maxsplit=1)[0]


def command_lines(command: str, width: int) -> Iterator[str]:
    """A command line in lines of `width` characters, as far as its words allow, that a shell joins again."""
    line = ""
    for word in _words_of(command):
        if line and len(f"{line} {word} \\") > width:
            yield f"{line} \\"
            line = f"    {word}"
        else:
            line = f"{line} {word}" if line else word
    yield line


def _words_of(command: str) -> Iterator[str]:
    """The words of a command line with their quotes, an option and its value as one."""
    option = ""
    for word in shlex.split(command, posix=False):
        if option and not word.startswith("-"):
            yield f"{option} {word}"
            option = ""
            continue
        if option:
            yield option
        option = word if word.startswith("--") else ""
        if not option:
            yield word
    if option:
        yield option


def _default(parameter: Any) -> str:
    value = parameter.default
    is_plain = isinstance(value, str | int | float | Path) and not isinstance(value, bool)
    if not is_plain or value == "" or not parameter.show_default:
        return ""
    return f"{value:g}" if isinstance(value, float) and value == int(value) else str(value)


def _bounds(least: float | None, most: float | None) -> str:
    if least is not None and most is not None:
        return f"{least:g} to {most:g}"
    return f"at least {least:g}" if least is not None else f"at most {most:g}" if most is not None else ""
