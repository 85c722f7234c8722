"""A site's rules for robots: followed where they are wanted, read whatever is said of their own use."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from capfilt.curation.addresses import FetchError
from capfilt.curation.fetch import Fetcher
from tests.curation.busy_sites import SETTINGS, BusySite, reasons_of
from tests.hostile_server import HostileServer, plain


@pytest.mark.parametrize(
    ("robots", "expected"),
    [
        ((200, "User-agent: *\nDisallow: /private\n"), [None, "disallowed"]),
        ((200, "User-agent: capfilt\nDisallow: /\n\nUser-agent: *\nAllow: /\n"), ["disallowed", "disallowed"]),
        ((200, "User-agent: googlebot\nDisallow: /\n"), [None, None]),
        ((404, "Disallow: /"), [None, None]),
        ((200, "\ufeffUser-agent: *\nDisallow: /*0.jpg$\nDisallow: /p\nAllow: /public/\n"), [None, "disallowed"]),
        ((500, ""), ["server_error", "server_error"]),
    ],
    ids=["a folder", "this tool", "another robot", "no rules", "patterns, the longest counts", "out of order"],
)
def test_robots_txt(robots: tuple[int, str], expected: list[str | None], tmp_path: Path) -> None:
    with BusySite(robots=robots) as site:
        urls = [site.url(f"{folder}/{number}.jpg") for number in range(6) for folder in ("public", "private")]
        assert reasons_of(urls, tmp_path, replace(SETTINGS, robots_txt=True)) == expected * 6
        counts = Counter(path for _, path in site.asked)
    assert counts["/robots.txt"] == 1
    assert counts["/private/0.jpg"] == (expected[1] is None)


def test_a_robots_txt_is_read_whatever_is_said_of_its_own_use() -> None:
    """It may be kept out of indexes, and be too long to be read to its end."""
    rules = b"User-agent: *\nDisallow: /private\n" + b"#" * 400_000
    answers = {
        "/robots.txt": plain(rules, "200 OK", "X-Robots-Tag: noindex, noai"), "/private/a": plain(b"picture"),
        "/a": plain(b"picture"),
    }  # fmt: skip
    with HostileServer(answers) as server:
        fetcher = Fetcher(replace(SETTINGS, robots_txt=True, max_body_bytes=100_000))
        assert fetcher.fetch(server.url("/a")) == b"picture"
        with pytest.raises(FetchError) as failure:
            fetcher.fetch(server.url("/private/a"))
    assert failure.value.reason == "disallowed"


def test_a_busy_site_is_asked_for_its_rules_again() -> None:
    answers = {"/robots.txt": plain(b"", "429 Busy", "Retry-After: 7"), "/a": plain(b"picture")}
    with HostileServer(answers) as server:
        fetcher = Fetcher(replace(SETTINGS, robots_txt=True))
        with pytest.raises(FetchError, match=r"robots\.txt: status 429") as failure:
            fetcher.fetch(server.url("/a"))
        assert (failure.value.reason, failure.value.retry_after_seconds) == ("too_many_requests", 7.0)
        answers["/robots.txt"] = plain(b"User-agent: *\nAllow: /\n")
        assert fetcher.fetch(server.url("/a")) == b"picture"


def test_robots_txt_is_not_asked_for_unless_wanted(tmp_path: Path) -> None:
    with BusySite(robots=(200, "User-agent: *\nDisallow: /\n")) as site:
        assert reasons_of([site.url(1)], tmp_path, SETTINGS) == [None]
        assert [path for _, path in site.asked] == ["/1"]
