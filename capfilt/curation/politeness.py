"""Which address of a shard may be asked for next: few at a time of one host, none while the host wants a pause.

In: the rows of a shard in order, and what became of those that were asked for. Out: rows that may start now, and rows
that are given up because their host has asked to be left alone for long. One thread uses it; the fetch is elsewhere.

The host is that of the row's address, wherever it redirects to; every worker process knows what it met itself. A host
that answers 429 or 503 is left alone for as long
as its `Retry-After` says, or for half a second, then twice as long after every further refusal; what it says to
requests that were under way when it refused counts as the same refusal. Where it asks for more than PAUSE_SECONDS, or
has refused MAX_REFUSALS times on end, its rows fail without being asked for until that time has passed: `capfilt retry`
comes back to them.
"""

from __future__ import annotations

import heapq
import random
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from capfilt.curation.addresses import FetchError
from capfilt.settings import DownloadSettings

RETRIED_REASONS = frozenset({"timeout", "dns_error", "connection_error", "server_error", "too_many_requests"})
"""Failures that may pass by themselves."""

PAUSE_SECONDS = 120.0
"""Longest pause that is waited for."""
FIRST_PAUSE_SECONDS = 0.5
MAX_REFUSALS = 8
"""Refusals on end after which a host is no longer waited for, after two minutes of pauses."""
MAX_GIVEN_UP_SECONDS = 3600.0
"""Longest time for which a host's rows fail without being asked for."""

_RETRY_SECONDS, _MAX_RETRY_SECONDS = 0.5, 10.0
_LOOK_AHEAD_ROWS = 2000
_MAX_HOSTS = 10_000


@dataclass(slots=True)
class _Host:
    """What is known of one host."""

    num_open: int = 0
    num_refusals: int = 0
    """Refusals (429, 503) since it last answered otherwise."""
    refused_at: float = 0.0
    paused_until: float = 0.0
    given_up_until: float = 0.0

    def note(self, failure: FetchError | None, started: float, now: float) -> None:
        """Count what came of a request."""
        self.num_open -= 1
        was_under_way = started < self.refused_at  # when the host refused another
        if failure is None or failure.retry_after_seconds is None:
            answered = failure is None or failure.reason not in RETRIED_REASONS
            if answered and not was_under_way:
                self.num_refusals = 0
            return
        if not was_under_way:
            self.num_refusals += 1
            self.refused_at = now
        pause = max(failure.retry_after_seconds, FIRST_PAUSE_SECONDS * 2 ** (self.num_refusals - 1))
        self.paused_until = max(self.paused_until, now + min(pause, PAUSE_SECONDS))
        if pause > PAUSE_SECONDS or self.num_refusals >= MAX_REFUSALS:
            self.given_up_until = now + min(pause, MAX_GIVEN_UP_SECONDS)

    def refusal(self, now: float) -> FetchError | None:
        """Why its rows are not asked for at all; None where they are."""
        if now >= self.given_up_until:
            return None
        return FetchError(
            "too_many_requests", f"the host asked to be left alone, for {self.given_up_until - now:.0f} s more"
        )


class Hosts:
    """What a process knows of hosts, from shard to shard."""

    def __init__(self) -> None:
        self._hosts: dict[str, _Host] = {}

    def of(self, url: str) -> tuple[str, _Host]:
        """Name of the host of an address, and the host."""
        try:
            name = urlsplit(url).netloc.rpartition("@")[2].lower()
        except ValueError:
            name = ""  # the fetch will say what is wrong with it
        if name not in self._hosts and len(self._hosts) >= _MAX_HOSTS:
            now = time.monotonic()
            self._hosts = {
                other: host for other, host in self._hosts.items()
                if host.num_open or host.paused_until > now or host.given_up_until > now
            }  # fmt: skip
        return name, self._hosts.setdefault(name, _Host())


@dataclass(slots=True, eq=False)
class Asked:
    """A row that may be asked for, or is given up."""

    index: int
    url: str
    host_name: str
    host: _Host
    tries: int = 0
    started: float = 0.0
    """When it was last given out."""
    refusal: FetchError | None = None
    """Why it is not asked for."""


@dataclass(slots=True)
class PoliteQueue:
    """The rows of one shard, in the order in which they may be asked for."""

    rows: Iterator[tuple[int, str]]
    """(number of the row, address)."""
    settings: DownloadSettings
    hosts: Hosts
    _waiting: dict[str, deque[Asked]] = field(default_factory=dict)
    """Host → rows that wait for it."""
    _num_waiting: int = 0
    _later: list[tuple[float, int, Asked]] = field(default_factory=list)
    """Rows that are tried again: (when, …)."""
    _num_later: int = 0

    def take(self) -> Asked | None:
        """A row that may start now, or is given up; None where none may start yet, or none is left."""
        now = time.monotonic()
        while self._later and self._later[0][0] <= now:
            self._wait(heapq.heappop(self._later)[2], in_front=True)
        for waiting in self._waiting.values():
            if asked := self._start(waiting[0], now):
                waiting.popleft()
                self._num_waiting -= 1
                if not waiting:
                    del self._waiting[asked.host_name]
                return asked
        while self._num_waiting < _LOOK_AHEAD_ROWS and (entry := next(self.rows, None)) is not None:
            asked = Asked(*entry, *self.hosts.of(entry[1]))
            if asked.host_name not in self._waiting and self._start(asked, now):
                return asked
            self._wait(asked)
        return None

    def put_back(self, asked: Asked, failure: FetchError | None) -> bool:
        """Note what came of a row that was asked for; whether it is to be tried again."""
        now = time.monotonic()
        asked.host.note(failure, asked.started, now)
        asked.tries += 1
        if failure is None or failure.reason not in RETRIED_REASONS or asked.tries > self.settings.retries:
            return False
        pause = min(_RETRY_SECONDS * 2 ** (asked.tries - 1) * random.uniform(0.5, 1.5), _MAX_RETRY_SECONDS)
        self._num_later += 1
        heapq.heappush(self._later, (now + pause, self._num_later, asked))
        return True

    def is_empty(self) -> bool:
        """Whether no row is left that was not given out; asked where none may start."""
        return not self._num_waiting and not self._later

    def seconds_to_wait(self) -> float | None:
        """How long nothing more may start unless a row comes back; None where no pause is waited for."""
        now = time.monotonic()
        pauses = (waiting[0].host.paused_until for waiting in self._waiting.values())
        moments = [moment for moment in pauses if moment > now]
        moments += [self._later[0][0]] if self._later else []
        return max(min(moments) - now, 0.0) if moments else None

    def _start(self, asked: Asked, now: float) -> Asked | None:
        host = asked.host
        asked.refusal = host.refusal(now)
        if asked.refusal is not None:
            return asked
        if host.num_open >= self.settings.connections_per_host or host.paused_until > now:
            return None
        host.num_open += 1
        asked.started = now
        return asked

    def _wait(self, asked: Asked, *, in_front: bool = False) -> None:
        waiting = self._waiting.setdefault(asked.host_name, deque())
        waiting.appendleft(asked) if in_front else waiting.append(asked)
        self._num_waiting += 1
