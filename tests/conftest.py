"""What tests of several folders share."""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.object_stores import BUCKET, forget_clients, make_bucket, serve_s3, use_server

_numbers = itertools.count()
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as scripts start what runs in their background
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def s3_port() -> Iterator[int]:
    """Of an S3 server."""
    with serve_s3() as port:
        yield port


@pytest.fixture
def address(s3_port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Of a run on that server that is not there yet; this process and those that it starts are the server's clients."""
    use_server(s3_port, tmp_path / "cache", monkeypatch)
    make_bucket()
    yield f"s3://{BUCKET}/run-{os.getpid()}-{next(_numbers)}"
    forget_clients()
