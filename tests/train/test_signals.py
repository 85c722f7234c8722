"""Signals that are put off during a training: the first is raised at its end, a second one at once."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from capfilt.train.signals import deferred_signals


@pytest.fixture
def told() -> Iterator[list[int]]:
    """What the handler that was there before is told; like the command line's, it raises."""
    numbers: list[int] = []

    def handle(number: int, _frame: object) -> None:
        numbers.append(number)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, handle)
    yield numbers
    signal.signal(signal.SIGINT, before)


def test_one_is_noted_and_raised_at_the_end(told: list[int]) -> None:
    ended = False
    with pytest.raises(KeyboardInterrupt), deferred_signals() as caught:  # noqa: PT012
        os.kill(os.getpid(), signal.SIGINT)
        assert caught == [signal.SIGINT]
        ended = True
    assert ended
    assert told == []


def test_a_second_one_is_not_put_off_and_the_handler_before_hears_of_both(told: list[int]) -> None:
    ended = False
    with pytest.raises(KeyboardInterrupt), deferred_signals():  # noqa: PT012
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        ended = True
    assert not ended
    assert told == [signal.SIGINT, signal.SIGINT]
