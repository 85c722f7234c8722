"""Files that are not UTF-8 everywhere, for a reader that knows nothing else.

pyarrow's CSV reader gives up a whole table for a byte in the header, and loses a row without a word where the number of
its fields is wrong and a byte of it is no UTF-8. So it is given marks in place of such bytes, and the marks are taken
out of the values again.

In: a file. Out: what it holds, read piece by piece, with MARK for every byte that is no UTF-8.
"""

from __future__ import annotations

import codecs
import io
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

MARK = "\U0010ffff"
"""A code point that no text has: Unicode reserves it for uses inside programs."""

_CHUNK_BYTES = 1 << 20
_NO_UTF8 = b"\xff"
_HANDLER = "capfilt.mark"

codecs.register_error(_HANDLER, lambda error: (MARK * (error.end - error.start), error.end))  # type: ignore[attr-defined]


class MarkedUtf8(io.RawIOBase):
    """The file as a stream of valid UTF-8."""

    def __init__(self, path: Path) -> None:
        self._file = open(path, "rb")  # noqa: SIM115 - closed with the stream
        self._decoder = codecs.getincrementaldecoder("utf-8")(_HANDLER)
        self._left = b""

    def readable(self) -> bool:
        """It is."""
        return True

    def read(self, size: int = -1) -> bytes:
        """`size` bytes, fewer at the end."""
        while size < 0 or len(self._left) < size:
            chunk = self._file.read(max(size, _CHUNK_BYTES))
            self._left += self._decoder.decode(chunk, final=not chunk).encode("utf-8")
            if not chunk:
                break
        end = len(self._left) if size < 0 else size
        data, self._left = self._left[:end], self._left[end:]
        return data

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        super().close()


def unmark(batch: pa.RecordBatch) -> pa.RecordBatch:
    """The batch with bytes that are no UTF-8 where MARK stands in its binary columns."""
    mark = MARK.encode()
    columns = [
        pc.replace_substring(column, mark, _NO_UTF8)
        if pa.types.is_binary(column.type) and pc.any(pc.match_substring(column, mark)).as_py()
        else column
        for column in batch.columns
    ]
    return pa.RecordBatch.from_arrays(columns, schema=batch.schema)
