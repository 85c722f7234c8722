"""Progress: lines, bars, figures."""

from __future__ import annotations

import io

import pytest

from capfilt.progress import (
    NullProgress,
    Progress,
    StreamProgress,
    bar,
    format_field,
    format_rate,
    format_seconds,
)


def work(progress: Progress) -> None:
    progress.start("caption", 4, "image")
    progress.advance(1, already=True)
    for kept in range(3):
        progress.advance(kept=kept)
    progress.finish()


def test_plain_lines_where_there_is_no_terminal() -> None:
    stream = io.StringIO()
    work(StreamProgress(stream))
    (line,) = stream.getvalue().splitlines()
    assert "4/4 image 100%" in line
    assert "kept 2" in line
    assert "\x1b" not in line


def test_one_line_is_redrawn_on_a_terminal() -> None:
    stream = io.StringIO()
    work(StreamProgress(stream, live=True))
    text = stream.getvalue()
    assert text.count("\n") == 1
    assert text.count("\r\x1b[2K") >= 2
    assert all(len(part) < 110 for part in text.split("\r"))


def test_work_of_an_earlier_command_is_no_part_of_the_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("capfilt.progress.time.monotonic", lambda: now[0])
    stream = io.StringIO()
    progress = StreamProgress(stream)
    progress.start("rank", 1000, "image")
    progress.advance(900, already=True)
    now[0] += 60.0  # loading a model
    progress.advance(1)
    assert "901/1,000" in stream.getvalue()
    assert "/s" not in stream.getvalue()
    now[0] += 19.0
    progress.advance(19)
    assert "920/1,000" in stream.getvalue()
    assert "1.00 image/s" in stream.getvalue()
    assert "1:20 left" in stream.getvalue()
    progress.finish()
    assert "in 1:19" in stream.getvalue()


def test_null_progress_and_work_without_a_start_are_silent() -> None:
    work(NullProgress())
    stream = io.StringIO()
    progress = StreamProgress(stream, live=True)
    progress.advance()
    progress.finish()
    assert stream.getvalue() == ""


def test_unknown_total() -> None:
    stream = io.StringIO()
    progress = StreamProgress(stream)
    progress.start("import", None, "sample")
    progress.advance(3)
    progress.finish()
    assert "3 sample" in stream.getvalue()
    assert "%" not in stream.getvalue()


@pytest.mark.parametrize(
    ("share", "expected"),
    [(0, "····"), (1, "████"), (0.5, "██··"), (0.5625, "██▎·"), (-1, "····"), (2, "████")],
)
def test_bar(share: float, expected: str) -> None:
    assert bar(share, 4) == expected
    assert len(bar(share, 4, plain=True)) == 4
    assert bar(share, 4, plain=True).isascii()


def test_figures() -> None:
    assert [format_seconds(s) for s in (0.04, 9.9, 61, 3723)] == ["0.0 s", "9.9 s", "1:01", "1:02:03"]
    assert [format_rate(r) for r in (0.214, 34.56, 1234.5)] == ["0.21", "34.6", "1,234"]
    assert [format_field(v) for v in (1234, 0.12345, True, "x")] == ["1,234", "0.1235", "yes", "x"]
