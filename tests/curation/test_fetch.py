"""The guarded fetch against real servers on loopback; hostile ones and private addresses: tests/stress/."""

from __future__ import annotations

import gzip
import ipaddress
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import pytest

from capfilt.curation.addresses import FetchError, IPAddress, check_address, parse_redirect, parse_url
from capfilt.curation.fetch import Fetcher, find_disallowed
from capfilt.settings import DownloadSettings
from tests.hostile_server import OK, HostileServer, plain, raw, redirect

SETTINGS = DownloadSettings(timeout_seconds=10.0, max_body_bytes=200_000, allow_private_addresses=True)


@pytest.fixture(scope="module")
def server() -> Iterator[HostileServer]:
    answers = {
        "/good": plain(b"picture"),
        "/moved": redirect("/good", "301 Moved Permanently"),
        "/moved-far": redirect("/a/../good", "308 Permanent Redirect"),
        "/gzip": plain(gzip.compress(b"picture"), "200 OK", "Content-Encoding: gzip"),
        "/chunked": raw(OK + b"Transfer-Encoding: chunked\r\n\r\n3\r\npic\r\n4\r\nture\r\n0\r\n\r\n"),
        "/until-close": raw(OK + b"\r\npicture"),
        "/after-continue": raw(b"HTTP/1.1 100 Continue\r\n\r\n" + OK + b"Content-Length: 7\r\n\r\npicture"),
        "/m%C3%BCnchen%20x?q=%22": plain(b"picture"),
    }
    with HostileServer(answers) as server:
        yield server


@pytest.mark.parametrize(
    "path", ["/good", "/moved", "/moved-far", "/gzip", "/chunked", "/until-close", "/after-continue"]
)
def test_body_is_fetched(server: HostileServer, path: str) -> None:
    assert Fetcher(SETTINGS).fetch(server.url(path)) == b"picture"


def test_address_is_encoded_and_request_is_polite(server: HostileServer) -> None:
    assert Fetcher(SETTINGS).fetch(server.url("/münchen x?q=%22#part")) == b"picture"
    request = server.requests[-1]
    assert "User-Agent: Mozilla/5.0 (compatible; capfilt/" in request
    assert f"Host: 127.0.0.1:{server.port}\r\n" in request
    assert "Cookie" not in request
    assert "Referer" not in request


@pytest.mark.parametrize(
    ("status", "header", "seconds"),
    [
        ("429 Busy", "Retry-After: 7", (7, 7)), ("503 Busy", "Retry-After: 120", (120, 120)),
        ("429 Busy", "X: y", (0, 0)), ("429 Busy", "Retry-After: soon", (0, 0)),
        ("429 Busy", "Retry-After: Wed, 21 Oct 2015 07:28:00 GMT", (0, 0)),
        ("503 Busy", "Retry-After: in five minutes",
         (200, 300)),
        ("500 Oops", "Retry-After: 7", None), ("404 No", "Retry-After: 7", None),
    ],
)  # fmt: skip
def test_how_long_a_server_wants_to_be_left_alone(status: str, header: str, seconds: tuple[int, int] | None) -> None:
    header = header.replace("in five minutes", format_datetime(datetime.now(UTC) + timedelta(minutes=5), usegmt=True))
    with HostileServer({"/": plain(b"", status, header)}) as server, pytest.raises(FetchError) as caught:
        Fetcher(SETTINGS).fetch(server.url("/"))
    found = caught.value.retry_after_seconds
    assert found is None if seconds is None else seconds[0] <= (found or 0.0) <= seconds[1]


def test_refused_connection_and_unknown_name() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(FetchError, match="connection_error"):
        Fetcher(SETTINGS).fetch(f"http://127.0.0.1:{port}/")
    with pytest.raises(FetchError, match="dns_error"):
        Fetcher(SETTINGS, resolve=_fail_to_resolve).fetch("http://nowhere.example/")


def _fail_to_resolve(host: str, port: int) -> list[str]:
    raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")


def test_name_resolution_counts_against_the_deadline() -> None:
    released = threading.Event()

    def hang(host: str, port: int) -> list[str]:
        released.wait(10)
        return ["127.0.0.1"]

    started = time.monotonic()
    with pytest.raises(FetchError, match="timeout"):
        Fetcher(replace(SETTINGS, timeout_seconds=0.3), resolve=hang).fetch("http://slow.example/")
    released.set()
    assert time.monotonic() - started < 1.3


def test_server_without_tls_is_refused() -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=_speak_no_tls, args=(listener,), daemon=True)
    thread.start()
    try:
        with pytest.raises(FetchError) as caught:
            Fetcher(SETTINGS).fetch(f"https://127.0.0.1:{listener.getsockname()[1]}/")
        assert caught.value.reason in ("tls_error", "connection_error")
    finally:
        thread.join()
        listener.close()


def _speak_no_tls(listener: socket.socket) -> None:
    connection, _ = listener.accept()
    with connection:
        connection.recv(4096)
        connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes its certificate with openssl")
def test_tls_is_for_the_name_on_the_address_that_was_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subject = ["-subj", "/CN=pictures.example", "-addext", "subjectAltName=DNS:pictures.example"]
    make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", *subject]
    subprocess.run([*make, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    names: list[str | None] = []
    context.sni_callback = lambda connection, name, _: names.append(name)  # type: ignore[assignment]
    with HostileServer({"/": plain(b"picture")}, tls=context) as server:
        url = f"https://pictures.example:{server.port}/"
        with pytest.raises(FetchError, match="tls_error"):  # nobody vouches for the certificate
            Fetcher(SETTINGS, lambda host, port: ["127.0.0.1"]).fetch(url)
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        fetcher = Fetcher(SETTINGS, lambda host, port: ["127.0.0.1"])
        assert fetcher.fetch(url) == b"picture"
        assert f"Host: pictures.example:{server.port}\r\n" in server.requests[-1]
        with pytest.raises(FetchError, match="tls_error"):  # the certificate is for another name
            fetcher.fetch(url.replace("pictures", "other"))
        assert names[1:] == ["pictures.example", "other.example"]


# --- addresses ----------------------------------------------------------------------------------------------


def test_host_header_and_pinning_by_name(server: HostileServer) -> None:
    fetcher = Fetcher(SETTINGS, lambda host, port: ["127.0.0.1"])
    assert fetcher.fetch(f"http://pictures.example:{server.port}/good") == b"picture"
    assert f"Host: pictures.example:{server.port}\r\n" in server.requests[-1]


def test_silent_address_leaves_time_for_the_next(server: HostileServer) -> None:
    """Of several addresses the first that connects is used: here one says nothing, one refuses, one is there."""
    with silent_address("127.0.0.9", server.port):
        fetcher = Fetcher(SETTINGS, lambda host, port: ["127.0.0.9", "127.0.0.8", "127.0.0.1"])
        began = time.monotonic()
        assert fetcher.fetch(f"http://pictures.example:{server.port}/good") == b"picture"
        assert 0.5 < time.monotonic() - began < SETTINGS.timeout_seconds


@contextmanager
def silent_address(host: str, port: int) -> Iterator[None]:
    """A listener whose queue is full: the kernel answers nothing to whoever would connect."""
    with socket.create_server((host, port), backlog=0), ExitStack() as waiting:
        for _ in range(20):
            connection = waiting.enter_context(socket.socket())
            connection.settimeout(0.3)
            try:
                connection.connect((host, port))
            except TimeoutError:
                yield
                return
        pytest.skip("the system has room for more than 20 that wait")


@pytest.mark.parametrize(
    "text",
    ["8.8.8.8", "1.1.1.1", "93.184.216.34", "2606:4700:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"],
)
def test_public_addresses_are_open(text: str) -> None:
    check_address(_ip(text), allow_private=False)


def _ip(text: str) -> IPAddress:
    return ipaddress.ip_address(text)


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("", "bad_url"), ("   ", "bad_url"), ("no scheme", "bad_url"), ("//host/x", "bad_url"),
        ("file:///etc/passwd", "bad_scheme"), ("ftp://host/x", "bad_scheme"),
        ("data:image/png,x", "bad_scheme"), ("javascript:alert(1)", "bad_scheme"), ("http:///x", "bad_url"),
        ("http://user:pw@host/", "bad_url"),
        ("http://host\\@evil/", "bad_url"), ("http://ho st/", "bad_url"), ("http://host%00/", "bad_url"),
        ("http://[::1", "bad_url"), ("http://[fe80::1%25eth0]/", "bad_url"), ("http://[v1.x]/", "bad_url"),
        ("http://host:99999/", "bad_port"), ("http://host:0/", "bad_port"), ("http://host:22/", "bad_port"),
        ("http://host:8080/", "bad_port"), ("http://host:x/", "bad_port"), ("http://a\nb/", "bad_url"),
        ("http://host/\x1b]0;x", "bad_url"), ("http://" + "a" * 9000, "bad_url"), ("http://a..b/", "bad_url"),
    ],
)  # fmt: skip
def test_bad_addresses(url: str, reason: str) -> None:
    with pytest.raises(FetchError) as caught:
        parse_url(url, (80, 443))
    assert caught.value.reason == reason
    assert caught.value.detail.isprintable()


def test_addresses_in_normal_form() -> None:
    assert parse_url(" HTTP://Example.COM:80#x ", (80,)).url == "http://example.com/"
    assert parse_url("https://münchen.example/ä b?q=ü&r=%20", (443,)).url == (
        "https://xn--mnchen-3ya.example/%C3%A4%20b?q=%C3%BC&r=%20"
    )
    base = parse_url("http://h.example/a/b?c", (80,))
    assert parse_redirect(base, "../d", (80,)).url == "http://h.example/d"
    assert parse_redirect(base, "//other.example/e", (80,)).url == "http://other.example/e"


@pytest.mark.parametrize(
    ("values", "found"),
    [
        (["noai"], "noai"), (["NoImageAI"], "noimageai"), (["index, noindex"], "noindex"), (["none"], "none"),
        (["noml"], "noml"), (["all"], None), (["nofollow"], None), (["googlebot: noindex"], None),
        (["googlebot: noindex, noai"], None), (["capfilt: noai"], "noai"), (["IMG2DATASET : noai"], "noai"),
        (["otherbot: noai, capfilt: nofollow, noindex"], "noindex"), (["*: noai"], "noai"),
        (["unavailable_after: 25 Jun 2030 15:00:00 PST, noai"], "noai"),
        (["unavailable_after: Friday, 25 Jun 2030 15:00:00 GMT", "noimageindex"], "noimageindex"),
        (["max-image-preview: large, noml"], "noml"), ([":,:,"], None), ([""], None), ([], None),
    ],
)  # fmt: skip
def test_robots_directives(values: list[str], found: str | None) -> None:
    assert find_disallowed(values) == found
