"""The guarded fetch against real servers on loopback, hostile ones among them, and an SSRF canary."""

from __future__ import annotations

import gzip
import ipaddress
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest

from capfilt.curate.addresses import FetchError, IPAddress, check_address, parse_redirect, parse_url
from capfilt.curate.fetch import Fetcher, find_disallowed, resolve_host
from capfilt.settings import DownloadSettings

SETTINGS = DownloadSettings(timeout_seconds=0.5, max_body_bytes=200_000, allow_private_addresses=True)
Answer = Callable[[socket.socket, str], None]


class HostileServer:
    """Accepts connections on loopback, reads the request head and lets a function write what it likes."""

    def __init__(self, answers: dict[str, Answer], host: str = "127.0.0.1", tls: ssl.SSLContext | None = None) -> None:
        self.answers = answers
        self._tls = tls
        self.requests: list[str] = []
        self._listener = socket.create_server((host, 0), backlog=64)
        self.port = self._listener.getsockname()[1]
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._accept, daemon=True)

    def __enter__(self) -> HostileServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        socket.create_connection(self._listener.getsockname()).close()
        self._thread.join()
        self._listener.close()

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}{path}"

    def _accept(self) -> None:
        while not self._closing.is_set():
            connection, _ = self._listener.accept()
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with suppress(ssl.SSLError, OSError), connection:
            if self._tls is not None:
                connection = self._tls.wrap_socket(connection, server_side=True)
            self._talk(connection)

    def _talk(self, connection: socket.socket) -> None:
        with connection:
            head = b""
            while b"\r\n\r\n" not in head:
                received = connection.recv(65536)
                if not received:
                    return
                head += received
            text = head.decode("latin-1")
            self.requests.append(text)
            path = text.split(" ")[1]
            self.answers[path](connection, text)  # the fetch may hang up in the middle, as it should


def plain(body: bytes, status: str = "200 OK", *headers: str) -> Answer:
    def answer(connection: socket.socket, _request: str) -> None:
        lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *headers]
        connection.sendall("\r\n".join(lines).encode("utf-8") + b"\r\n\r\n" + body)

    return answer


def raw(*pieces: bytes, pause: float = 0.0, repeat_last: bool = False) -> Answer:
    def answer(connection: socket.socket, _request: str) -> None:
        for piece in pieces:
            connection.sendall(piece)
            time.sleep(pause)
        while repeat_last:
            connection.sendall(pieces[-1])
            time.sleep(pause)

    return answer


def redirect(location: str, status: str = "302 Found") -> Answer:
    return plain(b"moved", status, f"Location: {location}")


OK = b"HTTP/1.1 200 OK\r\n"
BOMB = gzip.compress(bytes(10_000_000))
HOSTILE: dict[str, tuple[Answer, str]] = {
    "/drip-body": (raw(OK + b"Content-Length: 9999\r\n\r\n", b"x", pause=0.05, repeat_last=True), "timeout"),
    "/drip-headers": (raw(OK, b"X: y\r\n", pause=0.05, repeat_last=True), "timeout"),
    "/drip-status": (raw(b"H", b"T", pause=0.05, repeat_last=True), "timeout"),
    "/silent": (raw(pause=5.0), "connection_error"),
    "/hang": (raw(b"", pause=5.0), "timeout"),
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
    answers |= {
        "/good": plain(b"picture"),
        "/moved": redirect("/good", "301 Moved Permanently"),
        "/moved-far": redirect("/a/../good", "308 Permanent Redirect"),
        "/gzip": plain(gzip.compress(b"picture"), "200 OK", "Content-Encoding: gzip"),
        "/chunked": raw(OK + b"Transfer-Encoding: chunked\r\n\r\n3\r\npic\r\n4\r\nture\r\n0\r\n\r\n"),
        "/until-close": raw(OK + b"\r\npicture"),
        "/after-continue": raw(b"HTTP/1.1 100 Continue\r\n\r\n" + OK + b"Content-Length: 7\r\n\r\npicture"),
        "/m%C3%BCnchen%20x?q=%22": plain(b"picture"),
    }
    answers |= {f"/long-{i}": redirect(f"/long-{i + 1}") for i in range(1, 9)}
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


@pytest.mark.parametrize("path", list(HOSTILE))
def test_hostile_server_ends_in_a_reason_in_time(server: HostileServer, path: str) -> None:
    started = time.monotonic()
    with pytest.raises(FetchError) as caught:
        Fetcher(SETTINGS).fetch(server.url(path))
    assert time.monotonic() - started < SETTINGS.timeout_seconds + 1
    assert caught.value.reason in HOSTILE[path][1].split("|"), caught.value
    assert caught.value.detail.isprintable()
    assert "owned" not in caught.value.detail


def test_retries_only_what_may_pass() -> None:
    calls: list[str] = []

    def second_time_lucky(connection: socket.socket, request: str) -> None:
        calls.append(request)
        plain(b"picture" if len(calls) == 2 else b"", "200 OK" if len(calls) == 2 else "503 Busy")(connection, request)

    with HostileServer({"/flaky": second_time_lucky, "/gone": plain(b"", "410 Gone")}) as server:
        fetcher = Fetcher(replace(SETTINGS, retries=2))
        assert fetcher.fetch(server.url("/flaky")) == b"picture"
        with pytest.raises(FetchError, match="gone"):
            fetcher.fetch(server.url("/gone"))
        assert len(server.requests) == 3


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

LOOPBACK_FORMS = [
    "127.0.0.1", "127.0.0.2", "127.1", "127.0.1", "0", "0.0.0.0", "2130706433", "0x7f000001", "0x7f.1",
    "0177.0.0.1", "017700000001", "127.0.0.1.", "localhost", "LOCALHOST", "localhost.", "１２７.0.0.1",
    "127。0。0。1", "[::1]", "[::]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "[0:0:0:0:0:ffff:7f00:0001]",
    "[::127.0.0.1]", "[64:ff9b::7f00:1]", "[64:ff9b:1::7f00:1]", "[2002:7f00:1::]", "[::ffff:0:7f00:1]",
    "[2001:0:7f00:1::]", "[2606:4700::5efe:7f00:1]", "[2606:4700::200:5efe:127.0.0.1]", "[fe80::1]",
    "[fc00::1]", "[fd00:ec2::254]", "[ff02::1]", "[100::1]", "[2001:db8::1]", "[3fff::1]", "[fec0::1]",
    "10.0.0.1", "172.16.0.1",
    "172.31.255.255", "192.168.1.1", "169.254.169.254", "100.100.100.200", "168.63.129.16",
    "192.0.0.192", "192.88.99.1", "198.18.0.1", "224.0.0.1", "240.0.0.1", "255.255.255.255",
]  # fmt: skip


@contextmanager
def canary() -> Iterator[HostileServer]:
    """A listener on loopback that must never be reached."""
    with HostileServer({"/": plain(b"reached")}, host="0.0.0.0") as server:
        yield server
        assert server.requests == []


def _closed_settings(port: int) -> DownloadSettings:
    return replace(SETTINGS, allow_private_addresses=False, ports=(80, 443, port))


@pytest.mark.parametrize("via", ["direct", "name", "proxy"])
def test_no_form_of_a_private_address_is_reached(via: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with canary() as server:
        if via == "proxy":
            for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "all_proxy", "ALL_PROXY"):
                monkeypatch.setenv(name, server.url(""))
        for form in LOOPBACK_FORMS:
            resolve = (lambda host, port, form=form: _numeric(form, port)) if via == "name" else resolve_host
            host = "rebinding.example" if via == "name" else form
            with pytest.raises(FetchError) as caught:
                Fetcher(_closed_settings(server.port), resolve).fetch(f"http://{host}:{server.port}/")
            assert caught.value.reason in ("blocked_address", "dns_error"), form


def _numeric(form: str, port: int) -> list[str]:
    if form.startswith("["):
        return [form[1:-1]]
    return resolve_host(form, port)


def test_redirects_to_private_addresses_are_not_followed() -> None:
    """The first hop alone, on 127.0.0.77, passes for a public address."""

    def check(address: IPAddress, allow_private: bool) -> None:
        if str(address) != "127.0.0.77":
            check_address(address, allow_private)

    with canary() as target, HostileServer({}, host="127.0.0.77") as entry:
        entry.answers |= {f"/{i}": redirect(f"http://{f}:{target.port}/") for i, f in enumerate(LOOPBACK_FORMS)}
        settings = replace(_closed_settings(target.port), ports=(entry.port, target.port))
        fetcher = Fetcher(settings, check=check)
        for i, form in enumerate(LOOPBACK_FORMS):
            with pytest.raises(FetchError) as caught:
                fetcher.fetch(f"http://127.0.0.77:{entry.port}/{i}")
            assert caught.value.reason in ("blocked_address", "dns_error"), form
        assert len(entry.requests) == len(LOOPBACK_FORMS)


def test_connection_goes_to_the_address_that_was_checked() -> None:
    """A name that answers differently each time (DNS rebinding) is resolved once, and pinned."""
    asked: list[str] = []

    def rebind(host: str, port: int) -> list[str]:
        asked.append(host)
        return ["10.1.2.3"] if len(asked) == 1 else ["127.0.0.1"]

    with canary() as server:
        fetcher = Fetcher(_closed_settings(server.port), rebind)
        for _ in range(3):
            with pytest.raises(FetchError, match="blocked_address"):
                fetcher.fetch(f"http://rebind.example:{server.port}/")
    assert asked == ["rebind.example"]


def test_host_header_and_pinning_by_name(server: HostileServer) -> None:
    fetcher = Fetcher(SETTINGS, lambda host, port: ["127.0.0.1"])
    assert fetcher.fetch(f"http://pictures.example:{server.port}/good") == b"picture"
    assert f"Host: pictures.example:{server.port}\r\n" in server.requests[-1]


def test_silent_address_leaves_time_for_the_next(server: HostileServer) -> None:
    """Of several addresses the first that connects is used."""
    with socket.create_server(("127.0.0.1", 0)):
        fetcher = Fetcher(SETTINGS, lambda host, port: ["127.0.0.9", "::1", "127.0.0.1"])
        assert fetcher.fetch(f"http://pictures.example:{server.port}/good") == b"picture"


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
