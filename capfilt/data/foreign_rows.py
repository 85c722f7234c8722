"""Rows of a download by img2dataset that failed: the table that it writes beside each tar.

In: its Parquet file, or one of its error messages. Out: rows with status and reason, in this project's words where it
has one for the message. What img2dataset can say is what it, urllib and OpenCV say (img2dataset 1.47). A table of this
project's has the reason itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from capfilt.data.bounded_parquet import BoundedParquet
from capfilt.data.reasons import REASON_SENTENCES, reason_of_status
from capfilt.data.schemas import SCHEMAS, SUCCESS

COLUMNS = ["url", "status", "error_message"]
"""That make a Parquet file one of img2dataset's."""
_REASON = "reason"
UNREADABLE = "unreadable_table"
"""Reason of the one row that stands for a table that cannot be read, as one that is still being written."""

_BATCH_ROWS = 10_000
_HTTP = re.compile(r"HTTP Error (\d{3})")
_SAID = tuple(
    (re.compile(pattern, re.IGNORECASE), reason)
    for pattern, reason in (
        ("unknown url type", "bad_scheme"),
        ("no host given|control characters|invalid ipv6 url|nonnumeric port|label (empty or )?too long", "bad_url"),
        ("x-robots-tag", "disallowed"),
        ("name or service|name resolution|no address associated|nodename nor servname", "dns_error"),
        ("timed out|timeout", "timeout"),
        ("ssl|certificate", "tls_error"),
        ("refused|reset by peer|remote end closed|incompleteread|unreachable|no route|broken pipe", "connection_error"),
        (r"badstatusline|got more than \d+ (bytes|headers)", "bad_response"),
        (r"!buf\.empty", "empty_body"),
        ("image decoding error", "bad_image"),
        ("image area too large", "too_many_pixels"),
        ("aspect ratio too large", "bad_aspect_ratio"),
        ("image too small", "image_too_small"),
        ("hash mismatch", "hash_mismatch"),
    )
)


def reason_of_message(status: str, message: str | None) -> str:
    """Reason of a row with img2dataset's status and error message; the status itself for a message not known here."""
    said = message or ""
    if answered := _HTTP.match(said):
        return "too_many_redirects" if "infinite loop" in said else reason_of_status(int(answered.group(1)))
    return next((reason for pattern, reason in _SAID if pattern.search(said)), status)


def failed_rows(table: Path) -> Iterator[pa.Table]:
    """The rows of `table` that have no image, as `url`, `status` and `reason`; none of a table that is not
    img2dataset's, and one with the reason UNREADABLE where it cannot be read.
    """
    try:
        with BoundedParquet(table) as parquet:
            if set(COLUMNS) <= set(parquet.schema.names):
                named = [*COLUMNS, *({_REASON} & set(parquet.schema.names))]
                for batch in parquet.batches(_BATCH_ROWS, named):
                    yield _failed(pa.table(batch))
    except (pa.ArrowException, ValueError):
        yield _rows([{"url": None, "status": "failed_to_read", "reason": UNREADABLE}])


def _failed(rows: pa.Table) -> pa.Table:
    texts = pa.table({name: rows[name].cast(pa.string()) for name in rows.column_names})
    failed = texts.filter(pc.not_equal(pc.fill_null(texts["status"], "failed_to_download"), SUCCESS))
    return _rows([
        {"url": row["url"], "status": status, "reason": _known(row.get(_REASON)) or reason_of_message(status, said)}
        for row in failed.to_pylist()
        for said in [row["error_message"]]
        for status in [_status(row["status"])]
    ])  # fmt: skip


def _known(reason: str | None) -> str | None:
    return reason if reason in REASON_SENTENCES else None


def _status(said: str | None) -> str:
    return said if said in ("failed_to_download", "failed_to_resize") else "failed_to_download"


def _rows(found: list[dict[str, str | None]]) -> pa.Table:
    return pa.Table.from_pylist(
        found, pa.schema([SCHEMAS["shards"].field(name) for name in ("url", "status", "reason")])
    )
