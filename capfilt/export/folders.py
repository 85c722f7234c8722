"""Exports with pictures: the kept pairs of a run as a folder in one of several formats, whole or not there.

In: a run with a manifest, on a disk or an object store. Out: a folder of this machine, and in it export.json: the
format, the selection of the pairs, and the files that are meant to be read. The same run gives the same bytes.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from capfilt import __version__
from capfilt.data.manifest import checked_shards
from capfilt.data.rundir import RunDir
from capfilt.data.whole_folders import whole_folder, write_json
from capfilt.engines.base import SHARDS
from capfilt.errors import UsageError
from capfilt.export.annotations import COCO, LLAVA, PICTURES, write_coco, write_llava
from capfilt.export.images import CuratedImage, ExportSample, WrittenFile, curated_images, export_samples
from capfilt.export.tables import write_datasets, write_img2dataset
from capfilt.export.tars import write_tars
from capfilt.progress import NullProgress, Progress, as_bytes, counted
from capfilt.settings.export import DEFAULT_CAPTIONS, UNCUT_FORMATS, ExportSettings

MARK = "export.json"
"""The file that tells an export's folder from others; it is written last."""


@dataclass(frozen=True, kw_only=True)
class FolderSummary:
    """What was written."""

    output: Path
    format: str
    num_images: int
    num_samples: int
    """As many as images, or as their kept captions."""
    num_files: int
    """Shards, or one JSON file."""
    num_bytes: int
    """Of these; pictures that lie beside a JSON file are not counted."""
    seconds: float
    first_file: str
    last_file: str

    def line(self) -> str:
        """One line for people."""
        size = f"{counted(self.num_files, 'file')}, {as_bytes(self.num_bytes)}"
        beside = ", and the pictures" if self.format in UNCUT_FORMATS else ""
        return (
            f"Wrote {counted(self.num_samples, 'sample')} of {counted(self.num_images, 'image')} to {self.output} "
            f"({size}{beside}) in {self.seconds:.1f} s."
        )


def export_folder(
    run: RunDir,
    output: Path,
    folder_format: str,
    settings: ExportSettings | None = None,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> FolderSummary:
    """Write the kept pairs of `run` with their pictures in a format of FOLDERS; one shard of the run is in memory.

    Raises UsageError for another format, a folder that may not be written, or a run without a manifest or with nothing
    kept; CorruptionError for damage, and then nothing is written.
    """
    if folder_format not in FOLDERS:
        raise UsageError(f"The format is {folder_format}; expected one of {', '.join(FOLDERS)}.")
    started, progress = time.monotonic(), progress or NullProgress()
    settings = settings or ExportSettings(captions=DEFAULT_CAPTIONS.get(folder_format, "best"))
    with whole_folder(output, MARK, overwrite=overwrite) as folder:
        shards, selection = checked_shards(run)
        progress.start("export", len(shards), SHARDS)
        samples = _Counted(curated_images(run, shards, selection, progress), settings.captions)
        files = FOLDERS[folder_format](folder, samples, settings)
        if not files or not samples.num_images:
            raise UsageError(
                f"No kept pair in {run.path}. Lower the threshold: `capfilt select {run.path} --threshold 0.3"
                f"{run.generation_option}`."
            )
        counts = {"num_images": samples.num_images, "num_samples": samples.num_samples}
        cut = {} if folder_format in UNCUT_FORMATS else asdict(settings)
        about = {"format": folder_format, "capfilt": __version__, "selection": selection, **cut}
        about["captions"] = settings.captions
        write_json(folder / MARK, about | counts | {"files": [asdict(file) for file in files]})
    progress.finish()
    return FolderSummary(
        output=output, format=folder_format, **counts, num_files=len(files),
        num_bytes=sum(file.num_bytes for file in files), seconds=time.monotonic() - started,
        first_file=files[0].name, last_file=files[-1].name,
    )  # fmt: skip


class _Counted:
    """The samples of images, counted as they are taken."""

    def __init__(self, images: Iterable[CuratedImage], captions: str) -> None:
        self._images, self._captions = images, captions
        self.num_images = self.num_samples = 0

    def __iter__(self) -> Iterator[ExportSample]:
        for image in self._images:
            self.num_images += 1
            for sample in export_samples(image, self._captions):
                self.num_samples += 1
                yield sample


FOLDERS: dict[str, Callable[[Path, Iterable[ExportSample], ExportSettings], list[WrittenFile]]] = {
    "webdataset": write_tars,
    "datasets": write_datasets,
    "img2dataset": write_img2dataset,
    "llava": write_llava,
    "coco": write_coco,
}
"""Format → what fills an empty folder, and gives the files that are to be read."""


def how_to_read(summary: FolderSummary) -> str:
    """What reads it, in one line."""
    folder, first, last = summary.output, Path(summary.first_file).stem, Path(summary.last_file).stem
    tars = folder / (f"{first}.tar" if first == last else f"{{{first}..{last}}}.tar")
    images = shlex.quote(str(folder / PICTURES))
    return {
        "webdataset": "python -m open_clip_train.main --dataset-type webdataset --model ViT-B-32 --train-data "
        + shlex.quote(str(tars)),
        "datasets": f"datasets.load_dataset({str(folder)!r}, streaming=True)",
        "img2dataset": f"pandas.read_parquet({str(folder / summary.first_file)!r})",
        "llava": f"LLaVA's train.py: --data_path {shlex.quote(str(folder / LLAVA))} --image_folder {images}",
        "coco": f"capfilt evaluate captions MODEL --references {shlex.quote(str(folder / COCO))} --images {images}",
    }[summary.format]
