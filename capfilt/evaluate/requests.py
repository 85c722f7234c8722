"""Images and prompts as a user names them on the command line, as requests to a writer.

In: paths, folders and patterns; a prompt, a question, or a file of prompts. Out: requests in order, those about one
image side by side.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from capfilt.data.image_sources import ImageFile
from capfilt.data.json_lists import Entry, parse_value
from capfilt.data.text_lines import read_lines
from capfilt.errors import UsageError
from capfilt.evaluate.streaming import Request

IMAGE_SUFFIXES = frozenset((".jpg", ".jpeg", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif"))
"""Names of images that are taken from a folder; a file that is named itself may have any name."""


def expand_images(names: Sequence[str]) -> list[Path]:
    """Files as they are named; those of folders (below them too) and patterns (`*`, `?`, `**`) sorted.

    A file that is not there is taken along, to be reported when it is read. Raises UsageError for a folder or pattern
    without images, and where none of the names is there.
    """
    found: list[Path] = []
    for name in names:
        path = Path(name)
        if path.is_dir():
            part = list(_images_below(path))
            if not part:
                raise UsageError(f"{name} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))}). Name another folder.")
        elif not path.exists() and glob.has_magic(name):
            part = [Path(match) for match in sorted(glob.glob(name, recursive=True)) if os.path.isfile(match)]
            if not part:
                raise UsageError(f"No file matches {name!r}. Put patterns in quotes, or name files or folders.")
        else:
            part = [path]
        found += part
    if not any(path.exists() for path in found):
        raise UsageError(f"{found[0] if found else 'No image'} is not there. Give image files, folders or patterns.")
    return found


def request_texts(images: Sequence[Path], prompts: Sequence[str]) -> Iterator[Request]:
    """Every prompt for every image; without prompts the writer's own."""
    for path in images:
        source = ImageFile(path)
        for prompt in prompts or [""]:
            yield Request(str(path), source, prompt)


def read_prompts(path: Path) -> list[str]:
    """A prompt a line; blank lines are passed over. UsageError where there is none."""
    prompts = [line.strip() for _, line in read_lines(path)]
    if not prompts:
        raise UsageError(f"{path} has no prompts; expected one a line.")
    return prompts


def read_image_prompts(path: Path) -> list[Request]:
    """JSON lines with `image`, a path, and `prompt`. UsageError names the line that is something else."""
    requests = []
    for number, line in read_lines(path):
        entry = Entry(path, f"line {number}", -1, parse_value(line, f"{path}, line {number}"))
        image = entry.text("image")
        requests.append(Request(image, ImageFile(Path(image)), entry.text("prompt")))
    if not requests:
        raise UsageError(f'{path} has no lines; expected {{"image": PATH, "prompt": TEXT}} in each.')
    return requests


def _images_below(folder: Path) -> Iterator[Path]:
    for root, folders, files in os.walk(folder):
        folders.sort()
        yield from (Path(root, name) for name in sorted(files) if Path(name).suffix.lower() in IMAGE_SUFFIXES)
