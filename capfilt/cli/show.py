"""`capfilt show`: a run's samples in the terminal, with their captions, scores and verdicts."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from capfilt.cli.console import clean, command, note, open_progress, say, say_json_line
from capfilt.cli.inspection import open_run
from capfilt.cli.options import AsJson, Generation, Run


def show(
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
            show_default=False,
        ),
    ] = None,
    source: Annotated[
        str | None,
        typer.Option(help="Samples with a pair of this source: web, synthetic or human.", show_default=False),
    ] = None,
    kept: Annotated[
        bool | None, typer.Option("--kept/--dropped", help="Samples with a kept, or a dropped, pair.")
    ] = None,
    num_random: Annotated[
        int | None, typer.Option("--random", min=1, metavar="N", help="So many, drawn at random.", show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Draws others with --random.")] = 0,
    limit: Annotated[int | None, typer.Option(min=1, metavar="N", help="The first ones only.")] = None,
    generation: Generation = None,
    as_json: AsJson = False,
) -> None:
    """Samples with captions, scores and verdicts. What is asked of pairs must be true of one and the same pair."""
    from capfilt.report.browse import Browser, SampleQuery, iterate, open_deck

    query = SampleQuery(
        keys=tuple(key or ()), where=where, source=source, kept=kept, reason=reason, num_random=num_random, seed=seed,
        limit=limit,
    )  # fmt: skip
    browser = Browser(open_run(run, generation), query, open_progress())
    deck = open_deck(browser)
    if deck.after(None) is None:
        note(
            f"No sample of {clean(run)} is as asked for. What is there: {command('stats', run, generation=generation)}"
        )
        return
    if browser.num_without_manifest:
        note(f"{browser.num_without_manifest:,} of {len(browser.shards):,} shards have no manifest yet: no verdicts.")
    if as_json:
        for place in iterate(deck):
            say_json_line(browser.sample(place))
        return
    _list(browser, deck)


def _list(browser: Any, deck: Any) -> None:
    """One sample after the other."""
    from capfilt.progress import speaks_unicode, terminal_columns
    from capfilt.report.sample_view import Look, caption_lines, head_lines

    look = Look(columns=terminal_columns(sys.stdout), plain=not speaks_unicode(sys.stdout))
    place = deck.after(None)
    while place is not None:
        sample = browser.sample(deck.at(place))
        for line in [*head_lines(sample, deck.position(place), look), *caption_lines(sample, look), ""]:
            say(line)
        place = deck.after(place)
