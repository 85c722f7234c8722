"""The guarded fetch: one URL in, the bytes of its body out, or a reason from a closed list.

In: a URL that nobody vouches for. Out: the body, or `FetchError(reason, detail)`.

- http and https only; ports, host and address are checked at every hop, redirects included, and the
  connection goes to the very IP address that was checked (a name that resolves anew cannot move it).
- One deadline over the whole exchange, name resolution and redirects included: every wait on the socket gets
  what is left of it, so that a server that drips bytes cannot hold it open.
- The body is counted while it streams, the headers too. Proxies of the environment are not used.
- `X-Robots-Tag` is read in full, and obeyed, robots.txt where the settings ask for it; the user agent names the tool.
"""

from __future__ import annotations

import http.client
import io
import ipaddress
import re
import socket
import ssl
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass
from email.utils import parsedate_to_datetime

from capfilt import __version__
from capfilt.curation.addresses import FetchError, IPAddress, Target, check_address, parse_redirect, parse_url
from capfilt.curation.robots import MAX_BYTES as MAX_ROBOTS_BYTES
from capfilt.curation.robots import RobotsCheck, RobotsRules
from capfilt.data.reasons import reason_of_status
from capfilt.settings import DownloadSettings

USER_AGENT_TOKEN = "capfilt"
USER_AGENT = f"Mozilla/5.0 (compatible; {USER_AGENT_TOKEN}/{__version__}; image-text dataset curation)"

DISALLOWED_DIRECTIVES = frozenset({"noai", "noimageai", "noindex", "noimageindex", "none", "noml"})
"""img2dataset's default list and what it misses: `none` (noindex, nofollow) and `noml` (machine learning)."""

_CHUNK_BYTES = 1 << 16
_MAX_HEADER_BYTES = 1 << 18
_MAX_ADDRESSES_TRIED = 3
_RESOLVED_SECONDS = 60.0
_MAX_RESOLVED_HOSTS = 4096

Resolve = Callable[[str, int], Sequence[str]]
"""(host, port) → IP addresses as text, best first. Raises OSError."""

Check = Callable[[IPAddress, bool], None]
"""(address, whether private ones are allowed). Raises FetchError for an address that must not be reached."""


class Deadline:
    """A moment in time until which an exchange may last."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._end = time.monotonic() + seconds

    def remaining(self) -> float:
        """Seconds left. Raises FetchError("timeout") when there are none."""
        left = self._end - time.monotonic()
        if left <= 0:
            raise FetchError("timeout", f"not done after {self.seconds:g} s")
        return left


class _Wire(io.RawIOBase):
    """What a server sends, read under the deadline and counted."""

    def __init__(self, connection: socket.socket, deadline: Deadline) -> None:
        self._connection = connection
        self._deadline = deadline
        self.bytes_left = _MAX_HEADER_BYTES

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        if self.bytes_left <= 0:
            raise FetchError("bad_response", f"headers above {_MAX_HEADER_BYTES} bytes, or a wasteful encoding")
        self._connection.settimeout(self._deadline.remaining())
        count = self._connection.recv_into(buffer)
        self.bytes_left -= count
        return count


class _PinnedSocket:
    """A connected socket as http.client uses one; every wait ends with the deadline."""

    def __init__(self, connection: socket.socket, deadline: Deadline) -> None:
        self.connection = connection
        self.wire = _Wire(connection, deadline)
        self._deadline = deadline

    def sendall(self, data: bytes) -> None:
        self.connection.settimeout(self._deadline.remaining())
        self.connection.sendall(data)

    def makefile(self, _mode: str) -> io.BufferedReader:
        return io.BufferedReader(self.wire, _CHUNK_BYTES)

    def close(self) -> None:
        """Nothing: http.client closes as soon as it has the headers; the fetch closes after the body."""


@dataclass(slots=True)
class _Resolved:
    addresses: Future[Sequence[str]]
    until: float


class Resolver:
    """Names to IP addresses, in threads of their own: the system's resolver knows no deadline."""

    def __init__(self, resolve: Resolve) -> None:
        self._resolve = resolve
        self._known: dict[tuple[str, int], _Resolved] = {}
        self._lock = threading.Lock()

    def resolve(self, host: str, port: int, deadline: Deadline) -> list[IPAddress]:
        """IP addresses of `host`. Raises FetchError: dns_error or timeout."""
        try:
            return [ipaddress.ip_address(host)]
        except ValueError:
            pass
        try:
            found = self._look_up(host, port).result(timeout=deadline.remaining())
            return [ipaddress.ip_address(text) for text in found]
        except FutureTimeoutError:
            raise FetchError("timeout", f"no answer about the name {host}") from None
        except (OSError, UnicodeError, ValueError) as error:
            raise FetchError("dns_error", f"{host}: {getattr(error, 'strerror', None) or error}") from None

    def _look_up(self, host: str, port: int) -> Future[Sequence[str]]:
        now = time.monotonic()
        with self._lock:
            known = self._known.get((host, port))
            if known is not None and known.until > now:
                return known.addresses
            if len(self._known) >= _MAX_RESOLVED_HOSTS:
                self._known.clear()
            future: Future[Sequence[str]] = Future()
            self._known[(host, port)] = _Resolved(future, now + _RESOLVED_SECONDS)
        # daemon threads: one that hangs in the system's resolver must not hold up the end of the process
        threading.Thread(target=self._run, args=(host, port, future), daemon=True).start()
        return future

    def _run(self, host: str, port: int, future: Future[Sequence[str]]) -> None:
        try:
            future.set_result(self._resolve(host, port))
        except Exception as error:  # whatever the resolver raises belongs to the one who asked
            with self._lock:
                self._known.pop((host, port), None)
            future.set_exception(error)


def resolve_host(host: str, port: int) -> list[str]:
    """Ask the system's resolver. Raises OSError (socket.gaierror) when there is no address."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


class Fetcher:
    """Fetches URLs under the limits of the settings; may be used from many threads at once."""

    def __init__(
        self, settings: DownloadSettings, resolve: Resolve = resolve_host, check: Check = check_address
    ) -> None:
        self._settings = settings
        self._check = check
        self._resolver = Resolver(resolve)
        self._ports = None if settings.allow_private_addresses else settings.ports
        self._tls = _build_tls_context()
        self._robots = RobotsRules(USER_AGENT_TOKEN) if settings.robots_txt else None

    def fetch(self, url: str) -> bytes:
        """Body of `url`: one try, all hops under one deadline. Raises FetchError."""
        deadline = Deadline(self._settings.timeout_seconds)
        target = parse_url(url, self._ports)
        if self._robots is None:
            return self._follow(target, deadline)
        return self._follow(target, deadline, self._robots.check)

    def _follow(
        self, target: Target, deadline: Deadline, check: RobotsCheck | None = None, *, is_robots: bool = False
    ) -> bytes:
        """Body of the last of the redirects; `check` is asked before every hop. `is_robots`: it is a robots.txt."""
        seen = {target.url}
        for _ in range(self._settings.max_redirects + 1):
            if check is not None:
                check(target, deadline.remaining(), lambda robots: self._follow(robots, deadline, is_robots=True))
            answer = self._hop(target, deadline, is_robots)
            if isinstance(answer, bytes):
                return answer
            target = parse_redirect(target, answer, self._ports)
            if target.url in seen:
                raise FetchError("too_many_redirects", "the redirects go in a circle")
            seen.add(target.url)
        raise FetchError("too_many_redirects", f"more than {self._settings.max_redirects}")

    def _hop(self, target: Target, deadline: Deadline, is_robots: bool) -> bytes | str:
        """One request. Returns the body, or where the server redirects to."""
        pinned: _PinnedSocket | None = None
        try:
            pinned = _PinnedSocket(self._connect(target, deadline), deadline)
            request = http.client.HTTPConnection(target.host, target.port)
            request.sock = pinned  # type: ignore[assignment]  # so that it opens none of its own
            request.request("GET", target.request_path, headers=_request_headers(target))
            response = request.getresponse()
            return self._read_response(response, pinned.wire, is_robots)
        except TimeoutError:
            raise FetchError("timeout", f"not done after {deadline.seconds:g} s") from None
        except ssl.SSLError as error:
            raise FetchError("tls_error", f"{target.host}: {error.reason or error}") from None
        except OSError as error:
            raise FetchError("connection_error", f"{target.host}: {error.strerror or type(error).__name__}") from None
        except http.client.IncompleteRead:
            raise FetchError("connection_error", f"{target.host}: the body broke off") from None
        except (http.client.HTTPException, ValueError) as error:
            raise FetchError("bad_response", f"not valid HTTP: {type(error).__name__}") from None
        finally:
            if pinned is not None:
                pinned.connection.close()

    def _connect(self, target: Target, deadline: Deadline) -> socket.socket:
        """A socket connected to an address of the host that passed the check, TLS included."""
        refused: Exception | None = None
        allowed: list[IPAddress] = []
        for address in self._resolver.resolve(target.host, target.port, deadline):
            try:
                self._check(address, self._settings.allow_private_addresses)
                allowed.append(address)
            except FetchError as failure:
                refused = failure
        for index, address in enumerate(tried := allowed[:_MAX_ADDRESSES_TRIED]):
            try:
                # a silent address must leave time for the next one
                connection = socket.create_connection(
                    (str(address), target.port), timeout=deadline.remaining() / (len(tried) - index)
                )
            except OSError as error:
                refused = error
                continue
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return self._wrap_tls(connection, target, deadline) if target.scheme == "https" else connection
        raise refused or FetchError("dns_error", f"{target.host} has no address")

    def _wrap_tls(self, connection: socket.socket, target: Target, deadline: Deadline) -> socket.socket:
        try:
            connection.settimeout(deadline.remaining())
            return self._tls.wrap_socket(connection, server_hostname=target.host.rstrip("."))
        except BaseException:
            connection.close()
            raise

    def _read_response(self, response: http.client.HTTPResponse, wire: _Wire, is_robots: bool) -> bytes | str:
        forbidden = find_disallowed(response.headers.get_all("X-Robots-Tag") or [])
        if forbidden is not None and response.status < 400 and not is_robots:
            raise FetchError("disallowed", f"X-Robots-Tag: {forbidden}")
        if response.status in (301, 302, 303, 307, 308):
            location = response.headers.get("Location")
            if not location:
                raise FetchError("bad_response", f"status {response.status} without a Location")
            return _decode_header(location)
        if not 200 <= response.status < 300:
            wait = _retry_after(response) if response.status in (429, 503) else None
            raise FetchError(reason_of_status(response.status), f"status {response.status}", retry_after_seconds=wait)
        # chunked encoding may cost more than the body; a server that sends chunks of one byte ends here
        wire.bytes_left = 2 * self._settings.max_body_bytes + _MAX_HEADER_BYTES
        body = self._read_body(response, is_robots)
        if not body:
            raise FetchError("empty_body", f"status {response.status}, no body")
        return body

    def _read_body(self, response: http.client.HTTPResponse, is_robots: bool) -> bytes:
        """The body, decompressed; of a robots.txt its beginning."""
        limit = self._settings.max_body_bytes
        expected = response.length
        if expected is not None and expected > limit and not is_robots:
            raise FetchError("body_too_large", f"{expected} bytes announced; at most {limit}")
        inflate = _build_inflater(response.headers.get("Content-Encoding", ""))
        chunks: list[bytes] = []
        received = total = 0
        while chunk := response.read(_CHUNK_BYTES):
            received += len(chunk)
            if inflate is not None:
                chunk = inflate(chunk, limit + 1 - total)
            chunks.append(chunk)
            total += len(chunk)
            if is_robots and total >= min(MAX_ROBOTS_BYTES, limit):
                return b"".join(chunks)
            if total > limit or received > limit:
                raise FetchError("body_too_large", f"more than {limit} bytes")
        if expected is not None and received < expected:
            raise FetchError("connection_error", f"the body ended after {received} of {expected} bytes")
        return b"".join(chunks)


def find_disallowed(values: Iterable[str]) -> str | None:
    """The first directive of `X-Robots-Tag` header values that forbids the use of an image by this tool.

    A value is a list of directives; `name:` before one addresses it, and those after it, to the robot of that
    name. Directives with a value of their own (`unavailable_after: 25 Jun 2030 15:00:00 GMT`) are no names.
    """
    for value in values:
        robot: str | None = None
        for part in value.lower().split(","):
            name, colon, rest = part.partition(":")
            if colon and name.strip() not in _VALUED_DIRECTIVES:
                robot, part = name.strip(), rest
            if (robot is None or robot in _ROBOT_NAMES) and part.strip() in DISALLOWED_DIRECTIVES:
                return part.strip()
    return None


_ROBOT_NAMES = frozenset({"*", USER_AGENT_TOKEN, "img2dataset"})
_VALUED_DIRECTIVES = frozenset({"unavailable_after", "max-snippet", "max-image-preview", "max-video-preview"})


def _request_headers(target: Target) -> dict[str, str]:
    return {
        "Host": target.host_header,
        "User-Agent": USER_AGENT,
        "Accept": "image/*,*/*;q=0.5",
        "Accept-Encoding": "identity",
        "Connection": "close",
    }


def _retry_after(response: http.client.HTTPResponse) -> float:
    """Seconds of a `Retry-After` header, given as such or as a date (RFC 9110, 10.2.3); 0 where there is none."""
    value = (response.headers.get("Retry-After") or "").strip()
    if re.fullmatch(r"[0-9]{1,9}", value):
        return float(value)
    try:
        return max(parsedate_to_datetime(value).timestamp() - time.time(), 0.0)
    except (ValueError, TypeError, OverflowError):
        return 0.0


def _decode_header(value: str) -> str:
    """A header as the server meant it: http.client reads latin-1, servers send UTF-8."""
    try:
        return value.encode("latin-1").decode("utf-8")
    except UnicodeError:
        return value


def _build_inflater(encoding: str) -> Callable[[bytes, int], bytes] | None:
    """A decoder (chunk, bytes wanted at most) for servers that compress although not asked to."""
    encoding = encoding.strip().lower()
    if encoding in ("", "identity"):
        return None
    if encoding not in ("gzip", "x-gzip", "deflate"):
        raise FetchError("bad_response", f"content encoding {re.sub(r'[^a-z0-9, -]', '?', encoding)}")
    decoder = zlib.decompressobj(wbits=47 if encoding != "deflate" else 15)

    def inflate(chunk: bytes, max_bytes: int) -> bytes:
        try:
            return decoder.decompress(chunk, max_bytes)
        except zlib.error:
            raise FetchError("bad_response", "the compressed body is damaged") from None

    return inflate


def _build_tls_context() -> ssl.SSLContext:
    context = ssl.create_default_context()
    if not context.cert_store_stats()["x509_ca"]:
        # a Python that was built elsewhere looks for the system's certificates in the wrong place
        import certifi

        context.load_verify_locations(certifi.where())
    return context
