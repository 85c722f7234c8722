"""Row 13: no way of writing a private address reaches it, directly, by a name, through a proxy or a redirect."""

from __future__ import annotations

import socket
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from capfilt.curation.addresses import FetchError, IPAddress, check_address
from capfilt.curation.fetch import Fetcher
from capfilt.settings import DownloadSettings
from tests.hostile_server import HostileServer, plain, redirect
from tests.stress.conftest import Figure

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
UNKNOWN_NAMES = {"127.0.0.1."}
"""Of these, what no resolver takes for an address: names that nobody has."""
PUBLIC = "127.0.0.77"
"""On loopback, and taken for a public address by `check`."""
SECONDS = 10.0
"""Deadline of fetches that end at once."""
EVERYWHERE = "::" if socket.has_dualstack_ipv6() else "0.0.0.0"


@contextmanager
def canary(host: str = EVERYWHERE, port: int = 0) -> Iterator[HostileServer]:
    """A listener on loopback that must never be reached: not with a request, and not with a mere connection."""
    with HostileServer({"/": plain(b"reached")}, host=host, port=port) as server:
        yield server
    assert (server.num_connections, server.requests) == (0, [])


def check(address: IPAddress, allow_private: bool) -> None:
    if str(address) != PUBLIC:
        check_address(address, allow_private)


def resolve_locally(host: str, port: int) -> list[str]:
    """What the system's resolver says of addresses in whatever form, and of localhost; no name server is asked."""
    if host.lower().rstrip(".") == "localhost":
        return ["127.0.0.1", "::1"]
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
    return [str(address[0]) for *_, address in found]


def _expected_reason(form: str) -> str:
    return "dns_error" if form in UNKNOWN_NAMES else "blocked_address"


@pytest.mark.parametrize("via", ["direct", "name"])
def test_no_form_of_a_private_address_is_reached(via: str, figure: Figure) -> None:
    names = {f"name-{number}.example": form for number, form in enumerate(LOOPBACK_FORMS)}

    def resolve(host: str, port: int) -> list[str]:
        form = names.get(host, host)
        return [form[1:-1]] if form.startswith("[") else resolve_locally(form, port)

    with canary() as server:
        fetcher = Fetcher(DownloadSettings(timeout_seconds=SECONDS, ports=(80, 443, server.port)), resolve)
        for name, form in names.items():
            with pytest.raises(FetchError) as caught:
                fetcher.fetch(f"http://{name if via == 'name' else form}:{server.port}/")
            assert caught.value.reason == _expected_reason(form), form
    figure(13, f"{via}: {len(LOOPBACK_FORMS)} forms, {server.num_connections} connections at the canary")


def test_proxies_of_the_environment_are_not_used(monkeypatch: pytest.MonkeyPatch, figure: Figure) -> None:
    """Neither for private addresses nor for others: the canary is the proxy."""
    for name in ("no_proxy", "NO_PROXY", "REQUEST_METHOD"):
        monkeypatch.delenv(name, raising=False)
    with canary() as proxy, HostileServer({"/": plain(b"direct")}, host=PUBLIC) as allowed:
        for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, proxy.url(""))
        assert urllib.request.getproxies()["http"] == proxy.url(""), "this test shows nothing"
        settings = DownloadSettings(timeout_seconds=SECONDS, ports=(proxy.port, allowed.port))
        fetcher = Fetcher(settings, resolve_locally)
        for form in LOOPBACK_FORMS:
            with pytest.raises(FetchError) as caught:
                fetcher.fetch(f"http://{form}:{proxy.port}/")
            assert caught.value.reason == _expected_reason(form), form
        fetcher = Fetcher(settings, lambda host, port: [PUBLIC], check)
        assert fetcher.fetch(f"http://allowed.example:{allowed.port}/") == b"direct"
        assert [request.split("\r\n")[0] for request in allowed.requests] == ["GET / HTTP/1.1"]
    assert allowed.num_connections == 1
    figure(13, f"proxy: {len(LOOPBACK_FORMS)} forms and a name that is allowed, which came direct; "
               f"{proxy.num_connections} connections at the canary")  # fmt: skip


def test_redirects_to_private_addresses_are_not_followed(figure: Figure) -> None:
    """The first hop alone passes for a public address."""
    with canary() as target, HostileServer({}, host=PUBLIC) as entry:
        entry.answers |= {f"/{i}": redirect(f"http://{f}:{target.port}/") for i, f in enumerate(LOOPBACK_FORMS)}
        settings = DownloadSettings(timeout_seconds=SECONDS, ports=(entry.port, target.port))
        fetcher = Fetcher(settings, resolve_locally, check)
        for i, form in enumerate(LOOPBACK_FORMS):
            with pytest.raises(FetchError) as caught:
                fetcher.fetch(f"http://{PUBLIC}:{entry.port}/{i}")
            assert caught.value.reason == _expected_reason(form), form
        assert len(entry.requests) == len(LOOPBACK_FORMS)
    figure(13, f"redirect: {len(LOOPBACK_FORMS)} forms, {target.num_connections} connections at the canary")


def test_connection_goes_to_the_address_that_was_checked(monkeypatch: pytest.MonkeyPatch, figure: Figure) -> None:
    """A name that answers differently each time (DNS rebinding) is resolved once, and pinned.

    First it is a public address, whoever asks; from then on it is the canary, at the same port.
    """
    asked: list[str] = []
    real = socket.getaddrinfo

    def rebind(host: str, port: int, *args: Any, **options: Any) -> Any:
        if host != "rebind.example":
            return real(host, port, *args, **options)
        asked.append(host)
        return real(PUBLIC if len(asked) == 1 else "127.0.0.1", port, *args, **options)

    with HostileServer({"/": plain(b"picture")}, host=PUBLIC) as entry, canary("127.0.0.1", entry.port) as target:
        monkeypatch.setattr(socket, "getaddrinfo", rebind)
        settings = DownloadSettings(timeout_seconds=SECONDS, ports=(entry.port,))
        fetcher, url = Fetcher(settings, check=check), f"http://rebind.example:{entry.port}/"
        assert fetcher.fetch(url) == b"picture"
        assert (len(asked), len(entry.requests)) == (1, 1)
        assert [fetcher.fetch(url) for _ in range(2)] == [b"picture"] * 2
        assert (len(asked), len(entry.requests)) == (1, 3), "the address that was checked is kept for a while"
        with pytest.raises(FetchError, match="blocked_address"):
            Fetcher(settings, check=check).fetch(url)  # which asks anew, and checks anew
        assert len(asked) == 2
    assert entry.num_connections == 3
    figure(13, f"rebinding: a name that changes its address was asked {len(asked)} times in 4 fetches by 2 fetchers, "
               f"{target.num_connections} connections at the canary")  # fmt: skip
