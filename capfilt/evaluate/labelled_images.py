"""Labelled texts of a file, with what their images are read from: files of a folder, or a run's shards.

In: rows of `capfilt.data.labels`, and a folder or a run. Out: `LabelledImageText`s in the order of the file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from capfilt.data.image_sources import ImageFile, ImageSource, check_images_dir, iterate_shard_images, join_name
from capfilt.data.labels import LabelledText
from capfilt.data.rundir import RunDir
from capfilt.data.texts import clean_for_terminal
from capfilt.errors import UsageError

_NUM_NAMED = 5


@dataclass(frozen=True)
class LabelledImageText:
    """A text of an image, labelled, with what the image is read from."""

    image: ImageSource
    text: str
    is_true: bool
    source: str | None = None


def locate_images(rows: Sequence[LabelledText], images_dir: Path, run: RunDir | None) -> list[LabelledImageText]:
    """Where each row's image is. Raises UsageError for keys without a run, and for keys that the run does not have."""
    by_key = _find_keys(rows, run)
    folder = check_images_dir(images_dir)
    assert folder is not None
    located = []
    for row in rows:
        if row.key is not None:
            image: ImageSource = by_key[row.key]
        else:
            assert row.image is not None
            image = ImageFile(join_name(folder, row.image, row.where))
        located.append(LabelledImageText(image, row.text, row.is_true, row.source))
    return located


def _find_keys(rows: Sequence[LabelledText], run: RunDir | None) -> dict[str, ImageSource]:
    wanted = {row.key: row.where for row in reversed(rows) if row.key is not None}
    if not wanted:
        return {}
    if run is None:
        key, where = next(reversed(wanted.items()))
        raise UsageError(f"{where} names the key {clean_for_terminal(key)!r} of a run. Say which: --run RUN.")
    found: dict[str, ImageSource] = {}
    for shard in run.shard_names():
        found |= {image.key: image for image in iterate_shard_images(run, shard) if image.key in wanted}
    if unknown := sorted(wanted.keys() - found.keys()):
        named = ", ".join(repr(clean_for_terminal(key)) for key in unknown[:_NUM_NAMED])
        raise UsageError(
            f"{len(unknown):,} keys of the pairs are no images of {run.path}: {named}"
            f"{', …' if len(unknown) > _NUM_NAMED else ''}. Keys are texts: leading zeros count."
        )
    return found
