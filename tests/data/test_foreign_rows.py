"""Rows that img2dataset could not download: its own messages, and its tables."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from capfilt.data.foreign_rows import UNREADABLE, failed_rows, reason_of_message

DOWNLOAD, RESIZE = "failed_to_download", "failed_to_resize"


@pytest.mark.parametrize(
    ("status", "message", "reason"),
    [
        # as img2dataset 1.47 wrote them, of the miniature world's servers and of addresses that lead nowhere
        (DOWNLOAD, "HTTP Error 404: Not Found", "not_found"),
        (DOWNLOAD, "HTTP Error 410: Gone", "gone"),
        (DOWNLOAD, "HTTP Error 403: Forbidden", "forbidden"),
        (DOWNLOAD, "HTTP Error 429: Too Many Requests", "too_many_requests"),
        (DOWNLOAD, "HTTP Error 500: Internal Server Error", "server_error"),
        (
            DOWNLOAD,
            "HTTP Error 302: The HTTP server returned a redirect error that would lead to an infinite loop.\nThe last "
            "30x error message was:\nFound",
            "too_many_redirects",
        ),
        (DOWNLOAD, "<urlopen error [Errno -2] Name or service not known>", "dns_error"),
        (DOWNLOAD, "<urlopen error [Errno 111] Connection refused>", "connection_error"),
        (DOWNLOAD, "<urlopen error [SSL: WRONG_VERSION_NUMBER] wrong version number (_ssl.c:1006)>", "tls_error"),
        (DOWNLOAD, "<urlopen error no host given>", "bad_url"),
        (DOWNLOAD, "URL can't contain control characters. 'a b' (found at least ' ')", "bad_url"),
        (DOWNLOAD, "Invalid IPv6 URL", "bad_url"),
        (DOWNLOAD, "unknown url type: 'notaurl'", "bad_scheme"),
        (DOWNLOAD, "timed out", "timeout"),
        (DOWNLOAD, "Use of image disallowed by X-Robots-Tag directive", "disallowed"),
        (RESIZE, "Image decoding error", "bad_image"),
        (
            RESIZE,
            "OpenCV(4.14.0) /io/opencv/modules/imgcodecs/src/loadsave.cpp:1310: error: (-215:Assertion failed) "
            "!buf.empty() in function 'imdecode_'\n",
            "empty_body",
        ),
        (RESIZE, "image too small", "image_too_small"),
        # the answer says more than its words do
        (DOWNLOAD, "HTTP Error 504: Gateway Timeout", "server_error"),
        (DOWNLOAD, "HTTP Error 525: SSL handshake failed", "server_error"),
        (DOWNLOAD, "something else", DOWNLOAD),
        (RESIZE, None, RESIZE),
    ],
)
def test_messages_have_reasons(status: str, message: str | None, reason: str) -> None:
    assert reason_of_message(status, message) == reason


def test_rows_without_an_image_are_found(tmp_path: Path) -> None:
    rows = {
        "url": ["http://a/1", "http://b/2", None, "http://c/4"],
        "status": ["success", DOWNLOAD, RESIZE, "\x1b[31mnonsense"],
        "error_message": [None, "timed out", "Image decoding error", None],
        "width": [1, None, None, None],
    }
    pq.write_table(pa.table(rows), tmp_path / "a.parquet")
    (found,) = failed_rows(tmp_path / "a.parquet")
    assert found.to_pylist() == [
        {"url": "http://b/2", "status": DOWNLOAD, "reason": "timeout"},
        {"url": None, "status": RESIZE, "reason": "bad_image"},
        {"url": "http://c/4", "status": DOWNLOAD, "reason": DOWNLOAD},
    ]


def test_a_table_of_our_own_says_the_reason(tmp_path: Path) -> None:
    rows = {
        "url": ["http://a/1", "http://b/2", "http://c/3"], "status": [DOWNLOAD, DOWNLOAD, "success"],
        "error_message": ["gone", "timed out", None], "reason": ["not_found", "\x1b[31mnonsense", None],
    }  # fmt: skip
    pq.write_table(pa.table(rows), tmp_path / "a.parquet")
    (found,) = failed_rows(tmp_path / "a.parquet")
    assert found["reason"].to_pylist() == ["not_found", "timeout"]


def test_other_tables_have_none_and_a_cut_one_is_said(tmp_path: Path) -> None:
    pq.write_table(pa.table({"url": ["http://a/1"], "text": ["x"]}), tmp_path / "other.parquet")
    assert list(failed_rows(tmp_path / "other.parquet")) == []
    whole = (tmp_path / "other.parquet").read_bytes()
    (tmp_path / "cut.parquet").write_bytes(whole[:-9])
    (cut,) = failed_rows(tmp_path / "cut.parquet")
    assert [row["reason"] for row in cut.to_pylist()] == [UNREADABLE]
