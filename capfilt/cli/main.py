"""The `capfilt` command: assembles the groups, and turns every way to fail into a message and an exit code.

Nothing here or in the groups imports torch, transformers or pyarrow before a command runs.
"""

from __future__ import annotations

import io
import os
import sys
import traceback
import warnings
from itertools import pairwise
from typing import Annotated, Any, NoReturn

import typer

from capfilt.cli import (
    annotate,
    evaluate,
    explain,
    generate,
    health,
    ingest,
    inspection,
    recipe,
    rehearsal,
    run,
    sharing,
    show,
    statistics,
    train,
)
from capfilt.cli.commands import MAX_LINE_CHARS, CapfiltGroup, CapfiltTyper
from capfilt.cli.console import clean, note
from capfilt.cli.interrupts import EXIT_INTERRUPTED, EXIT_TERMINATED, MESSAGES, exit_code_of_signal
from capfilt.errors import CapfiltError

MAX_MESSAGE_LINES = 40

FAILURES: tuple[tuple[type[BaseException], str, int | None], ...] = (
    (CapfiltError, "{error}", None),  # the class carries its exit code
    (PermissionError, "No permission: {error}. Change the permission or name another path.", 1),
    (FileNotFoundError, "Not found: {error}. Check the path.", 2),
    (IsADirectoryError, "A file was expected: {error}. Check the path.", 2),
    (NotADirectoryError, "A directory was expected: {error}. Check the path.", 2),
    (MemoryError, "Out of memory. Take a smaller --batch-size and run again; finished shards are kept.", 1),
    (OSError, "{error}. What is done is kept; mend the cause and run the same command again.", 1),
    (KeyboardInterrupt, MESSAGES[EXIT_INTERRUPTED], EXIT_INTERRUPTED),
)
"""Exception → message and exit code, first match; what is not listed is a defect of capfilt."""

EXIT_CODES = {
    0: "done; of `verify`, `doctor` and the like: nothing wrong was found",
    1: "incomplete, or another failure that the message explains",
    2: "usage: an option, a path, a column, a recipe",
    3: "the run holds results of other parameters",
    4: "another command works on the run",
    5: "damage on disk",
    EXIT_INTERRUPTED: "interrupted (Ctrl-C)",
    EXIT_TERMINATED: "terminated",
}
"""What commands end with; capfilt/errors.py has the errors behind them."""
ENVIRONMENT = {
    "CAPFILT_DEBUG": "1 shows the traceback of an error.",
    "CAPFILT_CACHE_DIR": "Where tars of runs on object stores are kept; unset: ~/.cache/capfilt.",
    "CAPFILT_CACHE_BYTES": "How much of them at most; unset: 20 GiB.",
    "HF_HUB_OFFLINE": "1: models are taken from the cache and folders alone.",
    "RAY_ADDRESS": "The Ray cluster of --engine ray, where --address names none.",
}
"""Environment variables that are looked at."""


class MainGroup(CapfiltGroup):
    """The whole command line: its help names exit codes and environment variables too."""

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Examples, exit codes, environment variables."""
        super().format_epilog(ctx, formatter)
        for title, rows in (("Exit codes", EXIT_CODES), ("Environment", ENVIRONMENT)):
            with formatter.section(title):
                formatter.write_dl([(str(name), sentence) for name, sentence in rows.items()])
        formatter.write("\nEvery command has --help.\n")


app = CapfiltTyper(
    name="capfilt",
    cls=MainGroup,
    help="Curate image-text data from the web with BLIP's CapFilt method, and train on the result.",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
app.command("demo")(rehearsal.demo)
app.command("download")(ingest.download)
app.command("retry")(ingest.retry)
app.command("import")(ingest.import_)
app.command("caption")(annotate.caption)
app.command("rank")(annotate.rank)
app.command("filter")(annotate.filter_)
app.command("run")(run.run)
app.add_typer(recipe.app, name="recipe")
app.command("select")(annotate.select)
app.command("stats")(statistics.stats)
app.command("show")(show.show)
app.command("verify")(inspection.verify)
app.command("export")(sharing.export)
app.command("report")(sharing.report)
app.add_typer(train.app, name="train")
app.add_typer(evaluate.app, name="evaluate")
app.command("generate")(generate.generate)
app.command("explain")(explain.explain)
app.command("doctor")(health.doctor)


@app.callback()
def start(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=health.print_version, is_eager=True, help="Print the version, and its parts'."
        ),
    ] = False,
) -> None:
    """Curate image-text data from the web with BLIP's CapFilt method, and train on the result."""


def main() -> NoReturn:
    """Run the command line; always ends the process with one of the exit codes of capfilt/errors.py."""
    # Threads that wait sleep instead of spinning: on two busy cores captions came ten times as fast
    # (33 to 52 images/s instead of 3 to 10, 2026-11-21). Read by OpenMP when torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if not _is_debugging():
        _quiet_packages()
    if isinstance(sys.stdout, io.TextIOWrapper):  # where it is not UTF-8, what it cannot write is shown as \\uXXXX
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        app()
    except SystemExit as ended:
        if ended.code == EXIT_INTERRUPTED:  # typer made this of a KeyboardInterrupt
            report(KeyboardInterrupt())
        elif ended.code == EXIT_TERMINATED:
            note(f"capfilt: {MESSAGES[EXIT_TERMINATED]}")
        sys.exit(_closed_quietly(ended.code))
    except BaseException as error:
        code = exit_code_of_signal()
        if code is None or isinstance(error, KeyboardInterrupt):
            sys.exit(report(error))
        note(f"capfilt: {MESSAGES[code]} On the way out: {clean(_in_words(error), MAX_LINE_CHARS)}")
        sys.exit(code)
    sys.exit(0)


def report(error: BaseException) -> int:
    """Print what `error` means for the user, and give its exit code."""
    if _is_debugging():
        traceback.print_exception(error)
    for kind, message, code in FAILURES:
        if isinstance(error, kind):
            lines = message.format(error=_with_words_unbroken(_in_words(error))).split("\n")
            for number, line in enumerate(lines[:MAX_MESSAGE_LINES]):
                note(f"{'' if number else 'capfilt: '}{clean(line, MAX_LINE_CHARS)}")
            return error.exit_code if isinstance(error, CapfiltError) else int(code or 1)
    detail = clean(f"{type(error).__name__}: {error}", MAX_LINE_CHARS)
    note(f"capfilt: this is a defect of capfilt: {detail}. CAPFILT_DEBUG=1 shows where; please report it.")
    return 1


def _in_words(error: BaseException) -> str:
    """The error's text; of the system's, without numbers: "No such file or directory: 'a.json'"."""
    if isinstance(error, OSError) and not isinstance(error, CapfiltError) and error.strerror and error.filename:
        return f"{error.strerror}: {str(error.filename)!r}"
    return str(error)


def _with_words_unbroken(message: str) -> str:
    """A message in whose lines no word of the command line begins one, should it have a line break in it."""
    for word in sys.argv[1:]:
        for left, right in pairwise(word.split("\n")):
            message = message.replace(f"{left[-1:]}\n{right[:1]}", f"{left[-1:]} {right[:1]}")
    return message


def _is_debugging() -> bool:
    return os.environ.get("CAPFILT_DEBUG", "") not in ("", "0")


def _quiet_packages() -> None:
    """Hints of other packages to programmers, and their progress bars, are not for our users."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if not sys.warnoptions:
        warnings.simplefilter("ignore")


def _closed_quietly(code: object) -> int:
    """The exit code; a reader that went away (`| head`) is no error to talk about."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return code if isinstance(code, int) else 0 if code is None else 1
