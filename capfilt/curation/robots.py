"""robots.txt (RFC 9309), asked for once of every site, and obeyed where the settings want it.

In: what is about to be asked for, and a way to fetch. Out: nothing, or FetchError("disallowed"); where the site does
not answer about its rules, the FetchError of that.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import replace

from protego import Protego

from capfilt.curation.addresses import FetchError, Target

RobotsCheck = Callable[[Target, float, Callable[[Target], bytes]], None]
"""`RobotsRules.check`."""

MAX_BYTES = 500 * 1024
"""What is read of a robots.txt (RFC 9309, 2.5: at least 500 kibibytes)."""

_KNOWN_SECONDS, _UNREACHABLE_SECONDS = 24 * 3600.0, 60.0
_MAX_SITES = 4096
_UNREACHABLE = frozenset({"timeout", "dns_error", "connection_error", "tls_error", "server_error", "too_many_requests"})
"""Failures after which nothing of the site is asked for (RFC 9309, 2.3.1.4); after others there are no rules."""

_Rules = Protego | FetchError


class RobotsRules:
    """The rules of the sites that were met; may be used from many threads at once."""

    def __init__(self, user_agent: str) -> None:
        self._user_agent = user_agent
        self._known: dict[str, tuple[float, Future[_Rules]]] = {}
        self._lock = threading.Lock()

    def check(self, target: Target, seconds: float, fetch: Callable[[Target], bytes]) -> None:
        """Raise FetchError where `target` may not be asked for.

        It says "disallowed" where the site's robots.txt forbids it, and what `fetch` said where the site cannot be
        reached. Another thread's answer is waited for `seconds` at most; then it says "timeout".
        """
        site = replace(target, request_path="/robots.txt")
        future, is_mine = self._look_up(site.url)
        if is_mine:
            try:
                rules = _read_rules(site, fetch)
            except BaseException as error:  # those who wait must hear of it, and the next one asks anew
                self._known.pop(site.url, None)
                future.set_exception(error)
                raise
            self._keep(site.url, future, rules)
            future.set_result(rules)
        try:
            rules = future.result(timeout=seconds)
        except FutureTimeoutError:
            raise FetchError("timeout", f"no answer about {site.url}") from None
        if isinstance(rules, FetchError):
            wait = rules.retry_after_seconds
            raise FetchError(rules.reason, f"robots.txt: {rules.detail}", retry_after_seconds=wait)
        if not rules.can_fetch(target.url, self._user_agent):
            raise FetchError("disallowed", f"robots.txt of {target.host_header}")

    def _look_up(self, site: str) -> tuple[Future[_Rules], bool]:
        """The answer to come, and whether the caller has to bring it."""
        now = time.monotonic()
        with self._lock:
            if site in self._known and self._known[site][0] > now:
                return self._known[site][1], False
            if len(self._known) >= _MAX_SITES:
                self._known.clear()
            self._known[site] = now + _KNOWN_SECONDS, Future()
            return self._known[site][1], True

    def _keep(self, site: str, future: Future[_Rules], rules: _Rules) -> None:
        if not isinstance(rules, FetchError):
            return  # known for as long as it was to be brought
        if rules.retry_after_seconds is not None:  # the site says itself when it may be asked again
            self._known.pop(site, None)
        else:
            self._known[site] = time.monotonic() + _UNREACHABLE_SECONDS, future


def _read_rules(site: Target, fetch: Callable[[Target], bytes]) -> _Rules:
    """The rules of a site, or why it cannot be asked about them."""
    try:
        text = fetch(site)[:MAX_BYTES].decode("utf-8-sig", "replace")
    except FetchError as failure:
        if failure.reason in _UNREACHABLE:
            return failure
        text = ""
    return Protego.parse(text)
