"""Hosts are asked by few at a time, left alone when they say so, and given up when they say so for long."""

from __future__ import annotations

import http.server
import io
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capfilt.curate import politeness
from capfilt.curate.addresses import FetchError
from capfilt.curate.download import download
from capfilt.curate.fetch import Fetcher
from capfilt.curate.politeness import Asked, Hosts, PoliteQueue
from capfilt.data.rundir import RunDir
from capfilt.settings import DownloadSettings
from tests import factories
from tests.curate.downloads import rows_of
from tests.hostile_server import HostileServer, plain

SETTINGS = DownloadSettings(
    allow_private_addresses=True, num_processes=1, num_threads=16, timeout_seconds=5.0, connections_per_host=3
)
BUSY = FetchError("too_many_requests", "status 429", retry_after_seconds=0.0)


# --- the queue ----------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 4), max_size=60), st.integers(1, 4), st.randoms(use_true_random=False))
def test_every_row_once_and_no_host_by_too_many(hosts_of: list[int], limit: int, rng: object) -> None:
    """Rows of several hosts come back in any order."""
    rows = ((index, f"http://host{host}/{index}") for index, host in enumerate(hosts_of))
    queue = PoliteQueue(rows, replace(SETTINGS, connections_per_host=limit), Hosts())
    under_way: list[Asked] = []
    seen: list[int] = []
    while True:
        while (asked := queue.take()) is not None:
            under_way.append(asked)
            seen.append(asked.index)
            open_ = Counter(hosts_of[one.index] for one in under_way)
            assert max(open_.values()) <= limit
        if not under_way:
            break
        done = under_way.pop(rng.randrange(len(under_way)))  # type: ignore[attr-defined]
        assert not queue.put_back(done, None)
    assert sorted(seen) == list(range(len(hosts_of)))
    assert queue.seconds_to_wait() is None


def test_a_row_is_tried_again_only_where_it_may_help() -> None:
    for failure, retries, tries in (
        (FetchError("timeout", ""), 2, 3),
        (FetchError("not_found", ""), 2, 1),
        (FetchError("timeout", ""), 0, 1),
        (None, 2, 1),
    ):
        queue = PoliteQueue(iter([(0, "http://a/")]), replace(SETTINGS, retries=retries), Hosts())
        num = 0
        while True:
            if (asked := queue.take()) is None:
                if (pause := queue.seconds_to_wait()) is None:
                    break
                assert 0 <= pause <= 2
                queue._later = [(0.0, number, row) for _, number, row in queue._later]  # it is time
                continue
            num += 1
            queue.put_back(asked, failure)
        assert num == tries


def test_refusals_double_the_pause_and_then_end_it() -> None:
    hosts = Hosts()
    queue = PoliteQueue(((n, f"http://a/{n}") for n in range(politeness.MAX_REFUSALS + 5)), SETTINGS, hosts)
    _, host = hosts.of("http://a/")
    pauses = []
    for _ in range(politeness.MAX_REFUSALS):
        asked = queue.take()
        assert asked is not None
        assert asked.refusal is None
        queue.put_back(asked, BUSY)
        pauses.append(host.paused_until - time.monotonic())
        host.paused_until = 0.0
    assert pauses == pytest.approx([0.5, 1, 2, 4, 8, 16, 32, 64], abs=0.4)
    refused = [queue.take() for _ in range(5)]
    assert all(one is not None and one.refusal is not None for one in refused)
    assert queue.take() is None


def test_requests_under_way_together_are_refused_once() -> None:
    hosts = Hosts()
    queue = PoliteQueue(((n, f"http://a/{n}") for n in range(40)), replace(SETTINGS, connections_per_host=16), hosts)
    _, host = hosts.of("http://a/")
    together = [queue.take() for _ in range(16)]
    for asked in together:
        assert asked is not None
        queue.put_back(asked, BUSY)
    assert host.num_refusals == 1
    assert 0.4 < host.paused_until - time.monotonic() <= 0.5
    assert host.refusal(time.monotonic()) is None


def test_an_answer_of_another_kind_ends_the_count() -> None:
    hosts = Hosts()
    queue = PoliteQueue(((n, f"http://a/{n}") for n in range(9)), SETTINGS, hosts)
    _, host = hosts.of("http://a/")
    for failure in (BUSY, FetchError("not_found", ""), BUSY, None, BUSY):
        asked = queue.take()
        assert asked is not None
        queue.put_back(asked, failure)
        host.paused_until = 0.0
    assert host.num_refusals == 1


def test_neither_silence_nor_earlier_requests_end_the_count() -> None:
    hosts = Hosts()
    queue = PoliteQueue(((n, f"http://a/{n}") for n in range(9)), SETTINGS, hosts)
    _, host = hosts.of("http://a/")
    refused, earlier = queue.take(), queue.take()
    assert refused is not None
    assert earlier is not None
    queue.put_back(refused, BUSY)
    queue.put_back(earlier, None)
    assert host.num_refusals == 1
    host.paused_until = 0.0
    later = queue.take()
    assert later is not None
    queue.put_back(later, FetchError("timeout", ""))
    assert host.num_refusals == 1


def test_what_is_known_of_hosts_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(politeness, "_MAX_HOSTS", 5)
    hosts = Hosts()
    _, paused = hosts.of("http://paused/")
    paused.paused_until = time.monotonic() + 60
    for number in range(20):
        hosts.of(f"http://host{number}/")
    assert hosts.of("http://paused/")[1] is paused
    assert len(hosts._hosts) <= 6


# --- real servers -------------------------------------------------------------------------------------------


@dataclass
class Site:
    """Counts who is there at a time, and answers as it is told to."""

    robots: tuple[int, str] = (404, "")
    answer_seconds: float = 0.03
    busy: dict[str, list[str]] = field(default_factory=dict)
    """Path → `Retry-After` of the first answers."""
    asked: list[tuple[float, str]] = field(default_factory=list)
    most_at_a_time: int = 0
    _now: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __enter__(self) -> Site:
        site, picture = self, io.BytesIO()
        factories.draw_picture(3).save(picture, "JPEG")

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                with site._lock:
                    site.asked.append((time.monotonic(), self.path))
                    site._now += 1
                    site.most_at_a_time = max(site.most_at_a_time, site._now)
                    waits = site.busy.get(self.path) or site.busy.get("*") or []
                    wait = waits.pop(0) if waits else None
                time.sleep(site.answer_seconds)
                status, body = (200, picture.getvalue()) if wait is None else (429, b"")
                if self.path == "/robots.txt":
                    status, body = site.robots[0], site.robots[1].encode()
                with site._lock:
                    site._now -= 1
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                if wait:
                    self.send_header("Retry-After", wait)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def url(self, path: object) -> str:
        return f"http://127.0.0.1:{self._server.server_port}/{path}"


@pytest.fixture
def site() -> Iterator[Site]:
    with Site() as opened:
        yield opened


def reasons_of(urls: list[str], tmp_path: Path, settings: DownloadSettings) -> list[str | None]:
    table = tmp_path / "t.txt"
    table.write_text("\n".join(urls))
    run = RunDir.create(tmp_path / "run")
    download(str(table), run, settings)
    return [row["reason"] for row in rows_of(run)]


def test_few_connections_to_one_host(site: Site, tmp_path: Path) -> None:
    with Site() as other:
        urls = [one.url(number) for number in range(30) for one in (site, other)]
        assert reasons_of(urls, tmp_path, SETTINGS) == [None] * 60
        assert (site.most_at_a_time, other.most_at_a_time) == (3, 3)


def test_retry_after_is_waited_for(site: Site, tmp_path: Path) -> None:
    site.busy["/0"] = ["2"]
    found = reasons_of([site.url(number) for number in range(12)], tmp_path, replace(SETTINGS, retries=1))
    assert found == [None] * 12
    refused = next(when for when, path in site.asked if path == "/0")
    after = [when - refused for when, _ in site.asked if when > refused + 1.0]  # before, it may not have been heard
    assert len(after) >= 5
    assert min(after) >= 2.0
    assert Counter(path for _, path in site.asked)["/0"] == 2


def test_a_host_that_is_too_busy_for_a_moment_is_not_given_up(site: Site, tmp_path: Path) -> None:
    """All of its first answers are refusals, and none afterwards."""
    site.busy["*"], site.answer_seconds = [""] * 12, 0.5
    settings = replace(SETTINGS, retries=3, connections_per_host=12)
    assert reasons_of([site.url(number) for number in range(40)], tmp_path, settings) == [None] * 40


def test_a_host_that_asks_for_hours_is_given_up_and_others_go_on(site: Site, tmp_path: Path) -> None:
    with Site(busy={"*": ["7200"] * 99}) as other:
        urls = [one.url(number) for number in range(20) for one in (site, other)]
        began = time.monotonic()
        found = reasons_of(urls, tmp_path, SETTINGS)
        assert found == [None, "too_many_requests"] * 20
        assert len(other.asked) <= 2 * SETTINGS.connections_per_host
        assert time.monotonic() - began < 60
    rows = rows_of(RunDir.open(tmp_path / "run"))
    assert "the host asked to be left alone" in rows[-1]["error_message"]


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
    with Site(robots=robots) as site:
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


def test_the_status_counts_before_the_tag() -> None:
    answers = {"/a": plain(b"", "503 Closed", "Retry-After: 60", "X-Robots-Tag: noindex, noai")}
    with HostileServer(answers) as server, pytest.raises(FetchError) as failure:
        Fetcher(SETTINGS).fetch(server.url("/a"))
    assert (failure.value.reason, failure.value.retry_after_seconds) == ("server_error", 60.0)


def test_robots_txt_is_not_asked_for_unless_wanted(tmp_path: Path) -> None:
    with Site(robots=(200, "User-agent: *\nDisallow: /\n")) as site:
        assert reasons_of([site.url(1)], tmp_path, SETTINGS) == [None]
        assert [path for _, path in site.asked] == ["/1"]
