"""A web site that counts who is there at a time and answers as it is told to, and downloads from it."""

from __future__ import annotations

import http.server
import io
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from capfilt.curation.download import download
from capfilt.data.rundir import RunDir
from capfilt.settings import DownloadSettings
from tests import factories
from tests.curation.downloads import rows_of

SETTINGS = DownloadSettings(
    allow_private_addresses=True, num_processes=1, num_threads=16, timeout_seconds=5.0, connections_per_host=3
)


@dataclass
class BusySite:
    """Counts who is there at a time, and answers as it is told to."""

    robots: tuple[int, str] = (404, "")
    answer_seconds: float = 0.03
    busy: dict[str, list[str]] = field(default_factory=dict)
    """Path → `Retry-After` of the first answers."""
    asked: list[tuple[float, str]] = field(default_factory=list)
    most_at_a_time: int = 0
    _now: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __enter__(self) -> BusySite:
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


def reasons_of(urls: list[str], tmp_path: Path, settings: DownloadSettings) -> list[str | None]:
    table = tmp_path / "t.txt"
    table.write_text("\n".join(urls))
    run = RunDir.create(tmp_path / "run")
    download(str(table), run, settings)
    return [row["reason"] for row in rows_of(run)]
