"""Hosts are asked by few at a time, left alone when they say so, and given up when they say so for long."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capfilt.curation import politeness
from capfilt.curation.addresses import FetchError
from capfilt.curation.fetch import Fetcher
from capfilt.curation.politeness import Asked, Hosts, PoliteQueue
from capfilt.data.rundir import RunDir
from tests.curation.busy_sites import SETTINGS, BusySite, reasons_of
from tests.curation.downloads import rows_of
from tests.hostile_server import HostileServer, plain

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


@pytest.fixture
def site() -> Iterator[BusySite]:
    with BusySite() as opened:
        yield opened


def test_few_connections_to_one_host(site: BusySite, tmp_path: Path) -> None:
    with BusySite() as other:
        urls = [one.url(number) for number in range(30) for one in (site, other)]
        assert reasons_of(urls, tmp_path, SETTINGS) == [None] * 60
        assert (site.most_at_a_time, other.most_at_a_time) == (3, 3)


def test_retry_after_is_waited_for(site: BusySite, tmp_path: Path) -> None:
    site.busy["/0"] = ["2"]
    found = reasons_of([site.url(number) for number in range(12)], tmp_path, replace(SETTINGS, retries=1))
    assert found == [None] * 12
    refused = next(when for when, path in site.asked if path == "/0")
    after = [when - refused for when, _ in site.asked if when > refused + 1.0]  # before, it may not have been heard
    assert len(after) >= 5
    assert min(after) >= 2.0
    assert Counter(path for _, path in site.asked)["/0"] == 2


def test_a_host_that_is_too_busy_for_a_moment_is_not_given_up(site: BusySite, tmp_path: Path) -> None:
    """All of its first answers are refusals, and none afterwards."""
    site.busy["*"], site.answer_seconds = [""] * 12, 0.5
    settings = replace(SETTINGS, retries=3, connections_per_host=12)
    assert reasons_of([site.url(number) for number in range(40)], tmp_path, settings) == [None] * 40


def test_a_host_that_asks_for_hours_is_given_up_and_others_go_on(site: BusySite, tmp_path: Path) -> None:
    with BusySite(busy={"*": ["7200"] * 99}) as other:
        urls = [one.url(number) for number in range(20) for one in (site, other)]
        began = time.monotonic()
        found = reasons_of(urls, tmp_path, SETTINGS)
        assert found == [None, "too_many_requests"] * 20
        assert len(other.asked) <= 2 * SETTINGS.connections_per_host
        assert time.monotonic() - began < 60
    rows = rows_of(RunDir.open(tmp_path / "run"))
    assert "the host asked to be left alone" in rows[-1]["error_message"]


def test_the_status_counts_before_the_tag() -> None:
    answers = {"/a": plain(b"", "503 Closed", "Retry-After: 60", "X-Robots-Tag: noindex, noai")}
    with HostileServer(answers) as server, pytest.raises(FetchError) as failure:
        Fetcher(SETTINGS).fetch(server.url("/a"))
    assert (failure.value.reason, failure.value.retry_after_seconds) == ("server_error", 60.0)
