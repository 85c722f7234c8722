"""Row 13: no way of writing a private address reaches it, directly, by a name, through a proxy or a redirect."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from capfilt.curate.addresses import FetchError, IPAddress, check_address
from capfilt.curate.fetch import Fetcher, resolve_host
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


@contextmanager
def canary() -> Iterator[HostileServer]:
    """A listener on loopback that must never be reached."""
    with HostileServer({"/": plain(b"reached")}, host="0.0.0.0") as server:
        yield server
        assert server.requests == []


def _closed_settings(port: int) -> DownloadSettings:
    return DownloadSettings(timeout_seconds=0.5, ports=(80, 443, port))


@pytest.mark.parametrize("via", ["direct", "name", "proxy"])
def test_no_form_of_a_private_address_is_reached(via: str, monkeypatch: pytest.MonkeyPatch, figure: Figure) -> None:
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
    figure(13, f"{via}: {len(LOOPBACK_FORMS)} forms, 0 connections at the canary")


def _numeric(form: str, port: int) -> list[str]:
    if form.startswith("["):
        return [form[1:-1]]
    return resolve_host(form, port)


def test_redirects_to_private_addresses_are_not_followed(figure: Figure) -> None:
    """The first hop alone, on 127.0.0.77, passes for a public address."""

    def check(address: IPAddress, allow_private: bool) -> None:
        if str(address) != "127.0.0.77":
            check_address(address, allow_private)

    with canary() as target, HostileServer({}, host="127.0.0.77") as entry:
        entry.answers |= {f"/{i}": redirect(f"http://{f}:{target.port}/") for i, f in enumerate(LOOPBACK_FORMS)}
        settings = DownloadSettings(timeout_seconds=0.5, ports=(entry.port, target.port))
        fetcher = Fetcher(settings, check=check)
        for i, form in enumerate(LOOPBACK_FORMS):
            with pytest.raises(FetchError) as caught:
                fetcher.fetch(f"http://127.0.0.77:{entry.port}/{i}")
            assert caught.value.reason in ("blocked_address", "dns_error"), form
        assert len(entry.requests) == len(LOOPBACK_FORMS)
    figure(13, f"redirect: {len(LOOPBACK_FORMS)} forms, 0 connections at the canary")


def test_connection_goes_to_the_address_that_was_checked(figure: Figure) -> None:
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
    figure(13, "rebinding: 3 of 3 fetches of a name that changes its address, 0 connections at the canary")
