"""Samples in an order, to be turned over one by one: there, back, to the first and to the last.

In: a `Browser`. Out: a `Deck`: all samples that match, some keys, the first few, or some that are drawn at random.
"""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from itertools import accumulate, islice
from typing import Any, Protocol

import numpy as np

from capfilt.errors import UsageError
from capfilt.report.browse import Browser, Place


class Deck(Protocol):
    """Samples in an order, to turn over one by one."""

    def after(self, place: int | Place | None, /) -> int | Place | None:
        """The next place; of None the first one. None where there is none."""
        ...

    def before(self, place: int | Place | None, /) -> int | Place | None:
        """The place before; of None the last one. None where there is none."""
        ...

    def at(self, place: int | Place, /) -> Place:
        """Where in the run it is."""
        ...

    def position(self, place: int | Place, /) -> str:
        """In words."""
        ...


class Walk:
    """All samples that match, in the order of the run; what lies ahead is not looked at."""

    def __init__(self, browser: Browser) -> None:
        self._browser = browser

    def after(self, place: Any) -> Place | None:
        """As `Deck`."""
        shard, index = place or (0, -1)
        while shard < len(self._browser.shards):
            if index + 1 < len(self._browser.matches(shard)):
                return Place(shard, index + 1)
            shard, index = shard + 1, -1
        return None

    def before(self, place: Any) -> Place | None:
        """As `Deck`."""
        shard, index = place or (len(self._browser.shards), 0)
        while index == 0 and shard > 0:
            shard -= 1
            index = len(self._browser.matches(shard))
        return Place(shard, index - 1) if index else None

    def at(self, place: Any) -> Place:
        """As `Deck`."""
        return place

    def position(self, place: Any) -> str:
        """As `Deck`."""
        return f"{place.index + 1:,} of {len(self._browser.matches(place.shard)):,} in the shard"


class Listed:
    """Some places, taken as they are asked for."""

    def __init__(self, places: Iterable[Place], most: int, *, is_exact: bool = False) -> None:
        """`most`: how many there are at most, or `is_exact`."""
        self._found: list[Place] = []
        self._more: Iterator[Place] = iter(places)
        self._most, self._is_exact = most, is_exact

    def after(self, place: Any) -> int | None:
        """As `Deck`."""
        number = 0 if place is None else place + 1
        self._look_for(number)
        return number if number < len(self._found) else None

    def before(self, place: Any) -> int | None:
        """As `Deck`."""
        if place is None:
            self._look_for(None)
            place = len(self._found)
        return place - 1 if place else None

    def at(self, place: Any) -> Place:
        """As `Deck`."""
        return self._found[place]

    def position(self, place: Any) -> str:
        """As `Deck`."""
        return f"{place + 1:,} of {'' if self._is_exact else 'at most '}{self._most:,}"

    def _look_for(self, number: int | None) -> None:
        wanted = None if number is None else max(0, number + 1 - len(self._found))
        found = list(islice(self._more, wanted))
        self._found += found
        if wanted is None or len(found) < wanted or len(self._found) == self._most:
            self._most, self._is_exact = len(self._found), True


def has_one(deck: Deck) -> bool:
    """Whether a list of samples has one and no more; of a walk, that may be long, that is not looked for."""
    return isinstance(deck, Listed) and deck.after(deck.after(None)) is None


def iterate(deck: Deck) -> Iterator[Place]:
    """The places of a deck from the first one on."""
    place = deck.after(None)
    while place is not None:
        yield deck.at(place)
        place = deck.after(place)


def open_deck(browser: Browser) -> Deck:
    """The samples in the order in which they are shown. UsageError for keys that the run does not have."""
    query, walk = browser.query, Walk(browser)
    if query.keys:
        found = _of_keys(browser)[: query.limit]
        return Listed(found, len(found), is_exact=True)
    if query.num_random is not None:
        drawn = _drawn(browser, query.num_random)
        return Listed(drawn, len(drawn), is_exact=True)
    return walk if query.limit is None else Listed(islice(iterate(walk), query.limit), query.limit)


def _of_keys(browser: Browser) -> list[Place]:
    """Where the keys are, in the order in which they were given; those that do not match are left out."""
    wanted, places = set(browser.query.keys), dict[str, Place]()
    likely = [n for n, shard in enumerate(browser.shards) if any(key.startswith(shard) for key in wanted)]
    for shard in [*likely, *sorted(set(range(len(browser.shards))) - set(likely))]:
        if not wanted:
            break
        if there := browser.has_key(shard, wanted):
            wanted -= there
            places |= {key: Place(shard, n) for n, key in enumerate(browser.matches(shard)) if key in there}
    if wanted:
        missing = ", ".join(sorted(wanted)[:5])
        raise UsageError(f"{browser.run.path} has no sample with the key {missing}. Keys are in `shards/*.parquet`.")
    return [places[key] for key in dict.fromkeys(browser.query.keys) if key in places]


def _drawn(browser: Browser, number: int) -> list[Place]:
    """A sample of those that match, in the order of the run: the same for the same seed and run."""
    query = browser.query
    if not query.is_of_pairs and not query.is_of_failures:  # the records say how many there are
        ends = list(accumulate(browser.num_images()))
        chosen = sorted(random.Random(query.seed).sample(range(ends[-1]), min(number, ends[-1])))
        shards = [bisect_right(ends, place) for place in chosen]
        return [Place(n, place - (ends[n - 1] if n else 0)) for n, place in zip(shards, chosen, strict=True)]
    lots, places = np.empty(0), np.empty((0, 2), np.int64)
    browser.progress.start("show", len(browser.shards), "shards")
    for shard in range(len(browser.shards)):
        found = len(browser.matches(shard))
        lots = np.append(lots, np.random.default_rng([query.seed, shard]).random(found))
        places = np.append(places, np.stack([np.full(found, shard), np.arange(found)], axis=1), axis=0)
        best = np.argsort(lots, kind="stable")[:number]
        lots, places = lots[best], places[best]
        browser.progress.advance()
    browser.progress.finish()
    return sorted(Place(int(shard), int(index)) for shard, index in places)
