"""SIGINT and SIGTERM during a training: what is under way ends and is saved first."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any


@contextmanager
def deferred_signals() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM, so that what is under way ends and is saved, then raises; main thread only.

    A second signal leaves at once, without saving: the handler that was there before is told of both.
    """
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return

    def note(number: int, frame: FrameType | None) -> None:
        caught.append(number)
        if len(caught) > 1:
            if callable(before := old[number]):
                with suppress(KeyboardInterrupt, SystemExit):
                    before(caught[0], frame)
                before(number, frame)
            raise_signal(number)

    old: dict[int, Any] = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
    if caught:  # none of the steps after it raised it: it came while the finished model was written
        raise_signal(caught[0])


def raise_signal(number: int) -> None:
    """KeyboardInterrupt for SIGINT (exit code 130), SystemExit(143) for SIGTERM."""
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(143)
