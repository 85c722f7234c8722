"""Ctrl-C and SIGTERM: the first ends a command in order, the second ends it at once.

In order: what is under way is voided, or saved by a training, and the workers end. At once: the process is gone in the
middle of whatever it did, as after SIGKILL; the next command on the run tidies up, and workers end with their parent.

An import is finished first: extension modules (numpy's, seen with 2.4) drop an exception that comes while they start,
and the command would go on as if nothing had been said; torch's end the process by SIGABRT. A long import is not waited
for: the process ends at once.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143
CODES = {signal.SIGINT: EXIT_INTERRUPTED, signal.SIGTERM: EXIT_TERMINATED}
MESSAGES = {
    EXIT_INTERRUPTED: "Interrupted. What is done is kept; the same command goes on.",
    EXIT_TERMINATED: "Terminated. What is done is kept; the same command goes on.",
}


IMPORT_SECONDS = 0.8
"""That an import may take from the signal on; open_clip's takes seven seconds on a slow machine."""

_RETRY_SECONDS = 0.02
_undo_first: list[Callable[[], None]] = []
_raised: list[int] = []


def exit_code_of_signal() -> int | None:
    """Of the signal that was raised in this process; None where none was.

    What code in other languages makes of it may be an error of its own: safetensors, seen amid the reading of weights.
    """
    return CODES[signal.Signals(_raised[0])] if _raised else None


@contextmanager
def undone_at_once(undo: Callable[[], None]) -> Iterator[None]:
    """Until the end of this, a signal that ends the process at once calls `undo` first."""
    _undo_first.append(undo)
    try:
        yield
    finally:
        _undo_first.remove(undo)


def handle_interrupts() -> None:
    """From now on the first signal raises KeyboardInterrupt or SystemExit(143), a further one ends the process."""
    caught: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        if caught:
            _end_at_once(number, "Stopped at once. What is committed is kept; the same command goes on.")
        caught.append(number)
        end(number, frame, time.monotonic() + IMPORT_SECONDS)

    def end(number: int, frame: FrameType | None, latest: float) -> None:
        if not _is_importing(frame):
            _raised.append(number)
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(EXIT_TERMINATED)
        if time.monotonic() > latest:
            _end_at_once(number, MESSAGES[CODES[signal.Signals(number)]])
        signal.signal(signal.SIGALRM, lambda _, later: end(number, later, latest))
        signal.setitimer(signal.ITIMER_REAL, _RETRY_SECONDS)

    for number in CODES:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as a shell has it for what it runs in the background
            signal.signal(number, handle)


def _end_at_once(number: int, said: str) -> NoReturn:
    for undo in _undo_first:
        undo()
    os.write(2, f"\ncapfilt: {said}\n".encode())  # not by sys.stderr: the signal may have come while it was writing
    os._exit(CODES[signal.Signals(number)])


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False
