"""Downloads one shard, inside a worker process, with img2dataset's reader, resizer and key format.

In: a part of the clean URL table (Parquet), then one shard's rows (img2dataset's feather file). Out, in the
attempt's private directory: `shard.tar` and `rows.arrow`, a row for every row that came in, in its order,
with the shards' columns, what the table carried along, and QUARANTINE_COLUMNS.

Importing this module imports img2dataset, which takes seconds: worker processes only.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import queue
import struct
import sys
import tempfile
import threading
import types
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
from PIL import Image

from capfilt.curation.addresses import FetchError
from capfilt.curation.fetch import Fetcher
from capfilt.curation.politeness import Asked, Hosts, PoliteQueue
from capfilt.curation.url_table import CAPTION, DETAIL, REASON, URL
from capfilt.data.images import ImageRefused, decode_image
from capfilt.data.memory import require_memory
from capfilt.data.schemas import SCHEMAS, SUCCESS
from capfilt.data.shards import write_tar
from capfilt.settings import DownloadSettings

# img2dataset imports albumentations, which looks for updates on the network; wandb, for a logger that is
# not used here; and, through webdataset, torch. The last two would take half of a worker's start.
os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
os.environ["WANDB_MODE"] = "disabled"
sys.modules.setdefault("wandb", types.ModuleType("wandb"))
if "torch" not in sys.modules:
    sys.modules["torch"] = None  # type: ignore[assignment]

from img2dataset.downloader import compute_key  # noqa: E402
from img2dataset.reader import Reader  # noqa: E402
from img2dataset.resizer import Resizer  # noqa: E402

SHARD_DIGITS = 5
"""Digits of a shard's number in its name and its keys (img2dataset's default)."""

QUARANTINE_COLUMNS = {"detail": pa.string(), "body_sha256": pa.string(), "body_bytes": pa.int64()}

_SPOOL_BYTES = 128 << 20
_NO_ROW = -1
_POLL_SECONDS, _GRACE_SECONDS = 1.0, 10.0
_ORIENTATION_TAG = 0x0112

Report = Callable[[int, int], None]
"""(rows done, successes among them) so far in this shard."""


@dataclass(slots=True)
class _Row:
    """What became of one row."""

    index: int
    reason: str | None = None
    detail: str | None = None
    status: str = SUCCESS
    spool_offset: int = 0
    values: dict[str, Any] = field(default_factory=dict)


class ShardDownloader:
    """Splits parts of the table into shards and downloads shards, one at a time, with one pool of threads."""

    def __init__(self, settings: DownloadSettings) -> None:
        self._settings = settings
        self._fetcher = Fetcher(settings)
        self._hosts = Hosts()
        self._threads = _start_threads(settings.num_threads)
        self._resizer = Resizer(
            image_size=settings.image_size_px,
            resize_mode="keep_ratio",
            resize_only_if_bigger=True,
            encode_quality=settings.jpeg_quality,
            encode_format="jpg",
        )

    def split(
        self,
        part: str,
        first_shard: int,
        shard_rows: int,
        done: Collection[int],
        extra: list[str],
        to_dir: str,
    ) -> dict[int, str]:
        """Split a part of the table by img2dataset's reader. Gives shard number → feather file."""
        reader = Reader(
            part,
            "parquet",
            URL,
            CAPTION,
            None,
            None,
            save_additional_columns=[REASON, DETAIL, *extra],
            number_sample_per_shard=shard_rows,
            done_shards=set(done),
            tmp_path=to_dir,
            start_shard_id=first_shard,
        )
        return {int(shard): str(feather) for shard, feather in reader}

    def download(
        self,
        shard: int,
        feather: str,
        samples_per_shard: int,
        skip: Collection[int],
        retried: Collection[str],
        to_dir: str,
        report: Report,
    ) -> None:
        """Fetch, check, resize and pack the rows of one shard.

        Args:
            samples_per_shard: rows of a full shard; sets the digits of the keys.
            skip: rows that killed their worker before and are not tried again.
            retried: keys of rows that stand in a later shard of `capfilt retry`.
        """
        with pa.ipc.open_file(feather) as file:
            rows = file.read_all()
        key_digits = math.ceil(math.log10(samples_per_shard))
        keys = [compute_key(index, shard, key_digits, SHARD_DIGITS) for index in range(rows.num_rows)]
        skipped = {index: FetchError("retried", "") for index, key in enumerate(keys) if key in retried}
        killed = FetchError("worker_failed", "two worker processes ended while they decoded this picture")
        skipped |= dict.fromkeys(skip, killed)
        attempt = Path(to_dir)
        results: list[_Row | None] = [None] * rows.num_rows
        with tempfile.SpooledTemporaryFile(_SPOOL_BYTES, dir=to_dir) as spool:
            self._download_rows(rows, skipped, spool, results, attempt / "current", report)
            done = [result for result in results if result is not None]
            assert len(done) == rows.num_rows
            members = write_tar(attempt / "shard.tar", _members(rows, keys, done, spool))
        offsets = {member.name.partition(".")[0]: member.offset for member in members if member.name.endswith(".jpg")}
        _write_rows(attempt / "rows.arrow", _result_table(rows, keys, done, offsets))

    def _download_rows(
        self,
        rows: pa.Table,
        skipped: dict[int, FetchError],
        spool: IO[bytes],
        results: list[_Row | None],
        journal: Path,
        report: Report,
    ) -> None:
        """Fill `results`; encoded pictures go to `spool` as they come."""
        num_done = num_ok = 0
        with open(journal, "xb", buffering=0) as current:
            for index, body, failure in self._bodies(rows, skipped):
                if failure is not None:
                    result = _Row(index, failure.reason, failure.detail, "failed_to_download")
                else:
                    # should this picture kill the process, the one who looks after it reads here which it was
                    os.pwrite(current.fileno(), struct.pack("<q", index), 0)
                    result = self._take_picture(index, body, spool)
                    os.pwrite(current.fileno(), struct.pack("<q", _NO_ROW), 0)
                results[index] = result
                num_done += 1
                num_ok += result.reason is None
                report(num_done, num_ok)

    def _bodies(self, rows: pa.Table, skipped: dict[int, FetchError]) -> Iterator[tuple[int, bytes, FetchError | None]]:
        """Yield (row, body, failure) as answers come in; few bodies wait at any time.

        Raises MemoryError, after which this process is of no use, where that may be what a row failed for.
        """
        refused: list[tuple[int, bytes, FetchError | None]] = []
        waiting = PoliteQueue(self._fetchable(rows, skipped, refused), self._settings, self._hosts)
        answers: queue.SimpleQueue[tuple[Asked, bytes, FetchError | None]] = queue.SimpleQueue()
        in_flight: set[Asked] = set()
        most, silence = self._settings.num_threads + 4, 0.0
        try:
            while True:
                while len(in_flight) < most and (asked := waiting.take()) is not None:
                    if asked.refusal is not None:
                        yield asked.index, b"", asked.refusal
                        continue
                    in_flight.add(asked)
                    self._threads.submit(self._fetch, asked, answers)
                while refused:
                    yield refused.pop()
                if not in_flight and waiting.is_empty():
                    return
                pause = waiting.seconds_to_wait()
                most_seconds = _POLL_SECONDS if pause is None else min(_POLL_SECONDS, pause)
                try:
                    asked, body, failure = answers.get(timeout=most_seconds)
                except queue.Empty:
                    silence += _POLL_SECONDS if in_flight else 0.0
                    if silence > 2 * self._settings.timeout_seconds + _GRACE_SECONDS:
                        raise MemoryError("the threads that fetch have ended, as without memory they do") from None
                    continue
                in_flight.remove(asked)
                silence = 0.0
                if failure is not None:
                    require_memory()
                if not waiting.put_back(asked, failure):
                    yield asked.index, body, failure
        finally:
            for asked in in_flight:  # the hosts are known from shard to shard
                asked.host.num_open -= 1

    def _fetchable(
        self, rows: pa.Table, skipped: dict[int, FetchError], refused: list[tuple[int, bytes, FetchError | None]]
    ) -> Iterator[tuple[int, str]]:
        """Yield (row, address) of rows that are to be asked for; the others go to `refused`."""
        columns = (rows[name].to_pylist() for name in (URL, CAPTION, REASON, DETAIL))
        for index, (url, caption, reason, detail) in enumerate(zip(*columns, strict=True)):
            if reason is not None:
                failure = FetchError(reason, detail or "")
            else:
                failure = skipped.get(index) or self._refuse(url, caption)
            if failure is not None:
                refused.append((index, b"", failure))
            else:
                yield index, url

    def _refuse(self, url: str | None, caption: str) -> FetchError | None:
        """Why a row is not fetched at all."""
        if not url:
            return FetchError("bad_url", "the row has no address")
        num_bytes = len(caption.encode("utf-8"))
        if num_bytes > self._settings.max_caption_bytes:
            limit = self._settings.max_caption_bytes
            return FetchError("caption_too_long", f"the caption has {num_bytes} bytes; at most {limit}")
        return None

    def _fetch(self, asked: Asked, answers: queue.SimpleQueue[tuple[Asked, bytes, FetchError | None]]) -> None:
        try:
            answers.put((asked, self._fetcher.fetch(asked.url), None))
        except FetchError as failure:
            answers.put((asked, b"", failure))
        except MemoryError:
            os._exit(1)  # as _bodies, which a thread cannot tell
        except Exception as error:  # a server found what we did not think of: its row pays, not the shard
            answers.put((asked, b"", FetchError("bad_response", f"{type(error).__name__}: {error}")))

    def _take_picture(self, index: int, body: bytes, spool: IO[bytes]) -> _Row:
        try:
            image, values = self._prepare(body)
        except ImageRefused as refusal:
            digest = hashlib.sha256(body).hexdigest()
            values = {"body_sha256": digest, "body_bytes": len(body)}
            return _Row(index, refusal.reason, refusal.detail, "failed_to_resize", values=values)
        offset = spool.seek(0, io.SEEK_END)
        spool.write(image)
        digest = hashlib.sha256(image).hexdigest()
        values |= {"sha256": digest, "image_length": len(image)}
        return _Row(index, spool_offset=offset, values=values)

    def _prepare(self, body: bytes) -> tuple[bytes, dict[str, int]]:
        """The picture as it is stored, and its sizes. Raises ImageRefused."""
        settings = self._settings
        picture = decode_image(body, max_pixels=settings.max_pixels, max_aspect_ratio=settings.max_aspect_ratio)
        width, height = picture.size
        sizes = {"width": width, "height": height, "original_width": width, "original_height": height}
        if min(width, height) <= settings.image_size_px and _is_plain_jpeg(body):
            return body, sizes
        # img2dataset's resizer loses orientation, 16-bit and floating-point values: it gets the clean pixels
        clean = io.BytesIO()
        picture.save(clean, "PPM")
        image, width, height, _, _, error = self._resizer(clean)
        if error is not None or image is None:
            raise ImageRefused("bad_image", f"resizing: {error}")
        return image, sizes | {"width": width, "height": height}


def _start_threads(number: int) -> ThreadPoolExecutor:
    """A pool whose threads run already: starting one hangs for ever where it finds no memory."""
    pool = ThreadPoolExecutor(number, thread_name_prefix="fetch")
    together = threading.Barrier(number)
    for started in [pool.submit(together.wait) for _ in range(number)]:
        started.result()
    return pool


def _is_plain_jpeg(body: bytes) -> bool:
    """Whether the bytes are a JPEG that any decoder shows upright and in its right colours."""
    if not body.startswith(b"\xff\xd8\xff"):
        return False
    try:
        with Image.open(io.BytesIO(body), formats=["JPEG"]) as header:
            return (
                header.format == "JPEG"
                and header.mode in ("RGB", "L")
                and header.getexif().get(_ORIENTATION_TAG, 1) in (0, 1)
            )
    except Exception:  # odd metadata raises anything; such a picture is encoded anew
        return False


def _members(rows: pa.Table, keys: list[str], done: list[_Row], spool: IO[bytes]) -> Iterator[tuple[str, bytes]]:
    """Members of the tar in the order of the rows, as img2dataset names and fills them."""
    carried = [name for name in rows.column_names if name not in (REASON, DETAIL)]
    columns = {name: rows[name].to_pylist() for name in carried}
    for result in done:
        if result.reason is not None:
            continue
        key, values = keys[result.index], result.values
        spool.seek(result.spool_offset)
        meta = {name: _json_value(column[result.index]) for name, column in columns.items()}
        meta |= {"key": key, "status": SUCCESS, "error_message": None}
        meta |= {name: values[name] for name in ("width", "height", "original_width", "original_height", "sha256")}
        yield f"{key}.jpg", spool.read(values["image_length"])
        yield f"{key}.txt", meta[CAPTION].encode("utf-8")
        yield f"{key}.json", json.dumps(meta, indent=4, allow_nan=False).encode("utf-8")


def _json_value(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _result_table(rows: pa.Table, keys: list[str], done: list[_Row], offsets: dict[str, int]) -> pa.Table:
    """The rows as committed, with the quarantine's columns at the end."""
    schema = SCHEMAS["shards"]
    columns: dict[str, list[Any]] = {name: [] for name in [*schema.names, *QUARANTINE_COLUMNS]}
    urls, captions = rows[URL].to_pylist(), rows[CAPTION].to_pylist()
    for result in done:
        ok, key = result.reason is None, keys[result.index]
        row = {
            "key": key,
            "url": urls[result.index],
            "caption": captions[result.index],
            "status": result.status,
            "error_message": None if ok else f"{result.reason}: {result.detail}",
            "reason": result.reason,
            "detail": result.detail,
            "image_offset": offsets[key] if ok else None,
            "image_ext": "jpg" if ok else None,
            **result.values,
        }
        for name, column in columns.items():
            column.append(row.get(name))
    arrays = [pa.array(columns[entry.name], entry.type) for entry in schema]
    extra = [name for name in rows.column_names if name not in (URL, CAPTION, REASON, DETAIL)]
    arrays += [rows[name] for name in extra]
    arrays += [pa.array(columns[name], kind) for name, kind in QUARANTINE_COLUMNS.items()]
    return pa.table(arrays, names=[*schema.names, *extra, *QUARANTINE_COLUMNS])


def _write_rows(path: Path, table: pa.Table) -> None:
    with pa.ipc.new_file(str(path), table.schema) as writer:
        writer.write_table(table)
