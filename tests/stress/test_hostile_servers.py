"""Row 12: servers that drip, never end, lie about lengths, redirect in circles or speak no HTTP."""

from __future__ import annotations

import gzip
import time
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from capfilt.curation.addresses import FetchError
from capfilt.curation.fetch import Fetcher
from capfilt.settings import DownloadSettings
from tests.hostile_server import OK, Answer, HostileServer, plain, raw, redirect
from tests.stress.conftest import Figure

SETTINGS = DownloadSettings(timeout_seconds=10.0, max_body_bytes=200_000, allow_private_addresses=True)
IMPATIENT = replace(SETTINGS, timeout_seconds=0.4)
"""For servers that hold a fetch until its deadline."""
BOMB = gzip.compress(bytes(10_000_000))
HOSTILE: dict[str, tuple[Answer, str]] = {
    "/drip-body": (raw(OK + b"Content-Length: 9999\r\n\r\n", b"x", pause=0.05, repeat_last=True), "timeout"),
    "/drip-headers": (raw(OK, b"X: y\r\n", pause=0.05, repeat_last=True), "timeout"),
    "/drip-status": (raw(b"H", b"T", pause=0.05, repeat_last=True), "timeout"),
    "/silent": (raw(b"", pause=5.0), "timeout"),
    "/hang-in-status": (raw(b"HTTP/1.1 2", pause=5.0), "timeout"),
    "/closes": (raw(), "connection_error"),
    "/hang-after-headers": (raw(OK + b"\r\n", pause=5.0), "timeout"),
    "/endless": (raw(OK + b"\r\n", b"x" * 65536, repeat_last=True), "body_too_large"),
    "/endless-chunks": (
        raw(
            OK + b"Transfer-Encoding: chunked\r\n\r\n",
            b"10000\r\n" + b"x" * 65536 + b"\r\n",
            repeat_last=True,
        ),
        "body_too_large",
    ),
    "/tiny-chunks": (
        raw(OK + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n" * 9000, repeat_last=True),
        "bad_response|body_too_large|timeout",
    ),
    "/chunk-extension": (
        raw(OK + b"Transfer-Encoding: chunked\r\n\r\n1;", b"a" * 65536, repeat_last=True),
        "bad_response|connection_error",
    ),
    "/announced": (raw(OK + b"Content-Length: 999999999999\r\n\r\n"), "body_too_large"),
    "/short": (raw(OK + b"Content-Length: 1000\r\n\r\nhello"), "connection_error"),
    "/cut-chunk": (raw(OK + b"Transfer-Encoding: chunked\r\n\r\nff\r\nhello"), "connection_error"),
    "/reset-in-headers": (raw(b"HTTP/1.1 200 OK\r\nContent-Le"), "connection_error|bad_response|empty_body"),
    "/empty": (plain(b""), "empty_body"),
    "/no-content": (raw(b"HTTP/1.1 204 No Content\r\n\r\n"), "empty_body"),
    "/header-flood": (raw(OK, b"X-A: " + b"a" * 1000 + b"\r\n", repeat_last=True), "bad_response"),
    "/long-line": (raw(OK + b"X-A: ", b"a" * 65536, repeat_last=True), "bad_response"),
    "/continue-flood": (
        raw(b"HTTP/1.1 100 Continue\r\n\r\n" * 900, repeat_last=True),
        "bad_response|timeout",
    ),
    "/not-http": (raw(b"SSH-2.0-OpenSSH_9.9\r\n"), "bad_response"),
    "/binary": (raw(bytes(range(256)) * 20), "bad_response"),
    "/bad-length": (raw(OK + b"Content-Length: -5\r\n\r\n"), "empty_body"),
    "/bomb": (plain(BOMB, "200 OK", "Content-Encoding: gzip"), "body_too_large"),
    "/bad-gzip": (plain(b"no gzip", "200 OK", "Content-Encoding: gzip"), "bad_response"),
    "/odd-encoding": (plain(b"x", "200 OK", "Content-Encoding: br\x1b[31m"), "bad_response"),
    "/401": (plain(b"", "401 Unauthorized"), "forbidden"),
    "/403": (plain(b"", "403 Forbidden"), "forbidden"),
    "/404": (plain(b"not here", "404 \x1b]0;owned\x07"), "not_found"),
    "/410": (plain(b"", "410 Gone"), "gone"),
    "/418": (plain(b"", "418 Teapot"), "http_error"),
    "/429": (plain(b"", "429 Too Many Requests"), "too_many_requests"),
    "/451": (plain(b"", "451 Unavailable"), "forbidden"),
    "/500": (plain(b"", "500 Oops"), "server_error"),
    "/self": (redirect("/self"), "too_many_redirects"),
    "/ping": (redirect("/pong"), "too_many_redirects"),
    "/pong": (redirect("/ping"), "too_many_redirects"),
    "/no-location": (plain(b"", "302 Found"), "bad_response"),
    "/to-file": (redirect("file:///etc/passwd"), "bad_scheme"),
    "/to-data": (redirect("data:image/png;base64,AAAA"), "bad_scheme"),
    "/to-gopher": (redirect("gopher://127.0.0.1/"), "bad_scheme"),
    "/to-user": (redirect("http://example.com@127.0.0.1/"), "bad_url"),
    "/to-control": (redirect("http://127.0.0.1/\x0b"), "bad_url"),
    "/noai": (plain(b"x", "200 OK", "X-Robots-Tag: noai"), "disallowed"),
    "/redirect-noai": (plain(b"", "302 Found", "Location: /good", "X-Robots-Tag: noml"), "disallowed"),
    "/long-0": (redirect("/long-1"), "too_many_redirects"),
}


@pytest.fixture(scope="module")
def server() -> Iterator[HostileServer]:
    answers = {path: answer for path, (answer, _) in HOSTILE.items()}
    answers |= {"/good": plain(b"picture")} | {f"/long-{i}": redirect(f"/long-{i + 1}") for i in range(1, 9)}
    with HostileServer(answers) as server:
        yield server


def test_hostile_servers_end_in_a_reason_in_time_and_memory(server: HostileServer, figure: Figure) -> None:
    latest, most = -SETTINGS.timeout_seconds, 0
    for path, (_, reasons) in HOSTILE.items():
        settings = IMPATIENT if "timeout" in reasons else SETTINGS
        tracemalloc.start()
        started = time.monotonic()
        with pytest.raises(FetchError) as caught:
            Fetcher(settings).fetch(server.url(path))
        latest = max(latest, time.monotonic() - started - settings.timeout_seconds)
        most = max(most, tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert caught.value.reason in reasons.split("|"), (path, caught.value)
        assert caught.value.detail.isprintable()
        assert "owned" not in caught.value.detail
    assert latest < 1
    assert most < 16e6  # of client and server; chunks of one byte cost most, a constant however large a body may be
    figure(
        12,
        f"{len(HOSTILE)} of {len(HOSTILE)} servers ended in a reason, none later than {max(latest, 0):.2f} s after its "
        f"deadline; the most memory {most / 1e6:.1f} MB (body {SETTINGS.max_body_bytes / 1e6} MB)",
    )


def _chunked(body: bytes) -> Answer:
    pieces = [body[start : start + 50_000] for start in range(0, len(body), 50_000)]
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces)
    return raw(OK + b"Transfer-Encoding: chunked\r\n\r\n" + chunks + b"0\r\n\r\n")


BODIES: dict[str, Callable[[bytes], Answer]] = {
    "plain": plain,
    "chunked": _chunked,
    "gzip": lambda body: plain(gzip.compress(body), "200 OK", "Content-Encoding: gzip"),
    "until the end": lambda body: raw(OK + b"\r\n" + body),
}


@pytest.mark.parametrize("form", BODIES)
def test_a_body_may_have_as_many_bytes_as_the_settings_say(form: str, figure: Figure) -> None:
    most = bytes(number % 251 for number in range(SETTINGS.max_body_bytes))
    with HostileServer({"/most": BODIES[form](most), "/more": BODIES[form](most + b"x")}) as server:
        assert Fetcher(SETTINGS).fetch(server.url("/most")) == most
        with pytest.raises(FetchError, match="body_too_large"):
            Fetcher(SETTINGS).fetch(server.url("/more"))
    figure(12, f"the cap of a body, {form}: {len(most):,} bytes are read, one more is refused")
