"""Standard files of captioned images, read into one form: COCO's, Karpathy's splits, Flickr8k's, and capfilt's runs.

In: a file (or run), and a folder of images where pictures are wanted. Out: `CaptionedImage`s in the order of the file,
and Flickr8k's pairs that experts judged. Captions that are blank are left out.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from capfilt.data.image_sources import ImageSource, check_images_dir, find_image, iterate_shard_images
from capfilt.data.json_lists import Entry, Id, as_id, read_entries
from capfilt.data.manifest import iterate_manifest
from capfilt.data.paths import AnyPath
from capfilt.data.rundir import RunDir
from capfilt.data.text_lines import read_lines
from capfilt.errors import UsageError
from capfilt.settings.values import did_you_mean

DEFAULT_SPLITS = ("test",)
"""Of a Karpathy file, which holds train, restval (of COCO), val and test."""

_TOKEN_LINE = re.compile(r"([^\t]+)#(\d+)\t(.*)")


@dataclass(frozen=True, slots=True)
class CaptionedImage:
    """An image and the captions that people (or a manifest) gave it."""

    id: Id
    """COCO's image id, a file's name, or a key."""
    captions: tuple[str, ...]
    """None where the file has the image but no caption of it."""
    image: ImageSource | None = None
    """None where no folder of images was given."""


@dataclass(frozen=True, slots=True)
class JudgedPair:
    """A caption that experts compared with an image (Hodosh et al. 2013): 1 unrelated … 4 describes it wholly."""

    image_id: str
    caption_id: str
    """IMAGE#NUMBER of the token file; often another image's caption."""
    caption: str
    scores: tuple[int, ...]
    image: ImageSource | None = None


def read_captioned_images(
    path: AnyPath,
    images_dir: Path | None = None,
    *,
    splits: Sequence[str] | None = None,
    generation: str | None = None,
) -> list[CaptionedImage]:
    """Any of the forms of this module, told by the content; on an object store a run alone.

    `splits` belongs to Karpathy files (None: test) and `generation` to runs; for others they are refused.
    """
    if not isinstance(path, Path) or path.is_dir():
        _refuse(splits, "--split", path, "a run")
        return list(read_run(RunDir.open(path, generation)))
    _refuse(generation, "--generation", path, "no run")
    if not _begins_as_json(path):
        _refuse(splits, "--split", path, "a token file")
        return read_flickr8k(path, images_dir)
    first = next((entry for entry in read_entries(path, {"images"})), None)
    if first is not None and isinstance(first.value, dict) and "sentences" in first.value:
        return read_karpathy(path, images_dir, splits or DEFAULT_SPLITS)
    _refuse(splits, "--split", path, "a COCO file, which is one split")
    return read_coco(path, images_dir)


def read_coco(path: Path, images_dir: Path | None = None) -> list[CaptionedImage]:
    """COCO's captions file: `images` (id, file_name) and `annotations` (image_id, caption).

    Without `annotations`, as for COCO's test images, no image has captions.
    """
    check_images_dir(images_dir)
    sources: dict[Id, ImageSource | None] = {}
    captions: dict[Id, list[str]] = {}
    named: dict[Id, str] = {}
    for entry in read_entries(path, {"images", "annotations"}):
        if entry.list_name == "images":
            key = _new_id(entry, entry.id("id"), sources)
            sources[key] = find_image(images_dir, [entry.text("file_name")], entry.where)
        else:
            key = entry.id("image_id")
            captions.setdefault(key, []).append(entry.text("caption"))
            named.setdefault(key, entry.where)
    if not sources:
        raise UsageError(f"{path} has no images; expected COCO's form: lists `images` and `annotations`.")
    if unknown := captions.keys() - sources.keys():
        first = min(unknown, key=str)
        raise UsageError(f"{named[first]} is of image {first!r}, which is not among its `images`.")
    return [CaptionedImage(key, _stripped(captions.get(key, ())), image) for key, image in sources.items()]


def read_karpathy(
    path: Path, images_dir: Path | None = None, splits: Sequence[str] = DEFAULT_SPLITS
) -> list[CaptionedImage]:
    """dataset_coco.json, dataset_flickr30k.json or dataset_flickr8k.json (Karpathy and Fei-Fei 2015), by split.

    The id is COCO's (`cocoid`) where there is one, else `imgid`. An image is looked for in FILEPATH/FILENAME, then in
    FILENAME.
    """
    check_images_dir(images_dir)
    found: dict[Id, CaptionedImage] = {}
    counts: Counter[str] = Counter()
    for entry in read_entries(path, {"images"}):
        split = entry.text("split")
        counts[split] += 1
        if split not in splits:
            continue
        key = _new_id(entry, entry.id("cocoid" if "cocoid" in entry.value else "imgid"), found)
        name, folder = entry.text("filename"), entry.optional_text("filepath")
        names = [f"{folder}/{name}", name] if folder else [name]
        sentences = entry.list("sentences")
        texts = [entry.part("sentences", n, item).text("raw") for n, item in enumerate(sentences)]
        found[key] = CaptionedImage(key, _stripped(texts), find_image(images_dir, names, entry.where))
    if absent := [split for split in splits if not counts[split]]:
        there = ", ".join(f"{split} ({count:,})" for split, count in counts.items()) or "none"
        raise UsageError(
            f"{path} has no image of the split {', '.join(absent)}; it has: {there}.{did_you_mean(absent[0], counts)}"
        )
    return list(found.values())


def read_flickr8k(path: Path, images_dir: Path | None = None) -> list[CaptionedImage]:
    """A token file: lines `IMAGE.jpg#NUMBER<TAB>caption`. The id is the image's name."""
    check_images_dir(images_dir)
    captions: dict[str, list[str]] = {}
    lines: dict[str, int] = {}
    for number, name, _, caption in _token_lines(path):
        captions.setdefault(name, []).append(caption)
        lines.setdefault(name, number)
    return [
        CaptionedImage(name, _stripped(texts), find_image(images_dir, [name], f"{path}, line {lines[name]}"))
        for name, texts in captions.items()
    ]


def read_judgments(path: Path, tokens: Path, images_dir: Path | None = None) -> list[JudgedPair]:
    """Flickr8k's expert judgments: lines `IMAGE<TAB>CAPTION_ID<TAB>score score score`, scores 1 to 4.

    `tokens` is the token file that the caption ids are of.
    """
    check_images_dir(images_dir)
    texts = {f"{name}#{index}": caption for _, name, index, caption in _token_lines(tokens)}
    pairs = []
    for number, line in read_lines(path):
        parts = line.split()
        if len(parts) < 3 or not set(parts[2:]) <= {"1", "2", "3", "4"}:
            raise UsageError(
                f"{path}, line {number} is {_cut(line)}; expected an image, the id of a caption, and scores 1 to 4."
            )
        image, caption_id = parts[:2]
        if caption_id not in texts:
            raise UsageError(f"{path}, line {number} names the caption {caption_id!r}, which {tokens} does not have.")
        source = find_image(images_dir, [image], f"{path}, line {number}")
        pairs.append(JudgedPair(image, caption_id, texts[caption_id], tuple(map(int, parts[2:])), source))
    return pairs


def read_run(run: RunDir) -> Iterator[CaptionedImage]:
    """The images of a run with the captions that its manifest keeps, shard by shard; the id is the key.

    Images of which nothing is kept have no captions. Nothing of an image is read before it is asked for.
    """
    for _, shard, rows in iterate_manifest([run], ["key", "text"], kept_only=True):
        kept: dict[str, list[str]] = {}
        for row in rows.to_pylist():
            kept.setdefault(row["key"], []).append(row["text"])
        for image in iterate_shard_images(run, shard):
            name = as_id(image.key)
            yield CaptionedImage(image.key if name is None else name, _stripped(kept.get(image.key, ())), image)


def _token_lines(path: Path) -> Iterator[tuple[int, str, str, str]]:
    """(line, image, number of its caption, caption) of a token file."""
    for number, line in read_lines(path):
        match = _TOKEN_LINE.fullmatch(line)
        if match is None:
            raise UsageError(f"{path}, line {number} is {_cut(line)}; expected IMAGE.jpg#NUMBER, a tab, a caption.")
        yield number, match[1], match[2], match[3]


def _begins_as_json(path: Path) -> bool:
    with open(path, "rb") as file:
        start = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    if not start:
        raise UsageError(f"{path} is empty; expected captions of images.")
    return start[:1] in b"{["


def _new_id(entry: Entry, key: Id, known: Iterable[Id]) -> Id:
    if key in known:
        raise UsageError(f"{entry.where} is a second image with the id {key!r}; expected each once.")
    return key


def _stripped(captions: Iterable[str]) -> tuple[str, ...]:
    return tuple(text for caption in captions if (text := caption.strip()))


def _refuse(given: object, option: str, path: AnyPath, what: str) -> None:
    if given:
        raise UsageError(f"{option} is given, but {path} is {what}. Leave {option} out.")


def _cut(line: str) -> str:
    return repr(line if len(line) <= 80 else f"{line[:79]}…")
