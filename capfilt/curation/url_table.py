"""Reads the table of URLs and captions a download starts from, whatever its format, as clean batches of rows.

In: a file, a folder or a glob of Parquet, CSV, TSV, JSONL, JSON or TXT (text formats also as .gz), local or
at any address fsspec knows (s3://, gs://, hf://, https://). Out: record batches with the columns
    url       string, null where the row has none
    caption   string, empty where the row has none
    reason    one of REASONS and `detail` a sentence, where the row itself cannot be used; else null
    …         further columns of the table that are plain text, numbers or truth values; what is not UTF-8 is null
No row is lost: one that cannot be parsed comes out with a reason.
"""

from __future__ import annotations

import gzip
import hashlib
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.compute as pc

from capfilt.curation.marked_utf8 import MARK
from capfilt.curation.table_formats import FORMATS, MIXED, TableFormat
from capfilt.data.retries import RETRY_OF
from capfilt.data.schemas import SCHEMAS
from capfilt.errors import UsageError
from capfilt.settings.values import nearest_of

URL, CAPTION, REASON, DETAIL = "url", "caption", "reason", "detail"
RESERVED = frozenset(SCHEMAS["shards"].names) | {URL, CAPTION, REASON, DETAIL, RETRY_OF, "exif", "md5", "sha512"}
"""Names that a carried column cannot have: the columns of a shard's own file, and img2dataset's."""

_USUAL_NAMES = {
    "url": ("image_url", "img_url", "imageurl", "image_link", "link", "uri", "href", "src"),
    "text": ("caption", "captions", "alt_text", "alttext", "alt", "title", "description", "sentence", "top_caption"),
}
"""Column that is looked for unless another is named → how it is called in published tables."""

_PACKAGES = {
    "s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "abfs": "adlfs", "az": "adlfs",
    "http": "aiohttp", "https": "aiohttp", "hf": "huggingface_hub", "sftp": "paramiko", "ssh": "paramiko",
}  # fmt: skip
"""Protocol → what fsspec needs for it."""


@dataclass(frozen=True, kw_only=True)
class UrlTable:
    """A table that was found, hashed and looked over. Make it with `open_url_table`."""

    files: tuple[Path, ...]
    """Local files in order; remote ones were copied into the attempt's staging."""
    format: TableFormat
    sha256: str
    """Digest of the bytes of all files."""
    num_rows: int
    """Rows of all files, the ones that cannot be parsed included."""
    url_column: str
    caption_column: str | None
    extra: dict[str, pa.DataType]
    """Further columns that are carried along, with the type they are carried as."""
    notes: tuple[str, ...]
    """What was left out, for people."""

    @property
    def schema(self) -> pa.Schema:
        """Columns of the batches."""
        fields = [(name, pa.string()) for name in (URL, CAPTION, REASON, DETAIL)]
        return pa.schema([*fields, *self.extra.items()])

    def batches(self) -> Iterator[pa.RecordBatch]:
        """All rows in the order of the files."""
        texts = [self.url_column]
        if self.caption_column not in (None, self.url_column):
            texts.append(self.caption_column)
        num_rows = 0
        for file in self.files:
            for batch in self.format.batches(file, texts, self.extra):
                num_rows += batch.num_rows
                yield self._clean(batch)
        if num_rows != self.num_rows:
            raise UsageError(
                f"The table was to have {self.num_rows:,} rows, and {num_rows:,} could be read: it is damaged, or was "
                "changed meanwhile. Mend it, and repeat the command."
            )

    def _clean(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        reasons, details = _string_columns(batch)
        url, bad_url = _as_text(_column(batch, self.url_column))
        caption, bad_caption = _as_text(_column(batch, self.caption_column))
        for bad, reason, name in (
            (bad_url, "bad_row", self.url_column),
            (bad_caption, "bad_caption", "caption"),
        ):
            if bad is not None:
                bad = pc.and_(bad, pc.is_null(reasons))
                reasons = pc.if_else(bad, reason, reasons)
                details = pc.if_else(bad, f"the column {name} is not readable text", details)
        columns = [url, pc.fill_null(caption, ""), reasons, details]
        for name, kind in self.extra.items():
            column = _column(batch, name)
            column = _as_text(column)[0] if pa.types.is_string(kind) else column.cast(kind, safe=False)
            if pa.types.is_floating(kind):
                # what is not a number is nothing: JSON has no NaN, and read back it does not equal itself
                column = pc.if_else(pc.is_nan(column), pa.scalar(None, kind), column)
            columns.append(column)
        return pa.RecordBatch.from_arrays(columns, schema=self.schema)


def open_url_table(path: str, url_column: str, caption_column: str, staging: Path) -> UrlTable:
    """Find the table, copy remote files to `staging`, hash it, check its columns and count its rows.

    Raises:
        UsageError: nothing is there, the format is not known, a package for the address or a column is
            missing, a column is of a wrong type, or there is no row; the message says what mends it.
    """
    names, format_name = _find_files(path)
    table_format = FORMATS[format_name.removesuffix(".gz")]
    digest = hashlib.sha256()
    files = tuple(_bring_here(name, format_name, staging, index, digest) for index, name in enumerate(names))
    looks = [table_format.look(file, name) for file, name in zip(files, names, strict=True)]
    caption = caption_column if table_format.has_columns else None
    wanted = {"--url-column": url_column if table_format.has_columns else URL}
    if caption is not None:
        wanted["--caption-column"] = caption
    for look, name in zip(looks, names, strict=True):
        _require_columns(look.columns, wanted, name)
    num_rows = sum(look.num_rows for look in looks)
    if num_rows == 0:
        raise UsageError(f"{path} has no rows; expected at least one row with an address.")
    taken = {url_column, caption_column} if table_format.has_columns else {URL}
    extra, notes = _choose_extra([look.columns for look in looks], taken)
    return UrlTable(
        files=files,
        format=table_format,
        sha256=digest.hexdigest(),
        num_rows=num_rows,
        url_column=url_column if table_format.has_columns else URL,
        caption_column=caption,
        extra=extra,
        notes=tuple(notes),
    )


# --- finding ------------------------------------------------------------------------------------------------


def _find_files(path: str) -> tuple[list[str], str]:
    """Full names of the table's files in order, and their one format."""
    filesystem, root = _filesystem(path)
    try:
        if any(char in root for char in "*?["):
            found = sorted(str(name) for name in filesystem.glob(root))
        elif filesystem.isdir(root):
            found = sorted(str(name) for name in filesystem.ls(root, detail=False))
            found = [name for name in found if _format_of(name) is not None]
        else:
            found = [root] if filesystem.exists(root) else []
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read: {error}. Expected a table of URLs.") from None
    if not found:
        raise UsageError(f"No table at {path}. Expected a file, folder or glob of {_known_endings()}.")
    formats = {_format_of(name) for name in found}
    only = formats.pop()
    if formats or only is None:
        raise UsageError(
            f"{path} is not of one known format: {', '.join(Path(name).name for name in found[:5])}. "
            f"Expected files that end in one of {_known_endings()}."
        )
    local = "file" in filesystem.protocol
    return [name if local else filesystem.unstrip_protocol(name) for name in found], only


def _filesystem(path: str) -> tuple[Any, str]:
    protocol = path.partition("://")[0] if "://" in path else "file"
    try:
        return fsspec.core.url_to_fs(path)
    except ImportError:
        package = _PACKAGES.get(protocol, f"for {protocol}://")
        raise UsageError(f"Reading {path} needs the package {package}. Install it: pip install {package}") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read: {error}. Expected a path or an address fsspec knows.") from None


def _format_of(name: str) -> str | None:
    lower = name.lower()
    gz = ".gz" if lower.endswith(".gz") else ""
    ending = lower.removesuffix(".gz").rpartition(".")[2]
    known = ending in FORMATS and not (gz and ending == "parquet")
    return ending + gz if known else None


def _known_endings() -> str:
    return ", ".join(f".{name}" for name in FORMATS) + " (text formats also with .gz)"


def _bring_here(name: str, format_name: str, staging: Path, index: int, digest: Any) -> Path:
    """Hash one file; copy it to the staging where it is remote or compressed."""
    filesystem, inner = _filesystem(name)
    local = "file" in filesystem.protocol
    copied = not local or format_name.endswith(".gz")
    target = staging / f"table-{index:05d}.{format_name.removesuffix('.gz')}"
    packed = staging / f"table-{index:05d}.packed"
    try:
        with filesystem.open(inner, "rb") as source, open(packed if copied else "/dev/null", "wb") as copy:
            while chunk := source.read(1 << 20):
                digest.update(chunk)
                copy.write(chunk)
        digest.update(b"\0end of file\0")
        if not copied:
            return Path(inner)
        if format_name.endswith(".gz"):
            with gzip.open(packed) as source, open(target, "wb") as copy:
                shutil.copyfileobj(source, copy, 1 << 20)
            packed.unlink()
        else:
            packed.rename(target)
    except (OSError, EOFError, ValueError) as error:
        raise UsageError(f"{name} cannot be read: {error}. Expected a table in .{format_name}.") from None
    return target


# --- columns ------------------------------------------------------------------------------------------------


def _require_columns(columns: dict[str, pa.DataType], wanted: dict[str, str], name: str) -> None:
    """Every wanted column (option → name) is there and holds text; UsageError naming all that are not."""
    missing = {option: column for option, column in wanted.items() if column not in columns}
    if missing:
        found = ", ".join(list(columns)[:40]) or "none"
        lacking = " and ".join(repr(column) for column in missing.values())
        near = {option: _nearest(column, columns) for option, column in missing.items()}
        options = " ".join(f"{option} {column or 'NAME'}" for option, column in near.items())
        advice = f"Did you mean {options}?" if all(near.values()) else f"Name one of them: {options}"
        raise UsageError(f"{name} has no column {lacking}. Columns found: {found}. {advice}")
    for option, column in wanted.items():
        kind = columns[column]
        if not (_is_text(kind) or pa.types.is_null(kind)):
            raise UsageError(
                f"Column {column!r} of {name} holds {kind}; expected text. Name another column: {option} NAME"
            )


def _nearest(column: str, columns: dict[str, pa.DataType]) -> str:
    """The column of text with the nearest name, as a shell takes it; or one that usually holds the same; or nothing."""
    usual = _USUAL_NAMES.get(column, ())
    known = [name for name, kind in columns.items() if _is_text(kind) and _is_utf8(name)]
    found = nearest_of(column, known) or [name for name in known if name.lower() in usual]
    return shlex.quote(found[0]) if found else ""


def _choose_extra(files: list[dict[str, pa.DataType]], taken: set[str]) -> tuple[dict[str, pa.DataType], list[str]]:
    """Columns carried along (plain and alike in all files), and a note on every other one."""
    extra: dict[str, pa.DataType] = {}
    notes: list[str] = []
    for name in dict.fromkeys(name for columns in files for name in columns if name not in taken):
        kinds = {columns.get(name) for columns in files}
        kind = kinds.pop()
        carried = None if kinds or kind is None else _carried_type(kind)
        if not _is_utf8(name):
            notes.append(f"column {name!r} is left out: its name is not UTF-8")
        elif name in RESERVED or name.startswith("__"):
            notes.append(f"column {name!r} is left out: a shard has a column of that name")
        elif carried is None:
            what = f"holds {kind}" if kind != MIXED else "holds nested or mixed values"
            what = "differs between files" if kinds or kind is None else what
            notes.append(f"column {name!r} is left out: it {what}; text, numbers and truth values are carried")
        else:
            extra[name] = carried
    return extra, notes


def _is_utf8(name: str) -> bool:
    return MARK not in name and not any("\ud800" <= char <= "\udfff" for char in name)


def _carried_type(kind: pa.DataType) -> pa.DataType | None:
    """The type a further column is carried as; None for types that img2dataset's JSON cannot hold."""
    if _is_text(kind):
        return pa.string()
    if pa.types.is_float16(kind):
        return pa.float32()
    plain = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)
    return kind if plain else None


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        return _is_text(kind.value_type)
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _column(batch: pa.RecordBatch, name: str | None) -> pa.Array:
    index = batch.schema.get_field_index(name) if name is not None else -1
    return batch.column(index) if index >= 0 else pa.nulls(batch.num_rows, pa.string())


def _string_columns(batch: pa.RecordBatch) -> tuple[pa.Array, pa.Array]:
    """`reason` and `detail` that a format gave its unreadable rows."""
    return _column(batch, TableFormat.REASON), _column(batch, TableFormat.DETAIL)


def _as_text(column: pa.Array) -> tuple[pa.Array, pa.Array | None]:
    """The column as strings; where some are not UTF-8, also a mask of those (they become null)."""
    if not (pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type)):
        return column.cast(pa.string()), None
    try:
        return column.cast(pa.string()), None
    except pa.ArrowInvalid:
        texts: list[str | None] = []
        for value in column.to_pylist():
            try:
                texts.append(None if value is None else value.decode("utf-8"))
            except UnicodeDecodeError:
                texts.append(None)
        text = pa.array(texts, pa.string())
        return text, pc.and_(pc.is_null(text), pc.is_valid(column))
