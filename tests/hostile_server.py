"""A web server on loopback that answers as badly as it is told to."""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections.abc import Callable
from contextlib import suppress

Answer = Callable[[socket.socket, str], None]


class HostileServer:
    """Accepts connections on loopback, reads the request head and lets a function write what it likes.

    A `host` of "::" is every address of the machine, of IPv4 too; port 0 is one that is free.
    """

    def __init__(
        self,
        answers: dict[str, Answer],
        host: str = "127.0.0.1",
        tls: ssl.SSLContext | None = None,
        port: int = 0,
    ) -> None:
        self.answers = answers
        self._tls = tls
        self.requests: list[str] = []
        self.num_connections = 0
        """Accepted, whether a request came or not. Final once the `with` statement is left."""
        is_every = host == "::"
        family = socket.AF_INET6 if is_every else socket.AF_INET
        self._listener = socket.create_server((host, port), family=family, backlog=64, dualstack_ipv6=is_every)
        self._own_address = "127.0.0.1" if is_every or host == "0.0.0.0" else host
        self.port = self._listener.getsockname()[1]
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._accept, daemon=True)

    def __enter__(self) -> HostileServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        socket.create_connection((self._own_address, self.port)).close()
        self._thread.join()
        self._listener.setblocking(False)
        with suppress(BlockingIOError):  # whoever came before that connection and was not accepted yet
            while True:
                self._listener.accept()[0].close()
                self.num_connections += 1
        self.num_connections -= 1  # the one above
        self._listener.close()

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}{path}"

    def _accept(self) -> None:
        while not self._closing.is_set():
            connection, _ = self._listener.accept()
            self.num_connections += 1
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
