"""robots.txt (RFC 9309), asked for once of every site, and obeyed where the settings want it.

In: what is about to be asked for, and a way to fetch. Out: nothing, or FetchError("disallowed").
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import replace
from urllib.robotparser import RobotFileParser

from capfilt.curate.addresses import FetchError, Target

RobotsCheck = Callable[[Target, float, Callable[[Target], bytes]], None]
"""`RobotsRules.check`."""

MAX_BYTES = 500 * 1024
"""What is read of a robots.txt (RFC 9309, 2.5: at least 500 kibibytes)."""

_KNOWN_SECONDS, _UNREACHABLE_SECONDS = 24 * 3600.0, 600.0
_MAX_SITES = 4096
_UNREACHABLE = frozenset({"timeout", "dns_error", "connection_error", "tls_error", "server_error", "too_many_requests"})
"""Failures after which nothing of the site is asked for (RFC 9309, 2.3.1.4); after others there are no rules."""


class RobotsRules:
    """The rules of the sites that were met; may be used from many threads at once."""

    def __init__(self, user_agent: str) -> None:
        self._user_agent = user_agent
        self._known: dict[str, tuple[float, Future[RobotFileParser]]] = {}
        self._lock = threading.Lock()

    def check(self, target: Target, seconds: float, fetch: Callable[[Target], bytes]) -> None:
        """Raise FetchError("disallowed") where the site's robots.txt forbids `target`, or cannot be reached.

        Another thread's answer is waited for `seconds` at most; then FetchError("timeout").
        """
        site = replace(target, request_path="/robots.txt")
        future, is_mine = self._look_up(site.url)
        if is_mine:
            try:
                rules, known_seconds = _read_rules(site, fetch)
            except BaseException as error:  # those who wait must hear of it, and the next one asks anew
                self._known.pop(site.url, None)
                future.set_exception(error)
                raise
            self._known[site.url] = time.monotonic() + known_seconds, future
            future.set_result(rules)
        try:
            rules = future.result(timeout=seconds)
        except FutureTimeoutError:
            raise FetchError("timeout", f"no answer about {site.url}") from None
        if not rules.can_fetch(self._user_agent, target.url):
            raise FetchError("disallowed", f"robots.txt of {target.host_header}")

    def _look_up(self, site: str) -> tuple[Future[RobotFileParser], bool]:
        """The answer to come, and whether the caller has to bring it."""
        now = time.monotonic()
        with self._lock:
            if site in self._known and self._known[site][0] > now:
                return self._known[site][1], False
            if len(self._known) >= _MAX_SITES:
                self._known.clear()
            self._known[site] = now + _KNOWN_SECONDS, Future()
            return self._known[site][1], True


def _read_rules(site: Target, fetch: Callable[[Target], bytes]) -> tuple[RobotFileParser, float]:
    """The rules of a site, and for how many seconds they are taken as known."""
    rules, known_seconds = RobotFileParser(), _KNOWN_SECONDS
    try:
        lines = fetch(site)[:MAX_BYTES].decode("utf-8", "replace").splitlines()
    except FetchError as failure:
        lines = []
        if failure.reason in _UNREACHABLE:
            lines, known_seconds = ["User-agent: *", "Disallow: /"], _UNREACHABLE_SECONDS
    rules.parse(lines)
    return rules, known_seconds
