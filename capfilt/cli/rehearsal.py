"""`capfilt demo`: the whole main job on the built-in miniature world."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from capfilt.cli.console import command, note, open_progress, say


def demo(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The run directory.")] = Path("runs/demo"),
) -> None:
    """Download, caption, rank, filter, train and measure on the miniature world: about five minutes."""
    from capfilt.demo import run_demo

    for line in run_demo(run, open_progress()):
        say(line)
    note(f"Next: {command('stats', run)}")
