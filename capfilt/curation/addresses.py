"""Which addresses may be fetched: URLs are parsed strictly, IP addresses checked before a connection.

In: the text of a URL, or an IP address a name resolved to. Out: a `Target` to connect to, or `FetchError`
with a reason code. Nothing here opens a connection.

Python's `ipaddress.is_global` lets pass IPv4 addresses wrapped in IPv6 (`::127.0.0.1`, `64:ff9b::7f00:1`,
`2002:7f00:1::`), multicast and cloud metadata addresses, so the lists are our own (IANA special-purpose
registries, and what clouds answer on) and a wrapped address is judged by what it wraps.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from urllib.parse import quote, urljoin, urlsplit

from capfilt.data.reasons import REASON_SENTENCES
from capfilt.data.texts import clean_for_terminal

MAX_URL_CHARS = 8192
"""Longest address that is tried; servers refuse longer ones."""

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address


class FetchError(Exception):
    """An address gave no body. `reason` is one of REASONS, `detail` is short and safe to print."""

    def __init__(self, reason: str, detail: str, *, retry_after_seconds: float | None = None) -> None:
        assert reason in REASON_SENTENCES, reason
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = clean_for_terminal(detail)
        self.retry_after_seconds = retry_after_seconds
        """For how long the server wants no further request, 0 where it does not say; None where it has no such wish."""


@dataclass(frozen=True, slots=True)
class Target:
    """One hop of an exchange, parsed: what to resolve, what to connect to and what to ask for."""

    scheme: str
    """http or https."""
    host: str
    """Name in ASCII (IDNA) or IP address, lower case, without brackets."""
    port: int
    """TCP port."""
    request_path: str
    """Path and query, percent-encoded ASCII, at least "/"."""

    @property
    def host_header(self) -> str:
        """Value of the Host header: brackets round IPv6, the port where it is not the scheme's own."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _DEFAULT_PORTS[self.scheme] else f"{host}:{self.port}"

    @property
    def url(self) -> str:
        """The address in normal form; equal for two spellings of the same request."""
        return f"{self.scheme}://{self.host_header}{self.request_path}"


_DEFAULT_PORTS = {"http": 80, "https": 443}
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")
_HOST_NAME = re.compile(r"[a-z0-9_]([a-z0-9_.-]{0,251}[a-z0-9_])?\.?")
_FORBIDDEN = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff\\]")
_PATH_SAFE = "/%:@!$&'()*+,;=~-._[]|^`{}"


def parse_url(text: str, ports: tuple[int, ...] | None) -> Target:
    """Parse the address of a table or of a redirect.

    Args:
        text: the address; blanks around it are ignored, blanks and non-ASCII inside the path are encoded.
        ports: ports that may be addressed; None for any.

    Raises:
        FetchError: bad_url, bad_scheme or bad_port.
    """
    text = text.strip(" \t\r\n")
    if not text:
        raise FetchError("bad_url", "the address is empty")
    if len(text) > MAX_URL_CHARS:
        raise FetchError("bad_url", f"the address has {len(text)} characters; at most {MAX_URL_CHARS}")
    # urlsplit would drop tabs and line breaks silently; servers and parsers differ about a backslash
    if _FORBIDDEN.search(text):
        raise FetchError("bad_url", f"control character or backslash in {text}")
    if not _SCHEME.match(text):
        raise FetchError("bad_url", f"no scheme in {text}")
    try:
        parts = urlsplit(text)
    except ValueError as error:
        raise FetchError("bad_url", f"{error}: {text}") from None
    if parts.scheme not in _DEFAULT_PORTS:
        raise FetchError("bad_scheme", f"{parts.scheme}: in {text}")
    if "@" in parts.netloc:
        raise FetchError("bad_url", "the address names a user")
    try:
        port = parts.port if parts.port is not None else _DEFAULT_PORTS[parts.scheme]
    except ValueError:
        raise FetchError("bad_port", f"port of {text}") from None
    if port == 0 or (ports is not None and port not in ports):
        raise FetchError("bad_port", f"port {port}; allowed: {', '.join(map(str, ports or ()))}")
    path = quote(parts.path, safe=_PATH_SAFE) or "/"
    query = f"?{quote(parts.query, safe=_PATH_SAFE + '?')}" if parts.query else ""
    return Target(parts.scheme, _parse_host(parts.netloc, parts.hostname), port, path + query)


def parse_redirect(base: Target, location: str, ports: tuple[int, ...] | None) -> Target:
    """Parse the Location a server answered, relative to the address that was asked."""
    try:
        joined = urljoin(base.url, location.strip(" \t"))
    except ValueError as error:
        raise FetchError("bad_url", f"redirect: {error}") from None
    return parse_url(joined, ports)


def _parse_host(netloc: str, host: str | None) -> str:
    if not host:
        raise FetchError("bad_url", "the address has no host")
    if netloc.startswith("["):
        try:
            address = ipaddress.IPv6Address(host)
        except ValueError:
            raise FetchError("bad_url", f"host [{host}] is not an IPv6 address") from None
        if address.scope_id is not None:
            raise FetchError("bad_url", f"host [{host}] names a network interface")
        return str(address)
    try:
        ascii_host = host.encode("idna").decode("ascii").lower()
    except UnicodeError:
        raise FetchError("bad_url", f"host {host} is not a valid name") from None
    if not _HOST_NAME.fullmatch(ascii_host):
        raise FetchError("bad_url", f"host {host} is not a valid name")
    return ascii_host


# --- what an IP address may be ------------------------------------------------------------------------------

_CLOSED_IPV4 = tuple(
    ipaddress.IPv4Network(network)
    for network in (
        "0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12",
        "192.0.0.0/24", "192.0.2.0/24", "192.31.196.0/24", "192.52.193.0/24", "192.88.99.0/24",
        "192.168.0.0/16", "192.175.48.0/24", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24",
        "224.0.0.0/4", "240.0.0.0/4",
        "168.63.129.16/32",  # Azure's host agent, reachable from every machine there
    )
)  # fmt: skip
_OPEN_IPV6 = ipaddress.IPv6Network("2000::/3")  # global unicast; everything else is closed or wraps IPv4
_CLOSED_IPV6 = tuple(
    ipaddress.IPv6Network(network)
    for network in (
        "2001::/23",  # protocol assignments, Teredo among them
        "2001:db8::/32",
        "2620:4f:8000::/48",
        "3fff::/20",
    )
)
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_ISATAP = re.compile(r"0[02]005efe[0-9a-f]{8}")


def check_address(address: IPAddress, allow_private: bool) -> None:
    """Raise FetchError("blocked_address") unless a connection to `address` is allowed.

    With `allow_private` every address is: the caller has said that the site is one of their own.
    """
    if allow_private:
        return
    for inner in (address, *_unwrap(address)):
        if not _is_open(inner):
            raise FetchError("blocked_address", f"{inner} is not a public address")


def _is_open(address: IPAddress) -> bool:
    if isinstance(address, ipaddress.IPv4Address):
        return not any(address in network for network in _CLOSED_IPV4)
    if address in _NAT64 or address.ipv4_mapped is not None:
        return True  # the wrapped address decides
    return address in _OPEN_IPV6 and not any(address in network for network in _CLOSED_IPV6)


def _unwrap(address: IPAddress) -> list[ipaddress.IPv4Address]:
    """IPv4 addresses that a router, a tunnel or the system would take out of an IPv6 one that may be open.

    IPv4-compatible (`::127.0.0.1`), translated (`::ffff:0:127.0.0.1`) and Teredo addresses are closed whole.
    """
    if isinstance(address, ipaddress.IPv4Address):
        return []
    found = [inner for inner in (address.ipv4_mapped, address.sixtofour) if inner is not None]
    if address in _NAT64 or _ISATAP.fullmatch(f"{int(address):032x}"[16:]):
        found.append(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
    return found
