"""Parquet files that show any damage: page checksums, a record in the footer, and a seal over every byte.

In: a table and a record. Out: the bytes of an ordinary Parquet file whose footer metadata has
    capfilt         the record as canonical JSON
    capfilt.sha256  digest of that JSON, so that the record can be trusted without reading the file
    capfilt.seal    digest of the whole file with these 64 digits replaced by zeros
Page checksums do not cover the footer (column names, statistics, counts); the seal does. Any Parquet reader
opens the file and ignores the three entries.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from capfilt.data.bounded_parquet import BoundedParquet
from capfilt.data.paths import MAX_FILE_BYTES, AnyPath, is_local, read_bytes, read_end
from capfilt.errors import CorruptionError, UsageError
from capfilt.settings.values import did_you_mean

if TYPE_CHECKING:
    from upath import UPath

_RECORD, _RECORD_DIGEST, _SEAL = "capfilt", "capfilt.sha256", "capfilt.seal"
_ZEROS = b"0" * 64
_FOOTER_BYTES = 1 << 16
"""Read of an object at first; a footer is a few kilobytes."""
MAX_TABLE_BYTES = 2**31
"""Largest table that its rows may become in memory."""


def canonical_json(obj: Any) -> str:
    """Give the one JSON text of `obj`: keys sorted, no spaces. Raises ValueError for NaN and infinities."""
    return json.dumps(obj, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def sealed_bytes(table: pa.Table, record: Mapping[str, Any]) -> bytes:
    """Give the Parquet file of `table` with `record` in its footer; the same input gives the same bytes."""
    text = canonical_json(record)
    sink = pa.BufferOutputStream()
    schema = table.schema.remove_metadata()
    with pq.ParquetWriter(sink, schema, compression="zstd", write_page_checksum=True) as writer:
        writer.write_table(table.replace_schema_metadata(None))
        entries = {_RECORD: text, _RECORD_DIGEST: _digest(text.encode()), _SEAL: _ZEROS.decode()}
        writer.add_key_value_metadata(entries)
    data = bytearray(sink.getvalue().to_pybytes())
    position = data.rfind(_ZEROS, data.rfind(_SEAL.encode()))
    data[position : position + 64] = _digest(data).encode()
    return bytes(data)


def read_record(path: AnyPath) -> tuple[dict[str, Any], str, int]:
    """Give the record, the seal and the number of rows from the footer of `path` alone.

    Raises CorruptionError when the footer or the record is damaged, UsageError when there is no such file.
    """
    try:
        source = path if isinstance(path, Path) else pa.BufferReader(_end_with_footer(path))
        with pq.ParquetFile(source, memory_map=False) as file:
            metadata = file.metadata
    except FileNotFoundError:
        raise UsageError(f"There is no file {path}.") from None
    except (OSError, ValueError, pa.ArrowException) as error:
        raise damaged(path, f"its footer cannot be read ({error})") from None
    return *_record_and_seal(path, metadata), metadata.num_rows


def read_sealed(path: AnyPath, columns: Sequence[str] | None = None) -> tuple[pa.Table, dict[str, Any], str]:
    """Give (rows, record, seal) after checking every byte of `path`.

    Raises CorruptionError for any damage, UsageError when there is no such file or column.
    """
    try:
        data = read_bytes(path, MAX_FILE_BYTES)
    except FileNotFoundError:
        raise UsageError(f"There is no file {path}.") from None
    except ValueError as error:
        raise damaged(path, str(error)) from None
    except OSError as error:
        raise damaged(path, f"it cannot be read ({error})") from None
    if not _seal_holds(data):
        raise damaged(path, "its bytes do not match its seal")
    try:
        with BoundedParquet(pa.BufferReader(data), page_checksum_verification=True) as file:
            record, seal = _record_and_seal(path, file.metadata)
            unknown = sorted(set(columns or ()) - set(file.schema.names))
            if unknown:
                known, nearest = ", ".join(file.schema.names), did_you_mean(unknown[0], file.schema.names)
                raise UsageError(f"{path} has no column {', '.join(unknown)}; it has {known}.{nearest}")
            table = file.read(MAX_TABLE_BYTES, columns)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise damaged(path, f"it is not readable as Parquet ({error})") from None
    return table, record, seal


def damaged(path: AnyPath, what: str) -> CorruptionError:
    """The error for a stage's file that is not what was committed, with its stage and shard by name."""
    mend = (
        f"restore {path.stem}.tar and {path.name} from a copy, or remove {path.name} and repeat what made it"
        if path.parent.name == "shards"
        else "remove it and repeat the command that made it" + (f": `rm {path}`" if is_local(path) else "")
    )
    name = f"{path} ({path.parent.name} of shard {path.stem})"
    return CorruptionError(f"{name} is damaged: {what}. To mend it, {mend}.")


def _end_with_footer(path: UPath) -> bytes:
    """The end of a Parquet object from which its footer can be read."""
    end = read_end(path, _FOOTER_BYTES)
    length = int.from_bytes(end[-8:-4], "little") + 8
    return end if length <= len(end) or length > MAX_FILE_BYTES else read_end(path, length)


def _digest(data: bytes | bytearray) -> str:
    return hashlib.sha256(data).hexdigest()


def _seal_holds(data: bytes) -> bool:
    """Whether the 64 digits behind the last mention of the seal are the digest of all the rest."""
    start = data.rfind(_SEAL.encode()) + len(_SEAL)
    for position in range(start, start + 8):  # Thrift puts a few bytes before a string, no digits
        digits = data[position : position + 64]
        if len(digits) == 64 and all(digit in b"0123456789abcdef" for digit in digits):
            sealed = hashlib.sha256(memoryview(data)[:position])
            sealed.update(_ZEROS)
            sealed.update(memoryview(data)[position + 64 :])
            return sealed.hexdigest().encode() == digits
    return False


def _record_and_seal(path: AnyPath, metadata: pq.FileMetaData) -> tuple[dict[str, Any], str]:
    entries = metadata.metadata or {}
    try:
        text = entries[_RECORD.encode()]
        seal = entries[_SEAL.encode()].decode("ascii")
        if _digest(text) != entries[_RECORD_DIGEST.encode()].decode("ascii"):
            raise damaged(path, "its commit record does not match its checksum")
        record = json.loads(text)
    except (KeyError, ValueError) as error:
        raise damaged(path, f"it has no commit record ({error})") from None
    if not isinstance(record, dict):
        raise damaged(path, "its commit record is not an object")
    return record, seal
