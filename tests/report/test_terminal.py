"""The terminal: keys told from answers, answers from keys, and its state given back whatever comes."""

from __future__ import annotations

import os
import signal
import termios
import time
from collections.abc import Iterator

import pytest

from capfilt.report.terminal import END, Answers, Cell, Terminal, is_a_persons
from tests.report.terminals import Session


@pytest.fixture
def ends() -> Iterator[tuple[int, Terminal]]:
    """Of a pseudo-terminal: a person's end, and the program's."""
    master, slave = os.openpty()
    with os.fdopen(slave, "w") as screen, Terminal(slave, screen) as terminal:
        yield master, terminal
    os.close(master)


def keys(terminal: Terminal, number: int) -> list[str | None]:
    return [terminal.read_key(1) for _ in range(number)]


def test_keys_by_name(ends: tuple[int, Terminal]) -> None:
    master, terminal = ends
    os.write(master, b"n \x1b[C\x1bOD\x1b[6~\x1b[1;5C\xc3\xa9q\r")
    assert keys(terminal, 9) == ["n", " ", "right", "left", "page down", None, None, None, "q"]
    assert terminal.read_key(1) == "enter"
    assert terminal.read_key(0) is None
    os.write(master, b"\x1b")
    assert terminal.read_key(1) is None, "the key Escape is none of ours, and is not waited upon"
    os.write(master, b"\x04")
    assert terminal.read_key(1) == END


def test_a_sequence_that_comes_in_pieces_is_one_key(ends: tuple[int, Terminal]) -> None:
    master, terminal = ends
    os.write(master, b"\x1b[")
    pid = os.fork()
    if pid == 0:
        time.sleep(0.02)
        os.write(master, b"B")
        os._exit(0)
    assert terminal.read_key(1) == "down"
    os.waitpid(pid, 0)


@pytest.mark.parametrize(
    ("said", "expected", "typed"),
    [
        (b"\x1b[?62;4;22c", Answers(has_sixel=True), []),
        (b"\x1b[?64;14;44c", Answers(), []),
        (
            b"\x1bP>|foot(1.16.2)\x1b\\\x1b[6;21;9t\x1b[?62;4c",
            Answers(name="foot(1.16.2)", has_sixel=True, cell=Cell(9, 21)), [],
        ),
        (b"np\x1b[6;0;0t\x1b[?1;2cg", Answers(cell=Cell(1, 1)), ["n", "p", "g"]),
        (b"", Answers(), []),
        (b"x" * 5000, Answers(), ["x"] * 100),
        (b"\x1bP>|\x1b]0;evil\x07\x1b[?1c", Answers(), []),
    ],
)  # fmt: skip
def test_answers(ends: tuple[int, Terminal], said: bytes, expected: Answers, typed: list[str]) -> None:
    master, terminal = ends
    os.set_blocking(master, False)
    os.write(master, said[:4000])
    started = time.monotonic()
    assert terminal.ask(0.3) == expected
    assert time.monotonic() - started < 1
    assert keys(terminal, len(typed)) == typed


def test_a_person_has_both_ends(ends: tuple[int, Terminal]) -> None:
    _, slave = os.openpty()
    with os.fdopen(slave, "w") as screen, open(os.devnull) as nobody:
        assert not is_a_persons(screen, nobody, {"TERM": "xterm"})
        assert not is_a_persons(nobody, screen, {"TERM": "xterm"})
        assert not is_a_persons(screen, screen, {"TERM": "dumb"})
        assert not is_a_persons(screen, screen, {"TERM": "xterm"}), "another process group is in the foreground"


SCRIPT = """
import sys, time
from capfilt.cli.interrupts import handle_interrupts, undone_at_once
from capfilt.report.terminal import Terminal
handle_interrupts()
terminal = Terminal(0, sys.stdout)
with undone_at_once(terminal.give_back), terminal:
    terminal.open_own_screen()
    try:
        terminal.write("READY")
        time.sleep(60)
    finally:
        terminal.write("ENDING")
        time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_gives_it_back_too(number: signal.Signals) -> None:
    with Session(program=("-c", SCRIPT)) as session:
        session.wait_for("READY")
        assert termios.tcgetattr(session.slave) != session.before
        session.process.send_signal(number)
        session.wait_for("ENDING")
        session.process.send_signal(number)
        assert session.end() in (130, 143)
        assert termios.tcgetattr(session.slave) == session.before
        assert "\x1b[?25h\x1b[?1049l" in session.text


def test_an_answer_that_comes_too_late_is_not_left_to_the_shell() -> None:
    script = (
        "import sys, time; from capfilt.report.terminal import Terminal\n"
        "with Terminal(0, sys.stdout) as terminal:\n"
        "    terminal.ask(0.1); terminal.write('READY'); time.sleep(1)"
    )
    with Session(program=("-c", script)) as session:
        session.wait_for("READY")
        session.press("\x1bP>|late(1)\x1b\\\x1b[?62;4c")
        assert session.end() == 0
        assert session.left_for_the_shell() == b""


def test_a_written_picture_is_not_kept_back() -> None:
    script = (
        "import sys; from capfilt.report.terminal import Terminal\n"
        "with Terminal(0, sys.stdout) as terminal: terminal.write('x' * 300000)"
    )
    with Session(program=("-c", script)) as session:
        assert session.end() == 0
        assert session.text.count("x") == 300000
