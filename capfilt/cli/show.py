"""`capfilt show`: a run's samples in the terminal, with their captions, scores and verdicts."""

from __future__ import annotations

import os
import shutil
import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING, Annotated

import typer

from capfilt.cli.completion import all_reasons, one_of
from capfilt.cli.console import clean, command, note, open_progress, say_json_line
from capfilt.cli.explain import probability_of, strongest_of
from capfilt.cli.interrupts import undone_at_once
from capfilt.cli.options import AsJson, Device, Generation, Run, open_generation, refuse_idle

if TYPE_CHECKING:
    from PIL import Image

    from capfilt.report.browse import Browser
    from capfilt.report.decks import Deck
    from capfilt.report.pages import Explain, Explained


def show(
    context: typer.Context,
    run: Run,
    key: Annotated[
        list[str] | None,
        typer.Option("--key", metavar="KEY", help="The sample with this key; may be repeated.", show_default=False),
    ] = None,
    where: Annotated[
        str | None,
        typer.Option(
            metavar="SQL",
            help="Samples with a pair of which this is true: \"itm_score < 0.6 and source = 'web'\" (DuckDB).",
            show_default=False,
        ),
    ] = None,
    reason: Annotated[
        str | None,
        typer.Option(
            metavar="REASON",
            help="Samples with a pair dropped for it, such as low_itm; or rows that failed, such as not_found.",
            autocompletion=all_reasons,
            show_default=False,
        ),
    ] = None,
    source: Annotated[
        str | None,
        typer.Option(
            help="Samples with a pair of this source: web, synthetic or human.",
            show_default=False,
            autocompletion=one_of("web", "synthetic", "human"),
        ),
    ] = None,
    kept: Annotated[
        bool | None, typer.Option("--kept/--dropped", help="Samples with a kept, or a dropped, pair.")
    ] = None,
    num_random: Annotated[
        int | None, typer.Option("--random", min=1, metavar="N", help="So many, drawn at random.", show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Draws others with --random.")] = 0,
    limit: Annotated[int | None, typer.Option(min=1, metavar="N", help="The first ones only.")] = None,
    pictures: Annotated[
        str,
        typer.Option(
            metavar="HOW",
            help="auto (the best that the terminal can do), kitty, iterm2, sixel, blocks or none.",
            autocompletion=one_of("auto", "kitty", "iterm2", "sixel", "blocks", "none"),
        ),
    ] = "auto",
    explain: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Grad-CAM beside or below the picture, by a model that `capfilt explain` takes.",
            show_default=False,
        ),
    ] = None,
    caption: Annotated[
        int | None,
        typer.Option(
            min=-1,
            metavar="N",
            help="With --explain, of this caption: -1 is the web caption; unset: the best of those kept.",
            show_default=False,
        ),
    ] = None,
    device: Device = "auto",
    generation: Generation = None,
    as_json: AsJson = False,
) -> None:
    """Samples with pictures, captions, scores and verdicts; what is asked of pairs is true of one and the same pair."""
    from capfilt.report.browse import Browser, SampleQuery
    from capfilt.report.decks import iterate, open_deck

    if as_json:
        refuse_idle(context, ["pictures", "explain", "caption", "device"], "with --json")
    if explain is None:
        refuse_idle(context, ["caption", "device"], "without --explain")
    if num_random is None:
        refuse_idle(context, ["seed"], "without --random")
    query = SampleQuery(
        keys=tuple(key or ()), where=where, source=source, kept=kept, reason=reason, num_random=num_random, seed=seed,
        limit=limit,
    )  # fmt: skip
    browser = Browser(open_generation(run, generation), query, open_progress())
    deck = open_deck(browser)
    if deck.after(None) is None:
        note(f"No sample of {clean(run)} is as asked for.")
        note(f"What is there: {command('stats', run, generation=generation)}")
        return
    if browser.num_without_manifest:
        note(f"{browser.num_without_manifest:,} of {len(browser.shards):,} shards have no manifest yet: no verdicts.")
    if as_json:
        for place in iterate(deck):
            say_json_line(browser.sample(place))
        return
    _show(browser, deck, pictures, None if explain is None else _explain_by(explain, device), caption)


def _show(browser: Browser, deck: Deck, pictures: str, explain: Explain | None, caption: int | None) -> None:
    """Turned by keys where somebody can press them and there is more than one; else one after another."""
    from capfilt.progress import is_live, speaks_unicode, terminal_columns
    from capfilt.report.decks import has_one
    from capfilt.report.pages import Pager, Pages, list_pages
    from capfilt.report.sample_view import Look
    from capfilt.report.terminal import Terminal, is_a_persons
    from capfilt.report.terminal_pictures import choose_pictures

    screen = sys.stdout
    color = is_live(screen) and not os.environ.get("NO_COLOR")
    look = Look(columns=terminal_columns(screen), plain=not speaks_unicode(screen), color=color)
    with ExitStack() as stack:
        terminal = None
        if is_a_persons(sys.stdin, screen, os.environ):
            terminal = Terminal(sys.stdin.fileno(), screen)
            stack.enter_context(undone_at_once(terminal.give_back))
            stack.enter_context(terminal)
        pages = Pages(browser, deck, choose_pictures(pictures, terminal, screen), explain, caption)
        if terminal is not None and not has_one(deck):
            Pager(pages, terminal, look).run()
        else:
            list_pages(pages, look, shutil.get_terminal_size().lines, screen.write)
            screen.flush()


def _explain_by(model: str, device: str) -> Explain:
    """Grad-CAM by a model, which is read now."""
    from capfilt.explain import load_explainable
    from capfilt.report.gradcam import overlay
    from capfilt.report.pages import Explained

    note(f"Reading {clean(model)} ...")
    loaded = load_explainable(model, device=device)

    def explain(whole: Image.Image, drawn: Image.Image, text: str) -> Explained:
        from PIL import Image

        (found,) = loaded.explain(whole, [text])
        lines = (f"{probability_of(found, loaded)}: {clean(found.text)}", f"strongest words: {strongest_of(found)}")
        return Explained(Image.fromarray(overlay(drawn, found.average)), lines)

    return explain
